"""One-line messages for wrong configurations: what is wrong, where, and what to write."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import genalign

_OWN_PACKAGES = ("pipelines", "rewards")
EXAMPLES = {
    "output": "runs/mine",
    "model.path": "shapes-sd3 or stabilityai/stable-diffusion-3.5-medium",
    "prompts": "prompts.txt or shapes:train",
    "held_out": "held_out.txt or shapes:val",
    "before_after.prompts": "prompts.txt or shapes:comp",
    "recipe": "flow_grpo",
    "kernel": "FlowSDE",
    "reward": "rewards.clip.ClipReward",
    "strategy": "BestOfN",
    "student": "rewards.noise_aware.SelfDistilled",
    "run": "runs/mine",
}
"""Example values of required settings."""

_SYNONYMS = {
    "lr": ("learning_rate",),
    "epochs": ("rounds",),
    "steps": ("rounds", "num_steps"),
    "r": ("rank",),
    "cfg": ("guidance",),
    "guidance_scale": ("guidance",),
    "num_inference_steps": ("num_steps",),
}
"""Last names of settings in other programs, and the corresponding ones here."""

RENAMED_SETTINGS = {
    "averaging": "ema_decay",
    "begin": "initial_search",
    "colours": "colors",
    "decay": "pace",
    "failed_share": "max_failed_fraction",
    "forwards": "nfe",
    "hacking": "reward_hacking",
    "images_per_task": "samples_per_task",
    "max_forwards": "max_nfe",
    "neighbours": "neighbors",
    "out_of_memory": "on_out_of_memory",
    "overlap": "overlap_scoring",
    "per_task": "samples_per_task",
    "share": "initial_share",
    "shown": "diagnostics",
    "skipped_updates": "max_skipped_updates",
    "suite": "prompts",
}
"""Parts of setting names in version 0.1.0, and the same parts now."""

RENAMED_COMMANDS = {
    "evaluate geneval-compare": "genalign compare-evaluations BEFORE AFTER",
    "evaluate geneval-images": "genalign evaluate geneval --samples DIR",
}
"""Removed commands of version 0.1.0, and what to run instead."""


@cache
def renamed_path(path: str) -> str | None:
    """Look up the current name of an import path of version 0.1.0, short if public; None for any other path."""
    lines = files("genalign.cli").joinpath("renamed_paths.txt").read_text(encoding="utf-8").splitlines()
    table = dict(line.split() for line in lines if not line.startswith("#"))
    module, rest = path, ""
    while module and module not in table:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    if not module:
        return None
    now = table[module] + rest
    name = now.rpartition(".")[2]
    public = name in genalign.__all__ and now.startswith("genalign.") and rest.count(".") <= 1
    return f"genalign.{name}" if public else now


def did_you_mean(unknown: str, names: Sequence[str], otherwise: str = "") -> str:
    """Return a message's ending: the one of ``names`` that is spelled most like ``unknown``, else ``otherwise``."""
    near = difflib.get_close_matches(unknown, names, 1)
    return f": did you mean {near[0]!r}?" if near else otherwise


def print_errors(lines: Sequence[str]) -> None:
    """Print errors on standard error, one line each, and their count if there are several."""
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if len(lines) > 1:
        print(f"{len(lines)} errors: nothing was loaded", file=sys.stderr)


def error_line(error: Exception) -> str:
    """The message of an error in one line, with the path for the system's errors, such as for a path below a file."""
    if isinstance(error, OSError) and error.strerror:
        if isinstance(error, FileExistsError) and error.filename and Path(error.filename).is_symlink():
            return f"{error.filename} is a link to {Path(error.filename).readlink()}, which does not exist: remove it"
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


def shadowed_package() -> str | None:
    """Describe a file that would be imported instead of genalign's package ``pipelines`` or ``rewards``, if any."""
    for name in _OWN_PACKAGES:
        spec, own = find_spec(name), Path(genalign.__file__).parents[1] / name
        if spec and spec.origin and not Path(spec.origin).samefile(own / "__init__.py"):
            return (
                f"{spec.origin} is imported as {name!r} instead of genalign's package {own}: rename it, e.g. to"
                f" my_{name}, or run genalign in another folder"
            )
    return None


def explain(message: str, keys: Sequence[str], source: str = "", setting: str = "") -> str:
    """Turn a message of jsonargparse into one line that says what to write.

    Args:
        message: The message.
        keys: All settings of the command, for suggestions for a misspelled one.
        source: The arguments and the text of the configuration files, which may have renamed import paths.
        setting: The setting that the message is about, if known.

    Returns:
        The line; messages of a configuration's own checks are unchanged.
    """
    places = re.findall(r'Parser key "([\w.]+)"', message)
    place = (setting or ".".join(places)) if places else ""
    text = _Text(message, place, keys, source)
    for pattern, describe in _RULES:
        if match := re.search(pattern, message, re.DOTALL):
            return describe(match, text)
    # The innermost error; for a nullable setting, the first one and the value
    if match := re.search(r"Errors:\s+- (.+?)\n\s+- .*Given value: (.*)", message, re.DOTALL):
        message = f"{match[1]}. Got value: {match[2]}"
        if not match[1].startswith("Expected"):
            return match[1]
    message = re.sub(r"""Parser key "[\w.]+":|Problem with given class_path '[\w.]+':|\s+""", " ", message).strip()
    message = re.sub(r"Expected a <class '(\w+)'>\. Got value: (.*)", r"expected \1, not \2", message)
    return text.where + message


@dataclass(frozen=True)
class _Text:
    """A message of jsonargparse, the setting that it is about, all settings, and the source text."""

    message: str
    place: str
    keys: Sequence[str]
    source: str

    @property
    def where(self) -> str:
        return f"{self.place}: " if self.place else ""


def _required(match: re.Match[str], text: _Text) -> str:
    """Name the missing settings of a command, or the missing arguments of a class that a setting names."""
    names, before, after = match[1].rstrip("."), text.message[: match.start()], text.message[match.end() :]
    classes = re.findall(r"^.*?Namespace\(class_path='([\w.]+)'", after) or re.findall(r"class_path '([\w.]+)'", before)
    if classes and not classes[-1].startswith("genalign.cli."):
        return f"{text.place}: {classes[-1]} needs {names}: set {'them' if ',' in names else 'it'} under init_args"
    return missing_settings([f"{text.place}.{name}" if text.place else name for name in names.split(", ")])


def _abstract(match: re.Match[str], text: _Text) -> str:
    parent = text.place.removesuffix(f".{match[1]}")
    example = EXAMPLES.get(parent.rpartition(".")[2], "...")
    return f"{text.place} is a setting of {parent}: name that first, as in --{parent} {example}"


def _no_path(match: re.Match[str], text: _Text) -> str:
    near = [*difflib.get_close_matches(match[1], genalign.__all__, 1), _reward_named(match[1])][0]
    advice = f"did you mean {near!r}?" if near else "include its module"
    return f"{text.where}{match[1]!r} is not an import path: {advice}"


def _no_choice(match: re.Match[str], text: _Text) -> str:
    names = re.findall(r"'([^']*)'", match[1])
    return f"{text.where}must be one of {', '.join(names)}, not {match[2]!r}{did_you_mean(match[2], names)}"


def _no_text(match: re.Match[str], text: _Text) -> str:
    inner = re.search(r"class_path='([\w.]+)'", text.message[match.end() :])
    whose = f" for {inner[1]}" if inner else ""
    advice = "put it in quotes, as YAML parses no, 0123 and 12:30 as a boolean and numbers"
    return f"{text.where}expected a text{whose}, not {match[1]}: {advice}"


_RULES: Sequence[tuple[str, Callable[[re.Match[str], _Text], str]]] = (
    (r"(?:Option '|unrecognized arguments: --)([\w.]+)", lambda match, text: unknown_setting(match[1], text.keys)),
    (
        r"^Unexpected config",
        lambda match, text: "the configuration must be a mapping of settings, as in output: runs/mine",
    ),
    (r"the following arguments are required: ([\w.]+(?:, [\w.]+)*)", _required),
    (
        r"(?:No module named|module) '([\w.]+)'(?: has no attribute '(\w+)')?",
        lambda match, text: text.where + _not_importable(match[1], match[2], f"{text.message}\n{text.source}"),
    ),
    (r"is abstract\b.*?NestedArg\(key='(\w+)'", _abstract),
    (r"Expected a dot import path string: (\S+)", _no_path),
    (r"typing\.Literal\[(.*?)\].*(?:Got|Given) value: ([^\s:]+?)(?:\. Got|\n|$)", _no_choice),
    (r"Expected a <class 'str'>\. Got value: (\S+?)\.?(?=\s|$)", _no_text),
    (
        r"Parameter '(\w+)' from '([\w.]+?)(?:\.__init__)?' does not specify a type",
        lambda match, text: f"{text.where}{match[2]}: annotate the parameter {match[1]}, as in {match[1]}: float",
    ),
)
"""Messages of jsonargparse, and our replacements."""


def unknown_setting(name: str, keys: Sequence[str]) -> str:
    """Describe a setting that does not exist, and suggest the one that is probably meant.

    That is a setting whose last name is the same or a synonym, or the one that is spelled most like it.
    """
    now = ".".join(RENAMED_SETTINGS.get(part, part) for part in name.split("."))
    if now != name:
        return f"setting {name!r} was renamed in genalign 0.2.0: write {now!r}"
    last = name.rpartition(".")[2]
    ends = [key for key in keys if key.rpartition(".")[2] in (last, *_SYNONYMS.get(last, ()))]
    alike = [key for key in keys if key.count(".") == name.count(".")]
    near = difflib.get_close_matches(name, ends, 1, cutoff=0) or difflib.get_close_matches(name, alike, 1)
    if not near:
        lasts = difflib.get_close_matches(last, [key.rpartition(".")[2] for key in keys], 1)
        near = [key for key in keys if key.rpartition(".")[2] in lasts][:1]
    return f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ": see --help for all")


def missing_settings(names: Sequence[str]) -> str:
    """Name missing required settings, with an example of each."""
    examples = ", ".join(f"--{name} {EXAMPLES.get(name, '...')}" for name in names)
    verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
    return f"{', '.join(names)} {verb} missing: set {them} in the --config file or as arguments, e.g. {examples}"


def _reward_named(path: str) -> str | None:
    """Find the public reward of genalign that an incomplete path means, such as clip.ClipReward."""
    folder, name = Path(genalign.__file__).parents[1] / "rewards", path.rpartition(".")[2]
    for file in sorted(folder.rglob("*.py")):
        if re.search(rf"^(?:class|def) {re.escape(name)}\b", file.read_text("utf-8"), re.MULTILINE):
            full = ".".join([*file.relative_to(folder.parent).with_suffix("").parts, name])
            return full if full.endswith(f".{path}") else None
    return None


def _not_importable(module: str, name: str | None, text: str) -> str:
    """Explain a failed import: a path of 0.1.0, one that a package of genalign shadows, or a misspelled one."""
    path = f"{module}.{name}" if name else module
    longer = re.findall(rf"(?<![\w.]){re.escape(path)}(?:\.\w+)*", text)
    for old in sorted([*longer, path], key=len, reverse=True):
        if now := renamed_path(old):
            return f"{old} was renamed in genalign 0.2.0: write {now}"
    problem = f"{module} has no {name}" if name else f"no module {module}"
    package = module.split(".")[0]
    own, other = Path(genalign.__file__).parents[1] / package, Path.cwd() / package
    file = other.with_suffix(".py")
    if package in _OWN_PACKAGES and other.is_dir() and not other.samefile(own):
        return (
            f"{problem}: {package!r} was imported from {own}, genalign's own package, and not from {other}: rename"
            f" that folder, e.g. to my_{package}, or run genalign in {Path.cwd().parent} and write"
            f" {Path.cwd().name}.{path}"
        )
    if package in _OWN_PACKAGES and file.is_file():
        return (
            f"{problem}: {package!r} is genalign's own package, not {file}: rename that file, e.g. to"
            f" my_{package}.py, and write my_{path}"
        )
    for one in [*longer, path]:
        if own_reward := _reward_named(one):
            return f"{problem}: did you mean {own_reward!r}?"
    if name is None:
        return f"{problem}: it must be installed or in the working directory"
    return problem + did_you_mean(name, dir(importlib.import_module(module)))
