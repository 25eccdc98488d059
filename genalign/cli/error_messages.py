"""The parser's complaints in one line: what is wrong, where, and what to write."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Sequence

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
    "images_per_task": "samples_per_task",
}
"""Settings of version 0.1.0 and their names now."""


def nearest(unknown: str, known: Sequence[str]) -> str:
    """A question after the nearest known name, or where to find them all."""
    near = difflib.get_close_matches(unknown, known, 1)
    return f"did you mean {near[0]!r}?" if near else "see --help for what there is"


def explain(message: str, keys: Sequence[str]) -> str:
    """``message`` of jsonargparse with the settings that it is about, and the nearest of ``keys`` for an unknown one.
    What a configuration's own checks say is left as it is."""
    if found := re.search(r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)", message, re.I):
        return _unknown(found[1] or found[2], keys)
    where = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    for pattern, say in _CAUSES:
        if found := re.search(pattern, message, re.DOTALL):
            return f"{where}: {say(found)}" if where and where != "config" else say(found)
    return message


def _unknown(name: str, keys: Sequence[str]) -> str:
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
