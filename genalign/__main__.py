"""The command ``genalign``. Help, version, completion and misspelt names are quick: only commands import torch."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from genalign.cli import command_line
from genalign.cli.commands import COMMANDS, GROUPS, split_command
from genalign.cli.error_messages import RENAMED_COMMANDS, did_you_mean, print_errors, shadowed_package
from genalign.cli.structure import quick_errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` starts with, by default those of the process, and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in arguments if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):  # prompts hold any character, and printing one must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if (text := _answer(words)) is not None:
            print(text)
            return 0
        if problems := _problems(words):
            print_errors(problems)
            return 2
        from genalign.cli.main import main as run  # takes seconds

        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # of a pager, or head, that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _answer(words: Sequence[str]) -> str | None:
    """The text that answers a command line without running a command; None if there is a command to run."""
    if not words or words[0] in ("-h", "--help"):
        return command_line.usage()
    if words[0] == "--version":
        return f"genalign {version('genalign')}"
    if words[0] == "--print_completion" and words[1:] in (["bash"], ["zsh"], ["tcsh"]):
        return command_line.completion(words[1])
    if words[0] in GROUPS and words[1:] in (["-h"], ["--help"]):
        return command_line.group_help(words[0])
    command, rest = split_command(words)
    return None if command is None else command_line.command_help(command, rest)


def _problems(words: Sequence[str]) -> list[str]:
    """Describe what is wrong by the names alone."""
    command, rest = split_command(words)
    if command is None:
        return [_no_command(words)]
    if message := shadowed_package():
        return [message]
    return quick_errors(command, rest)


def _no_command(words: Sequence[str]) -> str:
    if words[0] not in GROUPS:
        similar = did_you_mean(words[0], [*GROUPS, *(name.split()[0] for name in COMMANDS)], ": see --help for all")
        return f"no command {words[0]!r}{similar}"
    if now := RENAMED_COMMANDS.get(" ".join(words[:2])):
        return f"no command {' '.join(words[:2])!r} any more: use {now}"
    names = [name.split()[1] for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if len(words) == 1 or words[1].startswith("-"):
        return f"choose one of {', '.join(names)}, as in genalign {words[0]} {names[0]}"
    similar = did_you_mean(words[1], names, f": choose from {', '.join(names)}")
    return f"no command {' '.join(words[:2])!r}{similar}"


if __name__ == "__main__":
    raise SystemExit(main())
