"""Checks of the names in a configuration before torch is imported: misspelled and missing settings, missing files.

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

from genalign.assets import presets
from genalign.cli.commands import Command
from genalign.cli.error_messages import EXAMPLES, missing_settings, unknown_setting

ALIASES = {
    "lr": "training.learning_rate",
    "batch_size": "training.batch_size",
    "guidance": "sampling.guidance",
    "num_steps": "sampling.num_steps",
    "seed": "training.seed",
    "steps": "sampling.num_steps",
}
"""Short names of settings whose last name is ambiguous or different."""

_META = ("help", "config", "print_config", "resume", "debug")
_OUTSIDE = ("args", *_META)
_MOST_VALUES = 100_000


@cache
def settings_table() -> Mapping[str, Any]:
    """Read settings.json: under "settings" by the location of a dataclass, under "named" by kind and name."""
    content: Mapping[str, Any] = json.loads(files("genalign.cli").joinpath("settings.json").read_text("utf-8"))
    return content


def settings_of(place: str) -> list[dict[str, Any]]:
    """List the settings of a dataclass such as "genalign.cli.steer:Steer": their names, types, texts and defaults."""
    about: Mapping[str, Any] = settings_table()["settings"].get(place, {"settings": []})
    own: list[dict[str, Any]] = about["settings"]
    changed = {one["name"] for one in own}
    return [one for one in settings_of(about["base"]) if one["name"] not in changed] + own if "base" in about else own


def full_name(name: str, names: Sequence[str], value: str = "") -> str:
    """Return the setting that a short name stands for: an alias, or the only one that ends in it; else ``name``.

    A section with a path, as ``model``, stands for that path if the ``value`` is neither a mapping nor a YAML file.
    """
    if name in names or "." in name:
        is_mapping = value.lstrip().startswith("{") or value.endswith((".yaml", ".yml", ".json"))
        return f"{name}.path" if f"{name}.path" in names and value and not is_mapping else name
    if ALIASES.get(name) in names:
        return ALIASES[name]
    ends = [one for one in names if one.endswith(f".{name}") and ".NAME." not in one]
    return ends[0] if len(ends) == 1 else name


@dataclass(frozen=True)
class RawSettings:
    """The settings of a command line and its files, by full name, with class paths and arguments flattened.

    Args:
        settings: The values, as text or as parsed by YAML.
        missing_files: --config files that do not exist.
        unreadable: --config files without settings, which the parser reports.
        endless: Those of them that are nested too deeply to be read.
    """

    settings: Mapping[str, Any]
    missing_files: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    endless: tuple[str, ...] = ()


def raw_settings(place: str, arguments: Sequence[str]) -> RawSettings:
    """Read the settings without checking them; a value replaces earlier ones, and those nested below them."""
    settings: dict[str, Any] = {}
    missing, unreadable, endless = [], [], []
    names = [one["name"] for one in settings_of(place)]
    for name, value in _assignments(arguments):
        raw: dict[str, Any] = {full_name(name, names, value): value}
        if name == "config":
            text, raw = value, {}
            if not _is_text(value):
                path = Path(value).expanduser()
                if not path.exists():
                    missing.append(value)
                    continue
                text = path.read_text("utf-8-sig", "replace") if path.is_file() else ""
            content = _settings_in(text)
            endless += ["the configuration" if _is_text(value) else value] if content is None else []
            raw = content or {}
            unreadable += [] if raw else [value]
        for one in raw:
            settings = {other: old for other, old in settings.items() if not other.startswith(f"{one}.")}
        settings |= raw
    return RawSettings(settings, tuple(missing), tuple(unreadable), tuple(endless))


def _settings_in(text: str) -> dict[str, Any] | None:
    """The settings in YAML by full name, empty for other text; None if it is nested too deeply or endlessly."""
    try:
        content = yaml.safe_load(text)
        return None if _is_endless(content) else dict(_flat(content))
    except yaml.YAMLError:
        return {}
    except RecursionError:
        return None


def _is_endless(content: Any) -> bool:
    """Whether YAML has over ``_MOST_VALUES`` values once its aliases are replaced: they can grow as 2**depth."""
    count, rest = 0, [content]
    while rest and count <= _MOST_VALUES:
        value = rest.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(inner)
        rest.extend(inner)
    return count > _MOST_VALUES


def _assignments(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield every setting of a command line with its value, which is empty if there is none."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals and words and not words[0].startswith("--"):
                value = words.pop(0)
            yield re.sub(r"\.init_args(?=\.|$)|\.class_path$|\+$", "", name), value


def _is_text(value: str) -> bool:
    """Whether a --config value is the text of a configuration, not a path."""
    return "\n" in value or value.lstrip().startswith("{")


def _flat(value: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a YAML mapping by its full name."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        name = f"{before}{key}"
        if isinstance(inner, dict) and isinstance(inner.get("class_path"), str):
            yield name, inner["class_path"]
            own = inner.get("init_args")
            inner = own if isinstance(own, dict) else {}
        elif not isinstance(inner, dict) or not inner:
            yield name, inner
        yield from _flat(inner, f"{name}.")


def quick_errors(command: Command, arguments: Sequence[str]) -> list[str]:
    """Describe the errors in the names of a configuration.

    The result is empty if the names are right, or if values look wrong too, so the parser reports everything.
    """
    place = command.settings
    if not settings_of(place):
        return []
    if command.positional and arguments and not arguments[0].startswith("-"):
        first = [] if command.positional == "world" else [f"--{command.positional}", arguments[0]]
        arguments = [*first, *arguments[1:]]
    raw = raw_settings(place, arguments)
    if raw.endless:
        return [*map(endless_file, raw.endless)]
    wrong = structure_errors(place, raw)
    missing = [] if command.name == "demo" else missing_errors(place, raw)
    if missing_names(place, raw) == [command.positional]:
        example = EXAMPLES.get(command.positional, "...")
        missing = [f"{command.positional} is missing, as in genalign {command.name} {example}"]
    if wrong:
        return [] if suspicious(place, raw) else [*wrong, *missing]
    return [] if raw.settings or raw.unreadable else missing


def structure_errors(place: str, raw: RawSettings) -> list[str]:
    """Describe files that are missing and settings that do not exist, one line each."""
    entries = {entry["name"]: entry for entry in settings_of(place)}
    lines = [
        f"there is no preset {file.removeprefix('preset:')!r}: choose from {', '.join(presets())}"
        if file.startswith("preset:")
        else f"{file}: no such configuration file"
        for file in raw.missing_files
    ]
    lines += [
        unknown_setting(name, settings_among(entries, name, raw))
        for name in raw.settings
        if name.split(".")[0] not in _OUTSIDE and not name.endswith(".help") and not _exists(name, entries, raw)
    ]
    return lines


def endless_file(file: str) -> str:
    """Describe a --config file that is nested too deeply to be read, or whose aliases expand endlessly."""
    return f"{file} is nested too deeply: remove YAML aliases (*a) inside anchors (&a)"


def missing_errors(place: str, raw: RawSettings) -> list[str]:
    """Name the missing required settings, in one line; empty if there are none."""
    missing = missing_names(place, raw)
    return [missing_settings(missing)] if missing else []


def missing_names(place: str, raw: RawSettings) -> list[str]:
    """List the missing required settings.

    None are missing if a file that may contain them does not exist, or if none are needed.
    """
    if raw.missing_files or {"resume", "print_config"} & set(raw.settings):
        return []
    starts = {".".join(name.split(".")[:count]) for name in raw.settings for count in range(1, 9)}
    whole = {name for name, value in raw.settings.items() if isinstance(value, str)}
    return [
        entry["name"]
        for entry in settings_of(place)
        if entry.get("required") and not entry.get("group") and entry["name"] not in starts
        if not any(entry["name"].startswith(f"{one}.") for one in whole)
    ]


def settings_among(entries: Mapping[str, Mapping[str, Any]], name: str, raw: RawSettings) -> list[str]:
    """List every name that a setting like ``name`` may have, with the arguments of recipes, kernels and strategies."""
    own = name.split(".")[1] if name.count(".") > 1 else "NAME"
    names = [one.replace(".NAME.", f".{own}.") for one in entries]
    for place, entry in entries.items():
        if kind := entry.get("kind"):
            names += _names_below(place, kind, raw)
    return names


def _names_below(place: str, kind: str, raw: RawSettings, above: tuple[str, ...] = ()) -> list[str]:
    """List the arguments of the recipe, kernel or strategy at ``place``, or of all if it is none of ours."""
    named = settings_table()["named"][kind]
    selected = named.get(str(raw.settings.get(place)).removeprefix("genalign."))
    inner = {one["name"]: one for about in ([selected] if selected else named.values()) for one in about["settings"]}
    names = [f"{place}.{name}" for name in inner]
    for name, one in inner.items():
        if one.get("kind", kind) not in (kind, *above):
            names += _names_below(f"{place}.{name}", one["kind"], raw, (kind, *above))
    return names


def _exists(name: str, entries: Mapping[str, Mapping[str, Any]], raw: RawSettings) -> bool:
    """Whether a setting belongs to the command, or lies below one with nested settings: a class, or named rewards."""
    if name in entries:
        return True
    template = re.sub(r"^(\w+)\.[^.]+", r"\1.NAME", name)  # rewards.red.weight is rewards.NAME.weight
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        for one in (template, name):
            entry = entries.get(".".join(one.split(".")[:count]))
            if entry is None:
                continue
            if count == len(parts):
                return True
            if f"{entry['name']}.NAME.function" in entries:  # named rewards: any name is allowed
                return count + 1 == len(parts)
            return bool(entry.get("open")) and _takes(parts[:count], parts[count:], entry.get("kind"), raw)
    return False


def _takes(place: Sequence[str], inner: Sequence[str], kind: str | None, raw: RawSettings) -> bool:
    """Whether the recipe, kernel or strategy at ``place`` has the setting ``inner``; True for any other class."""
    value = raw.settings.get(".".join(place))
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
        or (bool(entry.get("open")) and _takes([*place, inner[0]], inner[1:], entry.get("kind"), raw))
    )


def suspicious(place: str, raw: RawSettings) -> bool:
    """Whether a value looks wrong, so the parser would report more than wrong names."""
    entries = {entry["name"]: entry for entry in settings_of(place)}
    for name, value in raw.settings.items():
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
