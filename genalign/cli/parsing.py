"""The parser of the settings of every command."""

from __future__ import annotations

import inspect
import json
import os
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from safetensors import SafetensorError

from genalign.algorithms.recipes import Recipe, flow_grpo
from genalign.cli.config import RewardChoice
from genalign.cli.error_messages import explain
from genalign.diffusion.transitions import Kernel
from genalign.scoring.score import RewardError
from genalign.training.nonfinite import DivergedError

set_parsing_settings(subclasses_enabled=[Recipe, Kernel], instantiate_subclass_spec_in_any=False)


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formatter that keeps the lines of the settings' docstrings."""


class ConfigurationError(ValueError):
    """A configuration that cannot be used; the message says what to write instead."""


INPUT_ERRORS = (ValueError, OSError, SafetensorError, RewardError, DivergedError)
"""Errors that wrong input raises: commands print their message in one line, without a traceback."""


def parse(
    settings: type[Any], arguments: Sequence[str], command: str, first: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Build an instance of the dataclass ``settings`` from ``--config`` files and command-line overrides.

    ``--help`` and ``--print_config`` print and exit.

    Args:
        settings: The dataclass.
        arguments: The words after the command.
        command: The name of the command, for the help text.
        first: The setting that the first of ``arguments`` is for if it names none, as in ``genalign report RUN``.

    Returns:
        The instance, and all settings as plain JSON.

    Raises:
        ConfigurationError: The arguments are not a valid configuration.
    """
    parser = ArgumentParser(
        prog=f"genalign {command}",
        description=inspect.cleandoc(settings.__doc__ or ""),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the settings below")
    parser.add_class_arguments(settings, None)
    if first and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    try:
        parsed = parser.parse_args(list(arguments))
        _expand_paths(parsed)
        plain = json.loads(parser.dump(parsed, format="json", skip_unset=False))
        plain.pop("config", None)
        values = parser.instantiate(parsed)
        return settings(**{name: values[name] for name in settings.__dataclass_fields__}), plain
    except (ArgumentError, ValueError, TypeError) as error:
        files = [Path(word) for word in arguments if word.endswith((".yaml", ".yml", ".json"))]
        source = "\n".join([*arguments, *(path.read_text("utf-8", "replace") for path in files if path.is_file())])
        keys = [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]
        keys += [f"rewards.{name}" for name in RewardChoice.__dataclass_fields__]
        keys += [f"recipe.{name}" for name in inspect.signature(flow_grpo).parameters]
        raise ConfigurationError(explain(str(error), keys, source)) from error


def _expand_paths(parsed: Any) -> None:
    """Expand ~ and $VARIABLES in the paths of a configuration. Raises ValueError for an empty one.

    A path of an unset variable would otherwise be the working directory.
    """
    for key in ("output", "run", "prompts", "model.path", "init_lora", "lora"):
        path = parsed.get(key)
        if isinstance(path, str):
            expanded = os.path.expanduser(os.path.expandvars(path))
            if not expanded.strip() or "$" in expanded:
                raise ValueError(f"{key} is {path!r}, which names no path: is a variable of the shell unset?")
            parsed[key] = expanded
