"""The names in a configuration, checked before torch is imported: misspelt and missing settings, missing files.

The names come from settings.json, which scripts/settings_reference.py writes from the docstrings of the settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from genalign.cli.commands import Command
from genalign.cli.error_messages import missing_settings, unknown_setting

ALIASES = {
    "lr": "training.learning_rate",
    "batch_size": "training.batch_size",
    "guidance": "sampling.guidance",
    "num_steps": "sampling.num_steps",
    "seed": "training.seed",
    "steps": "sampling.num_steps",
}
"""Short names of settings whose last name is not the only one of its kind, or is another."""

_META = ("help", "config", "print_config", "resume", "debug")
_OUTSIDE = ("args", *_META)


@cache
def settings_table() -> Mapping[str, Any]:
    """Read settings.json: under "settings" by the place of a dataclass, under "named" by kind and name."""
    content: Mapping[str, Any] = json.loads(files("genalign.cli").joinpath("settings.json").read_text("utf-8"))
    return content


def settings_of(command: Command) -> list[dict[str, Any]]:
    """List the settings of a command, each with its name, type, help and default."""
    settings: list[dict[str, Any]] = settings_table()["settings"].get(command.settings, {}).get("settings", [])
    return settings


def full_name(name: str, names: Sequence[str]) -> str:
    """Return the setting that a short name stands for: an alias, or the only one that ends in it; else ``name``."""
    if name in names or "." in name:
        return name
    if ALIASES.get(name) in names:
        return ALIASES[name]
    ends = [one for one in names if one.endswith(f".{name}") and ".NAME." not in one]
    return ends[0] if len(ends) == 1 else name


@dataclass(frozen=True)
class Given:
    """The settings of a command line and its files, by full name, with class paths and arguments as if written flat."""

    settings: Mapping[str, Any]
    missing_files: tuple[str, ...] = ()


def given_settings(command: Command, arguments: Sequence[str]) -> Given:
    """Read what is set, without checking it. A file that is no YAML counts as empty: the parser says what is wrong."""
    settings: dict[str, Any] = {}
    missing = []
    names = [one["name"] for one in settings_of(command)]
    for name, value in _assignments(command, arguments):
        if name != "config":
            settings[full_name(name, names)] = value
        elif not (value.lstrip().startswith("{") or Path(value).expanduser().is_file()):
            missing.append(value)
        else:
            settings |= dict(_flat(_read(value)))
    return Given(settings, tuple(missing))


def _assignments(command: Command, arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    words = list(arguments)
    if command.positional and words and not words[0].startswith("-"):
        word = words.pop(0)
        if command.positional != "world":
            yield command.positional, word
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals and words and not words[0].startswith("--"):
                value = words.pop(0)
            yield re.sub(r"\.init_args(?=\.|$)|\.class_path$|\+$", "", name), value


def _read(source: str) -> Any:
    try:
        text = source if source.lstrip().startswith("{") else Path(source).expanduser().read_text("utf-8-sig")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _flat(value: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a YAML mapping by its full name."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        name = f"{before}{key}"
        if isinstance(inner, dict) and isinstance(inner.get("class_path"), str):
            yield name, inner["class_path"]
            inner = {**inner.get("init_args", {}), **{k: v for k, v in inner.items() if k not in _CLASS}}
        elif not isinstance(inner, dict) or not inner:
            yield name, inner
        yield from _flat(inner, f"{name}.")


_CLASS = ("class_path", "init_args", "dict_kwargs")


def quick_errors(command: Command, arguments: Sequence[str]) -> list[str]:
    """Describe what is wrong with a configuration by its names alone.

    The answer is empty, for the parser to describe everything, if the names are right or if values look wrong too.
    """
    if not settings_of(command):
        return []
    given = given_settings(command, arguments)
    wrong, missing = structure_errors(command, given), missing_errors(command, given)
    if wrong:
        return [] if suspicious(command, given) else [*wrong, *missing]
    return [] if given.settings else missing


def structure_errors(command: Command, given: Given) -> list[str]:
    """Describe files that are missing and settings that do not exist, one line each."""
    entries = {entry["name"]: entry for entry in settings_of(command)}
    lines = [f"{file}: no such configuration file" for file in given.missing_files]
    lines += [
        unknown_setting(name, known_names(entries, name))
        for name in given.settings
        if name.split(".")[0] not in _OUTSIDE and not name.endswith(".help") and not _exists(name, entries, given)
    ]
    return lines


def missing_errors(command: Command, given: Given) -> list[str]:
    """Name the required settings that are not given, in one line; nothing where a file is missing that may have them."""
    if given.missing_files or command.name == "demo" or {"resume", "print_config"} & set(given.settings):
        return []
    required = [entry["name"] for entry in settings_of(command) if entry.get("required") and not entry.get("group")]
    starts = {tuple(name.split(".")[:count]) for name in given.settings for count in range(1, 9)}
    whole = {name for name, value in given.settings.items() if isinstance(value, str)}
    missing = [
        name
        for name in required
        if tuple(name.split(".")) not in starts and not any(name.startswith(f"{one}.") for one in whole)
    ]
    return [missing_settings(missing)] if missing else []


def known_names(entries: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """List every name that a setting like ``name`` may have, with those of what a recipe, kernel or strategy takes."""
    own = name.split(".")[1] if name.count(".") > 1 else "NAME"
    names = [one.replace(".NAME.", f".{own}.") for one in entries]
    for place, entry in entries.items():
        if kind := entry.get("kind"):
            inner = [one for about in settings_table()["named"][kind].values() for one in about["settings"]]
            names += dict.fromkeys(f"{place}.{one['name']}" for one in inner)
            for one in {one["name"]: one["kind"] for one in inner if "kind" in one}.items():
                names += _inner_names(f"{place}.{one[0]}", one[1])
    return names


def _inner_names(place: str, kind: str) -> list[str]:
    named = settings_table()["named"][kind].values()
    return list(dict.fromkeys(f"{place}.{one['name']}" for about in named for one in about["settings"]))


def _exists(name: str, entries: Mapping[str, Mapping[str, Any]], given: Given) -> bool:
    """Whether a setting is one of the command, or lies below one that takes others: a class, or rewards by name."""
    if name in entries:
        return True
    template = re.sub(r"^(\w+)\.[^.]+", r"\1.NAME", name)  # rewards.red.weight is rewards.NAME.weight
    parts = name.split(".")
    for one in (template, name):
        for count in range(len(parts), 0, -1):
            entry = entries.get(".".join(one.split(".")[:count]))
            if entry is None:
                continue
            if count == len(parts):
                return True
            if f"{entry['name']}.NAME.function" in entries:  # rewards by name: their own names are any
                return count + 1 == len(parts)
            return bool(entry.get("open")) and _takes(parts[:count], parts[count:], entry.get("kind"), given)
    return False


def _takes(place: Sequence[str], inner: Sequence[str], kind: str | None, given: Given) -> bool:
    """Whether the recipe, kernel or strategy at ``place`` takes the setting ``inner``; True for any other class."""
    value = given.settings.get(".".join(place))
    name = str(value).removeprefix("genalign.")
    named = settings_table()["named"].get(kind, {})
    if name not in named:
        return True
    entries = {entry["name"]: entry for entry in named[name]["settings"]}
    entry = entries.get(inner[0])
    if entry is None:
        return False
    return len(inner) == 1 or (
        ".".join(inner) in entries
        or (bool(entry.get("open")) and _takes([*place, inner[0]], inner[1:], entry.get("kind"), given))
    )


def suspicious(command: Command, given: Given) -> bool:
    """Whether a value is wrong by its looks, so that the parser would have more to say than the names alone."""
    entries = {entry["name"]: entry for entry in settings_of(command)}
    for name, value in given.settings.items():
        entry = entries.get(name) or entries.get(re.sub(r"^(\w+)\.[^.]+", r"\1.NAME", name))
        if entry is not None and not _plausible(entry, value):
            return True
        if name.split(".")[-1] == "prompts" and Path(str(value)).suffix and not Path(str(value)).expanduser().exists():
            return True
    return False


def _plausible(entry: Mapping[str, Any], value: Any) -> bool:
    text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    if entry.get("optional") and text in ("null", "none", "~", ""):
        return True
    if "choices" in entry:
        return text in entry["choices"]
    kind = entry["type"].removesuffix(" or null")
    if kind == "true or false":
        return text.lower() in ("true", "false", "yes", "no", "on", "off")
    if kind in ("int", "float"):
        try:
            return kind == "float" or float(text).is_integer()
        except ValueError:
            return False
    if entry["type"] == "import path":
        module = text.replace(":", ".").split(".")[0]
        return not module.isidentifier() or find_spec(module) is not None or Path(f"{module}.py").exists()
    return True
