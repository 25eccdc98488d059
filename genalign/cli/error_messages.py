"""The parser's complaints in one line: what is wrong, where, and what to write."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files

import genalign

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "settings by name",
}
RENAMED_SETTINGS = {
    "training.failed_share": "training.max_failed_fraction",
    "training.skipped_updates": "training.max_skipped_updates",
    "training.out_of_memory": "training.on_out_of_memory",
    "training.overlap": "training.overlap_scoring",
    "averaging": "ema_decay",
    "hacking": "reward_hacking",
    "hacking.shown": "reward_hacking.diagnostics",
    "training.max_forwards": "training.max_nfe",
    "budget.forwards": "budget.nfe",
    "held_out.images_per_task": "held_out.samples_per_task",
    "before_after.images_per_task": "before_after.samples_per_task",
    "reward_hacking.images_per_task": "reward_hacking.samples_per_task",
    "images_per_task": "samples_per_task",
}
"""Settings of version 0.1.0 and their names now."""


@cache
def _renamed_paths() -> Mapping[str, str]:
    lines = files("genalign.cli").joinpath("renamed_paths.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if not line.startswith("#"))


def renamed_path(path: str) -> str | None:
    """The name now of an import path of version 0.1.0, short where it is public; None for any other path."""
    table, module, rest = _renamed_paths(), path, ""
    while module and module not in table:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    if not module:
        return None
    now = table[module] + rest
    name = now.rpartition(".")[2]
    public = name in genalign.__all__ and now.startswith("genalign.") and rest.count(".") <= 1
    return f"genalign.{name}" if public else now


def nearest(unknown: str, known: Sequence[str]) -> str:
    """A question after the nearest known name, or where to find them all."""
    near = difflib.get_close_matches(unknown, known, 1)
    return f"did you mean {near[0]!r}?" if near else "see --help for what there is"


def explain(message: str, keys: Sequence[str], source: str = "") -> str:
    """Turn a message of jsonargparse into one line that says what to write.

    Names the nearest of ``keys`` for an unknown setting, and the new name of an import path of version 0.1.0 that
    ``source``, the arguments and the configuration file, holds. Messages of a configuration's own checks are kept.
    """
    if found := re.search(r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)", message, re.I):
        return _unknown(found[1] or found[2], keys)
    if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'|No module named '([\w.]+)'", message):
        missing_path = missing[3] or f"{missing[1]}.{missing[2]}"
        paths = re.findall(rf"(?<![\w.]){re.escape(missing_path)}(?:\.\w+)*", f"{message}\n{source}")
        for path in sorted([*paths, missing_path], key=len, reverse=True):
            if now := renamed_path(path):
                return f"{path} was renamed in genalign 0.2.0: write {now}"
    where = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    for pattern, say in _CAUSES:
        if found := re.search(pattern, message, re.DOTALL):
            return f"{where}: {say(found)}" if where and where != "config" else say(found)
    return message


def _unknown(name: str, keys: Sequence[str]) -> str:
    for old, now in sorted(RENAMED_SETTINGS.items(), key=lambda pair: -len(pair[0])):
        if name == old or name.startswith(f"{old}."):
            return f"setting {old!r} was renamed in genalign 0.2.0: write {now!r}"
        if name == old.rpartition(".")[2] and now not in keys:
            return f"setting {name!r} was renamed in genalign 0.2.0: write {now.rpartition('.')[2]!r}"
    if not difflib.get_close_matches(name, keys, 1):
        name = name.rsplit(".", 1)[-1]
        keys = [key.rsplit(".", 1)[-1] for key in keys]
    return f"unknown setting {name!r}: {nearest(name, keys)}"


def _no_choice(found: re.Match[str]) -> str:
    choices = re.findall(r"'([^']*)'|(None)", found[1])
    names = [name or "null" for name, _ in choices]
    near = difflib.get_close_matches(found[2], names, 1)
    return f"{found[2]!r} is none of {', '.join(names)}" + (f": did you mean {near[0]!r}?" if near else "")


def _no_attribute(found: re.Match[str]) -> str:
    known = [name for name in vars(importlib.import_module(found[1])) if not name.startswith("_")]
    near = difflib.get_close_matches(found[2], known, 1)
    return f"{found[1]} has no {found[2]}" + (f": did you mean {near[0]!r}?" if near else "")


def _needs(found: re.Match[str]) -> str:
    return f"{found[2]} needs {found[1]}: give each under init_args"


def _own_check(found: re.Match[str]) -> str:
    return found[1]


_CAUSES: Sequence[tuple[str, Callable[[re.Match[str]], str]]] = (
    (r"File does not exist: '(.+?)'", lambda found: f"no configuration file {found[1]}: --config takes a YAML file"),
    (
        r"Problems parsing config: (.*?)\n.*line (\d+)",
        lambda found: f"the configuration is not YAML, at line {found[2]}: {found[1]}",
    ),
    (r"^Unexpected config", lambda found: "the configuration must be settings by name, as in output: runs/mine"),
    (r"the following arguments are required: ([\w, ]+)\. Got value: Namespace\(class_path='([\w.]+)'", _needs),
    (
        r"the following arguments are required: (.+)",
        lambda found: f"{found[1]} must be given, in the file of --config or as --{found[1].split(',')[0]}",
    ),
    (r"typing\.Literal\[(.*?)\].*(?:Got|Given) value: ([^\s:]+?)(?:\. Got|\n|$)", _no_choice),
    (
        r"Expected a <class '(\w+)'>\. Got value: (\S+)",
        lambda found: f"expected {_KINDS.get(found[1], found[1])}, not {found[2]!r}",
    ),
    (r"module '([\w.]+)' has no attribute '(\w+)'", _no_attribute),
    (
        r"No module named '([\w.]+)'",
        lambda found: f"no module {found[1]}: it must be installed, or be in the working directory",
    ),
    (
        r"Unexpected import object (.+?)\. Got value: ([\w.]+)",
        lambda found: f"{found[2]} is {found[1]}: name a function, or a class whose objects can be called",
    ),
    (
        r"Expected a dot import path string: (\S+)",
        lambda found: (
            f"{found[1]!r} is no import path: name its module too, as in genalign.algorithms.recipes.flow_grpo"
        ),
    ),
    (
        r"Import path ([\w.]+) does not correspond to a subclass of (\w+)",
        lambda found: f"{found[1]} is no {found[2]}, nor a function that says it makes one",
    ),
    (r"Errors:\n\s+- (?!Expected)(.+?)\n", _own_check),
    (r'Parser key "[\w.]+":\s+(?!Problem)(?!Does not)(.+)$', lambda found: re.sub(r"\s+", " ", found[1])),
)
