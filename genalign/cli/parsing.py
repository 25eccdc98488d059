"""The parser of the settings of every command, which reports all errors at once."""

from __future__ import annotations

import inspect
import json
import os
import re
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from safetensors import SafetensorError

import genalign
from genalign.algorithms.recipe import Recipe
from genalign.cli.error_messages import error_line, explain, unknown_setting
from genalign.cli.structure import (
    RawSettings,
    endless_file,
    full_name,
    missing_errors,
    missing_names,
    raw_settings,
    settings_among,
    settings_of,
    structure_errors,
)
from genalign.diffusion.transitions import Kernel
from genalign.scoring.score import RewardError
from genalign.training.errors import TrainingStoppedError
from genalign.training.nonfinite import DivergedError

set_parsing_settings(subclasses_enabled=[Recipe, Kernel], instantiate_subclass_spec_in_any=False)

Check = Callable[[Any], object]
"""A check of a command's settings, which raises one of ``INPUT_ERRORS`` if they fail it."""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formatter that keeps the lines of the settings' docstrings."""


class ConfigurationError(ValueError):
    """An invalid configuration; each of its ``problems`` is one line that says what to write instead."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


INPUT_ERRORS = (ValueError, OSError, SafetensorError, RewardError, DivergedError, TrainingStoppedError)
"""Errors caused by wrong input: commands print their message in one line, without a traceback."""


def parse(
    settings: type[Any],
    arguments: Sequence[str],
    command: str,
    first: str | None = None,
    checks: Sequence[Check] = (),
) -> tuple[Any, dict[str, Any]]:
    """Build an instance of the dataclass ``settings`` from ``--config`` files and command-line overrides.

    ``--help`` and ``--print_config`` print and exit.

    Args:
        settings: The dataclass.
        arguments: The words after the command.
        command: The name of the command, for the help text.
        first: The setting of the first of ``arguments`` if that is positional, as in ``genalign report RUN``.
        checks: Checks of the settings; if the configuration is wrong, failed checks are reported, too.

    Returns:
        The instance, and all settings as plain JSON.

    Raises:
        ConfigurationError: The arguments are not a valid configuration.
    """
    if first and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    if endless := raw_settings(place_of(settings), arguments).endless:
        raise ConfigurationError(*map(endless_file, endless))
    arguments = in_full(settings, arguments)
    parser = _parser(settings, f"genalign {command}")
    parser.description = inspect.cleandoc(settings.__doc__ or "").partition("\n\nArgs:")[0]
    try:
        parsed = parser.parse_args(arguments)
        _expand_paths(parsed)
        plain = json.loads(parser.dump(parsed, format="json", skip_unset=False))
        plain.pop("config", None)
        values = parser.instantiate(parsed)
        built = settings(**{name: values[name] for name in settings.__dataclass_fields__})
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise ConfigurationError(*_problems(settings, arguments, checks, str(error))) from error
    return built, plain


def require(checks: Iterable[Check], settings: Any) -> None:
    """Raise ConfigurationError with all failed checks."""
    if problems := failed(checks, settings):
        raise ConfigurationError(*problems)


def failed(checks: Iterable[Check], settings: Any) -> list[str]:
    """Describe the failed checks, one line each, except those that need a setting which is itself wrong."""
    lines: list[str] = []
    for check in checks:
        try:
            check(settings)
        except (_UnknownSettingError, KeyError):
            continue
        except INPUT_ERRORS as error:
            lines += getattr(error, "problems", [error_line(error)])
    return list(dict.fromkeys(lines))


def _parser(settings: type[Any], program: str, skip: set[str] | None = None) -> ArgumentParser:
    parser = ArgumentParser(prog=program, formatter_class=_HelpFormatter, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file with any of the settings below")
    parser.add_class_arguments(settings, None, skip=skip)
    return parser


_SECTIONS = ("held_out", "reward_hacking", "before_after")
_PATHS = (
    *("output", "run", "before", "after", "against", "samples", "results"),
    *(
        "model.path",
        "model.text_cache",
        "init_lora",
        "lora",
        "prompts",
        *_SECTIONS,
        *(f"{section}.prompts" for section in _SECTIONS),
    ),
)
"""Settings that are paths if they are strings."""


def _expand_paths(parsed: Any) -> None:
    """Expand ~ and $VARIABLES in the paths of a configuration. Raises ValueError for an empty one.

    A path with an unset variable would otherwise be the working directory.
    """
    for key in _PATHS:
        path = parsed.get(key)
        if isinstance(path, str):
            expanded = os.path.expanduser(os.path.expandvars(path))
            if not expanded.strip() or "$" in expanded:
                raise ValueError(f"{key} is {path!r}, which is not a path: is a shell variable unset?")
            parsed[key] = expanded


# Short names

_NAMED = re.compile(
    r"""(?P<key>(?:^|[\s{,])["']?(?:recipe|strategy|kernel|class_path)["']?\s*:\s*["']?)(?P<name>[A-Za-z]\w*)"""
    r"""(?=["']?\s*(?:[,}\n\#]|$))""",
    re.MULTILINE,
)
_ONE_TRACKER = re.compile(r"^(trackers\s*:\s*)(\w+)\s*$", re.MULTILINE)


def place_of(settings: type[Any]) -> str:
    """Return the location of a dataclass, as in "genalign.cli.train_settings:Train"."""
    return f"{settings.__module__}:{settings.__qualname__}"


def in_full(settings: type[Any], arguments: Sequence[str]) -> list[str]:
    """Expand the short names of settings, recipes, kernels, strategies and trackers, in files too.

    A file with short names is replaced by its expanded text.
    """
    names = [entry["name"] for entry in settings_of(place_of(settings))]
    full: list[str] = []
    key = ""
    for index, word in enumerate(arguments):
        if not word.startswith("--"):
            full.append(_value_in_full(key, word))
            key = ""
            continue
        key, equals, value = word[2:].partition("=")
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        key = full_name(key, names, value if equals else following)
        if key == "print_config":
            value, equals = ",".join(filter(None, [value, "comments"])), "="
        full.append(f"--{key}{equals}{_value_in_full(key, value) if equals else ''}")
    return full


def _value_in_full(key: str, value: str) -> str:
    last = key.rpartition(".")[2]
    if last == "config" and Path(value).expanduser().is_file():
        text = Path(value).expanduser().read_text("utf-8-sig", "replace")
        changed = _ONE_TRACKER.sub(r"\1[\2]", _NAMED.sub(lambda match: match["key"] + _public(match["name"]), text))
        return changed if changed != text else value
    if last in ("recipe", "strategy", "kernel", "class_path"):
        return _public(value)
    return f"[{value}]" if key == "trackers" and re.fullmatch(r"[\w,]+", value) and value != "null" else value


def _public(name: str) -> str:
    return f"genalign.{name}" if name in genalign.__all__ else name


# Reporting all errors


class _UnknownSettingError(Exception):
    """A check reads a setting that is itself wrong, so its result is ignored."""


def _problems(settings: type[Any], arguments: Sequence[str], checks: Sequence[Check], message: str) -> list[str]:
    """Describe all errors of a configuration, one line each, of which ``message`` is the first."""
    place = place_of(settings)
    raw = raw_settings(place, arguments)
    if not settings_of(place) or raw.unreadable:
        return [explain(message, [], _source(arguments))]
    missing = {name.split(".")[0] for name in missing_names(place, raw)}
    lines = [*structure_errors(place, raw), *missing_errors(place, raw)]
    entries = {entry["name"]: entry for entry in settings_of(place)}
    values, wrong = _values(settings, raw, missing, entries)
    lines += wrong
    # A text that YAML parses as something else, such as 0123, is fine as a word of a command line
    setting = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    section = setting.split(".")[0]
    if section in values or not (lines or missing):
        written = [name for name in raw.settings if setting in (name, re.sub(r"^(\w+)\.[^.]+", r"\1", name))]
        lines.append(explain(message, list(entries), _source(arguments), *written[:1]))
        values.pop(section, None)
    partial = _partial(settings, values)
    own_checks = [settings.__post_init__] if hasattr(settings, "__post_init__") else []
    return list(dict.fromkeys([*lines, *failed([*own_checks, *checks], partial)]))


def _values(
    settings: type[Any], raw: RawSettings, missing: Collection[str], entries: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Parse each field of a configuration by itself; return the values of the valid ones, and the errors."""
    values: dict[str, Any] = {}
    lines: list[str] = []
    for name in settings.__dataclass_fields__:
        parser = _parser(settings, "", {*settings.__dataclass_fields__} - {name})
        for action in parser._actions:
            action.required = False  # what is missing has been described
        own = {key: value for key, value in raw.settings.items() if key.split(".")[0] == name}
        if wrong := _wrong_values(parser, own, entries):
            lines += wrong
        if wrong or name in missing:
            continue
        try:
            values[name] = parser.instantiate(_parsed(parser, own))[name]
        except (*INPUT_ERRORS, TypeError) as error:
            line = explain(str(error), list(entries))
            setting = line.split()[0]
            shared = sum(entry.endswith(f".{setting}") for entry in entries) > 1  # by sections: write it in full
            lines.append(f"{name}.{line}" if shared and f"{name}.{setting}" in entries else line)
    return values, lines


def _parsed(parser: ArgumentParser, raw: Mapping[str, Any]) -> Any:
    """Parse settings with full names."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in raw.items()}
    parsed = parser.parse_args([f"--{name}={text}" for name, text in texts.items()])
    _expand_paths(parsed)
    return parsed


def _wrong_values(
    parser: ArgumentParser, raw: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Describe each setting of a field that the parser rejects.

    The setting that an error is about is found by leaving it out, which changes the error; it then stays left out.
    """
    lines: list[str] = []
    rest = dict(raw)
    while (message := _refusal(parser, rest)) is not None:
        culprit = ""
        for name in sorted(rest, key=lambda name: -name.count(".")):
            fewer = {key: value for key, value in rest.items() if not f"{key}.".startswith(f"{name}.")}
            if _refusal(parser, fewer) != message:
                culprit = name
                break
        keys = settings_among(entries, culprit, RawSettings(raw))
        if culprit and re.search(rf"Option '{culprit.rpartition('.')[2]}' is not accepted", message):
            lines.append(unknown_setting(culprit, keys))
        else:
            lines.append(explain(message, keys, _source(map(str, rest.values())), culprit))
        if not culprit:
            break
        rest = fewer
    return lines


def _refusal(parser: ArgumentParser, raw: Mapping[str, Any]) -> str | None:
    try:
        _parsed(parser, raw)
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        return str(error)
    return None


def _partial(settings: type[Any], values: Mapping[str, Any]) -> Any:
    """Build an instance with only some of its values: reading another raises ``_UnknownSettingError``."""

    def read(self: Any, name: str) -> Any:
        if name in settings.__dataclass_fields__ and name not in values:
            raise _UnknownSettingError(name)
        return object.__getattribute__(self, name)

    partial: Any = object.__new__(type(settings.__name__, (settings,), {"__getattribute__": read}))
    for name, value in values.items():
        object.__setattr__(partial, name, value)
    return partial


def _source(words: Iterable[str]) -> str:
    """The words of a command line and the text of its files, which may contain renamed import paths."""
    words = list(words)
    files = [Path(word) for word in words if word.endswith((".yaml", ".yml", ".json"))]
    return "\n".join([*words, *(path.read_text("utf-8", "replace") for path in files if path.is_file())])
