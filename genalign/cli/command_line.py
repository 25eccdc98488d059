"""Help and completion of every command, from the tables of commands and settings, without importing torch."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

from genalign.cli.commands import COMMANDS, GROUPS, Command
from genalign.cli.structure import ALIASES, full_name, settings_of, settings_table


def usage() -> str:
    """List the commands, each with a line of help."""
    lines = [f"  {_synopsis(command):{_WIDTH}s}{command.help}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "usage: genalign COMMAND [--config FILE] [--SETTING VALUE ...]\n",
            *lines,
            "\ngenalign COMMAND --help explains the settings of a command, genalign --version prints the version,",
            "genalign --print_completion bash (or zsh) prints a completion script, and --debug anywhere adds the",
            "traceback of an error.",
        ]
    )


def _synopsis(command: Command) -> str:
    return f"{command.name} {command.positional.upper()}" if command.positional else command.name


_KINDS = {"kernel": "kernel", "credit": "credit", "function": "reward"}  # by the last name of a nested setting
_WIDTH = 2 + max(len(_synopsis(command)) for command in COMMANDS.values())


def group_help(group: str) -> str:
    """List the commands of a group, such as those that start with "evaluate"."""
    lines = [
        f"  {_synopsis(command):{_WIDTH}s}{command.help}"
        for command in COMMANDS.values()
        if command.name.startswith(f"{group} ")
    ]
    head = f"usage: genalign {group} COMMAND [--SETTING VALUE ...]\n\n{GROUPS[group].capitalize()}.\n"
    return "\n".join([head, *lines, f"\ngenalign {group} COMMAND --help explains the settings of one."])


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that keeps the lines of descriptions, with room for the names of settings in a wide terminal."""

    def __init__(self, prog: str) -> None:
        width = min(110, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=34 if width > 90 else 24, width=width)


def command_parser(command: Command, parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """Build a plain parser with every setting of a command, for its help and its completion."""
    if parser is None:
        parser = argparse.ArgumentParser(prog=f"genalign {command.name}", add_help=False)
    names = [one["name"] for one in settings_of(command.settings)]
    place = f" {command.positional.upper()}" if command.positional else ""
    parser.usage = f"genalign {command.name}{place} [--config FILE] [--SETTING VALUE ...]"
    parser.formatter_class = _Formatter
    width = min(110, shutil.get_terminal_size().columns - 2)
    paragraphs = settings_table()["settings"].get(command.settings, {"help": ""})["help"].split("\n\n")
    parser.description = "\n\n".join(textwrap.fill(" ".join(one.split()), width) for one in paragraphs)
    parser.epilog = textwrap.fill(
        "In a YAML file, settings are nested at their dots. On the command line, the last part of a name is enough if"
        " it is unique (--rounds 3 is --training.rounds 3).",
        width,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    _complete_files(general.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below"))
    general.add_argument(
        "--print_config", action="store_true", help="print all settings as YAML, with comments, and exit"
    )
    if command.function.endswith(":train_command"):
        _complete_files(
            general.add_argument("--resume", metavar="RUN", nargs="?", help="resume the run in this folder, or output")
        )
    group = parser.add_argument_group("settings")
    groups = {"": group}
    for entry in settings_of(command.settings):
        _add_setting(parser, groups, entry, names)
    return parser


def _add_setting(
    parser: argparse.ArgumentParser, groups: dict[str, Any], entry: Mapping[str, Any], names: Sequence[str]
) -> None:
    name, text = entry["name"], entry["help"]
    if entry.get("group"):
        default = f" (default: {entry['default']})" if "default" in entry else ""
        groups[name] = parser.add_argument_group(name, f"{text}{default}")
        return
    parent = name.rpartition(".")[0]
    group = groups.get(parent, groups[""])
    named = settings_table()["named"].get(entry.get("kind"), {})
    if named:
        text += f" One of {', '.join(named)}, or an import path; --{name}.help NAME explains one."
    if "among" in entry:
        text += f" --{name}.help lists those of genalign."
    also = [f"--{alias}" for alias in ALIASES if alias != name and full_name(alias, names) == name]
    text += f" (also {', '.join(also)})" if also else ""
    if entry.get("required"):
        text += f" (required, {entry['type']})"
    elif "choices" in entry:
        text += f" (default: {entry['default']})"
    else:
        text += f" ({entry['type']}" + (f", default: {entry['default']})" if "default" in entry else ")")
    metavar = name.rpartition(".")[2].upper()
    if "choices" in entry:
        metavar = "{" + ",".join(entry["choices"]) + "}"
    action = group.add_argument(f"--{name}", metavar=metavar, help=text.strip().replace("%", "%%"))
    if "choices" in entry or named:
        action.choices = entry.get("choices") or list(named)
    elif entry["type"].startswith("text"):
        _complete_files(action)


def _complete_files(action: argparse.Action) -> None:
    """Let shtab complete the names of files."""
    action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # type: ignore[attr-defined]  # for shtab


def command_help(command: Command, arguments: Sequence[str]) -> str | None:
    """The help that a command's arguments ask for, with --help or --recipe.help NAME; None for none."""
    if not settings_of(command.settings):
        return None
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        kinds = {entry["name"]: entry["kind"] for entry in settings_of(command.settings) if "kind" in entry}
        prefix, _, end = word.removeprefix("--").rpartition(".")
        if end == "help" and prefix.rpartition(".")[2] in _KINDS:
            kinds[prefix] = _KINDS[prefix.rpartition(".")[2]]
        if word in ("-h", "--help"):
            return command_parser(command).format_help()
        if end == "help" and prefix in kinds:
            known = _table(kinds[prefix])
            if following in known or "." not in following.removeprefix("genalign."):
                return named_help(kinds[prefix], following, prefix)
    return None


def _table(kind: str) -> Mapping[str, Any]:
    """The values of a kind of setting, by short name or by import path."""
    table = settings_table()
    known: Mapping[str, Any] = table["named"].get(kind) or table["by_path"][kind]
    return known


def named_help(kind: str, name: str, prefix: str) -> str:
    """Explain a value of a setting, such as a recipe, with its own settings; without a name, list all values."""
    named = _table(kind)
    name = next((one for one in named if one.rpartition(".")[2] == name.rpartition(".")[2]), "")
    if not name:
        width = 2 + max(map(len, named))
        lines = [f"  {one:{width}s}{about['help'].splitlines()[0]}" for one, about in named.items()]
        return "\n".join([f"--{prefix} is one of these, or the import path of another:\n", *lines])
    about = named[name]
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"--{prefix} {name} [--{prefix}.SETTING VALUE ...]",
        description=about["help"],
        add_help=False,
        formatter_class=_Formatter,
    )
    groups: dict[str, Any] = {"": parser.add_argument_group("settings")}
    for entry in about["settings"]:
        _add_setting(parser, groups, {**entry, "name": f"{prefix}.{entry['name']}"}, [])
    return parser.format_help()


def completion(shell: str) -> str:
    """Write the completion script of a shell. Raises ValueError if shtab is missing or does not know the shell."""
    if find_spec("shtab") is None:
        raise ValueError("completion needs shtab: pip install 'genalign[completion]'")
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"no completion for {shell!r}: choose from {', '.join(shtab.SUPPORTED_SHELLS)}")
    root = argparse.ArgumentParser(prog="genalign")
    root.add_argument("--version", action="store_true", help="print the version and exit")
    commands = root.add_subparsers()
    groups = {
        group: commands.add_parser(group, help=text, description=text).add_subparsers()
        for group, text in GROUPS.items()
    }
    for command in COMMANDS.values():
        *group, name = command.name.split()
        parent = groups[group[0]] if group else commands
        command_parser(command, parent.add_parser(name, help=command.help, add_help=False))
    script: str = shtab.complete(root, shell)
    return script
