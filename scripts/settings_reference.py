"""Write what the docstrings say about every setting: docs/settings.md, and genalign/cli/settings.json for the command.

``genalign`` answers ``--help``, completes words and checks the names of settings from settings.json, without importing
torch. With ``--check`` nothing is written, and the exit status is 1 where a file is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import inspect
import json
import pkgutil
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import docstring_parser
from jsonargparse.typing import Path_fr
from torch import Tensor

import genalign
import rewards
from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.recipe import Recipe
from genalign.cli.commands import COMMANDS, imported
from genalign.cli.compare import OwnSettings
from genalign.cli.structure import ALIASES
from genalign.diffusion.transitions import Kernel
from genalign.search.strategy import Strategy
from genalign.types import AnyCallable, Prompt

ROOT = Path(__file__).parents[1]
PAGE, TABLE = ROOT / "docs" / "settings.md", ROOT / "genalign" / "cli" / "settings.json"
KINDS: dict[str, tuple[type, str]] = {
    "recipe": (Recipe, "Training methods"),
    "kernel": (Kernel, "Kernels"),
    "strategy": (Strategy, "Search strategies"),
}
"""What a setting may be by name: its class, and a heading."""
BY_PATH = {
    "credit": ("credit", (RoundScores,), "Credits", "What `with_credit.credit` may be, by import path."),
    "reward": (
        "function",
        (Tensor, Sequence[Prompt]),
        "Rewards",
        "What `rewards.NAME.function` may be, by import path.",
    ),
}
"""What a setting may be by import path: the last name of the setting, the parameters of a call, a heading and a
sentence."""

_PLAIN = {
    int: "int",
    float: "float",
    bool: "true or false",
    str: "text",
    Path: "path",
    Path_fr: "path",
    type(None): "null",
    Any: "any",
    OwnSettings: "any by name",
}


@cache
def descriptions(component: Any) -> dict[str, str]:
    """The texts of the parameters of a function or class by name, from ``Args:`` and attribute docstrings."""
    texts: dict[str, str] = {}
    classes = reversed(component.__mro__) if inspect.isclass(component) else [component]
    for one in classes:
        if one.__module__ != "builtins" and one.__doc__:
            parsed = docstring_parser.parse_from_object(one)
            texts |= {item.arg_name: " ".join((item.description or "").split()) for item in parsed.params}
    return texts


def summary(component: Any) -> str:
    """The docstring of a function or class without its sections."""
    parsed = docstring_parser.parse(inspect.getdoc(component) or "")
    return f"{parsed.short_description or ''}\n\n{parsed.long_description or ''}".strip()


def first_sentence(component: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join(summary(component).split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s", text, maxsplit=1)[0].rstrip(".:")


def settings_of(component: Any, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Describe every setting of a function or class, those of its parts after it."""
    is_dataclass = dataclasses.is_dataclass(component)  # whose bases resolve their types in their own modules
    hints = typing.get_type_hints(component.__init__ if inspect.isclass(component) and not is_dataclass else component)
    texts = descriptions(component)
    for name, parameter in inspect.signature(component).parameters.items():
        if name in ("self", "args", "kwargs") or name not in hints:
            continue
        default = parameter.default
        if is_dataclass:
            default = _field_default(component, name)
        yield from _setting(f"{prefix}{name}", hints[name], default, texts.get(name, ""))


def _field_default(component: Any, name: str) -> Any:
    field = next(field for field in dataclasses.fields(component) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _setting(name: str, hint: Any, default: Any, text: str) -> Iterator[dict[str, Any]]:
    """Describe a setting, and then those of its parts."""
    last = name.rpartition(".")[2]
    among = next((kind for kind, (setting, *_) in BY_PATH.items() if setting == last and hint is AnyCallable), None)
    yield (
        {"name": name, "type": _type_name(hint), "help": text}
        | ({"among": among} if among else {})
        | _properties(hint, default)
    )
    main = _options(hint)[0]
    if _is_group(hint):
        parts = _parts(main, name, default)
        yield from parts if default is not None else map(_not_required, parts)
    if typing.get_origin(main) is dict and _is_settings(typing.get_args(main)[1]):
        yield from map(_not_required, settings_of(typing.get_args(main)[1], f"{name}.NAME."))


def _properties(hint: Any, default: Any) -> dict[str, Any]:
    """What the command has to know about a setting besides its name, without what is false or empty."""
    options, required = _options(hint), default is inspect.Parameter.empty
    kind = next((kind for kind, (base, _) in KINDS.items() if options[0] is base), None)
    words = options if all(typing.get_origin(one) is Literal for one in options) else []
    properties: dict[str, Any] = {
        "required": required,
        "group": _is_group(hint),
        "optional": len(options) < len(_union(hint)),
        "choices": [str(value) for one in words for value in typing.get_args(one)],
        "kind": kind,
        "open": kind is not None or not (_is_group(hint) or all(map(_is_plain, options))),
    }
    if not required and (default is None or not _is_group(hint)):
        properties["default"] = _written(default)
    return {name: value for name, value in properties.items() if value}


def _not_required(setting: dict[str, Any]) -> dict[str, Any]:
    """A setting of a group that may be absent as a whole."""
    return {name: value for name, value in setting.items() if name != "required"}


def _parts(component: Any, name: str, group: Any) -> Iterator[dict[str, Any]]:
    """Describe the settings of a nested group, with the defaults of ``group``, its own default if it has one."""
    hints, texts = typing.get_type_hints(component), descriptions(component)
    for field in dataclasses.fields(component):
        if field.init:
            default = (
                getattr(group, field.name) if isinstance(group, component) else _field_default(component, field.name)
            )
            yield from _setting(f"{name}.{field.name}", hints[field.name], default, texts.get(field.name, ""))


def _options(hint: Any) -> list[Any]:
    """The types of a union besides null."""
    return [one for one in _union(hint) if one is not type(None)]


def _is_group(hint: Any) -> bool:
    """Whether a type is one settings dataclass, or that or null."""
    options = _options(hint)
    return len(options) == 1 and _is_settings(options[0])


def _union(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_settings(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) and all(hint is not base for base, _ in KINDS.values())


def _is_plain(hint: Any) -> bool:
    """Whether a type has no settings of its own below its name."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is Literal or (hint in _PLAIN and hint is not Any):
        return True
    return typing.get_origin(hint) in (tuple, list) and all(one is Ellipsis or _is_plain(one) for one in inner)


def _type_name(hint: Any) -> str:
    names = [name for one in _union(hint) for name in _type_names(one)]
    return " or ".join(names) if len(names) < 3 or "null" not in names else ", ".join(names[:-1]) + " or null"


def _type_names(hint: Any) -> list[str]:
    """Name a type that is no union, or the values of a literal."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return [str(value) for value in inner]
    if origin in (list, tuple, Sequence):
        return [f"list of {_type_name(inner[0])}"]
    if origin in (dict, Mapping):
        return [f"{_type_name(inner[1])} by name"]
    if hint in _PLAIN:
        return [_PLAIN[hint]]
    if _is_settings(hint):
        return ["settings"]
    return ["name or import path" if any(hint is base for base, _ in KINDS.values()) else "import path"]


def _written(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_written, value))}]"
    if inspect.isclass(value) or inspect.isfunction(value):
        return str(value.__name__)
    return str(value) if value != "" else '""'


def components(kind: str) -> dict[str, Any]:
    """The public functions and classes of a kind of :data:`KINDS`, by name."""
    base = KINDS[kind][0]
    named = {name: getattr(genalign, name) for name in genalign.__all__ if name != base.__name__}
    return {name: one for name, one in sorted(named.items()) if _makes(one, base)}


def components_by_path(kind: str) -> dict[str, Any]:
    """The public classes and functions of a kind of :data:`BY_PATH` in genalign and rewards, by import path."""
    found = {}
    for package in (genalign.algorithms, rewards):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, one in vars(importlib.import_module(module.name)).items():
                own = getattr(one, "__module__", None) == module.name and not name.startswith("_")
                if own and not inspect.isabstract(one) and _is_called_with(one, BY_PATH[kind][1]):
                    found[f"{module.name}.{name}"] = one
    return dict(sorted(found.items()))


def _is_called_with(component: Any, expected: tuple[Any, ...]) -> bool:
    """Whether a function, or calls of a class's objects, require parameters of these types and return a tensor."""
    call = (
        component.__call__ if inspect.isclass(component) and typing.Protocol not in component.__bases__ else component
    )
    if not inspect.isfunction(call):
        return False
    parameters, hints = inspect.signature(call).parameters.items(), typing.get_type_hints(call)
    required = [hints.get(name) for name, one in parameters if one.default is one.empty and name != "self"]
    return tuple(required) == expected and hints.get("return") is Tensor


def _makes(component: Any, base: type) -> bool:
    if inspect.isfunction(component):
        return typing.get_type_hints(component).get("return") is base
    if base is Strategy:
        return inspect.isclass(component) and [*inspect.signature(component.__call__).parameters][1:] == [
            "run",
            "budget",
        ]
    return inspect.isclass(component) and issubclass(component, base)


def table() -> dict[str, Any]:
    """What settings.json holds: settings by dataclass, without those of a base, and of all that a setting may be."""
    groups: dict[str, dict[str, Any]] = {}
    for place in dict.fromkeys(command.settings for command in COMMANDS.values()):
        kind = imported(place)
        base = next((earlier for earlier in groups if issubclass(kind, imported(earlier))), None)
        inherited = list(settings_of(imported(base))) if base else []
        own = [setting for setting in settings_of(kind) if setting not in inherited]
        groups[place] = {"help": summary(kind), **({"base": base} if base else {}), "settings": own}
    named = {kind: _described(components(kind)) for kind in KINDS}
    return {
        "settings": groups,
        "named": named,
        "by_path": {kind: _described(components_by_path(kind)) for kind in BY_PATH},
    }


def _described(found: Mapping[str, Any]) -> dict[str, Any]:
    """The texts and settings of classes and of functions that make something; a reward that is a function has none."""
    makers = {
        name for name, one in found.items() if inspect.isclass(one) or not _is_called_with(one, BY_PATH["reward"][1])
    }
    return {
        name: {"help": summary(one), "settings": list(settings_of(one)) if name in makers else []}
        for name, one in found.items()
    }


def page(content: dict[str, Any]) -> str:
    """Write the settings as a page."""
    lines = [
        "# Settings",
        "",
        "Every setting of every command, as `genalign COMMAND --help` prints it. A YAML file nests the settings at"
        " their dots; `genalign COMMAND --config FILE --print_config` prints all of them with comments.",
        "",
        "On the command line, a setting may be given by its last name where it is the only one that ends in it"
        " (`--rounds 3` is `--training.rounds 3`), and some have a short one:"
        f" {', '.join(f'`--{short}` is `--{name}`' for short, name in ALIASES.items())}, where the command has no"
        " setting of that name. Training methods, kernels and search strategies need no module: `--recipe flow_grpo`,"
        " `--recipe.kernel DDIM`, `--strategy BestOfN`.",
        "",
    ]
    for place, about in content["settings"].items():
        lines += [f"## {_command_names(place)}", "", _markdown(about["help"]), ""]
        lines += [f"All settings of {_command_names(about['base'])}, and:", ""] if "base" in about else []
        lines += [*_rows(about["settings"]), ""]
    kinds = [(heading, f"What `{kind}` may be.", content["named"][kind]) for kind, (_, heading) in KINDS.items()]
    kinds += [(heading, text, content["by_path"][kind]) for kind, (*_, heading, text) in BY_PATH.items()]
    for heading, text, found in kinds:
        lines += [f"## {heading}", "", text, ""]
        for name, about in found.items():
            lines += [f"### {name}", "", _markdown(about["help"]), ""]
            lines += [*_rows(about["settings"]), ""] if about["settings"] else []
    return "\n".join(lines).rstrip() + "\n"


def _command_names(place: str) -> str:
    """The commands that take the settings of a dataclass, for a heading or a sentence."""
    return ", ".join(f"`genalign {command.name}`" for command in COMMANDS.values() if command.settings == place)


def _rows(settings: list[dict[str, Any]]) -> list[str]:
    lines = ["| setting | type | default | |", "|---|---|---|---|"]
    for entry in settings:
        default = "required" if entry.get("required") else f"`{entry['default']}`" if "default" in entry else ""
        kind = "group" if entry.get("group") else entry["type"]
        lines.append(f"| `{entry['name']}` | {kind} | {default} | {_markdown(entry['help'])} |")
    return lines


def _markdown(text: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|")


def main() -> int:
    """Write the files, or check that they are current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    check = parser.parse_args().check
    content = table()
    texts = {PAGE: page(content), TABLE: json.dumps(content, indent=1, ensure_ascii=False) + "\n"}
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(texts[path], "utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
