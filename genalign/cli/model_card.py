"""A finished run told as a model card: what it is made of, how it was trained, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genalign.diffusion.lora import PEFT_CONFIG

_USES = {
    "lora": "pipe = DiffusionPipeline.from_pretrained({base!r})\npipe.load_lora_weights({here!r})",
    "peft": "pipe = DiffusionPipeline.from_pretrained({base!r})\n"
    "pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {here!r})",
    "merged": "the network alone, for the component of its name in a pipeline of {base!r}: from_pretrained({here!r})",
    "pipeline": "pipe = DiffusionPipeline.from_pretrained({here!r})",
}


def model_card(run: Path, form: str, here: str) -> str:
    """Markdown with the Hub's front matter, from a run's config.json, gain.json, evaluations and environment.json.

    Raises FileNotFoundError for a folder that is no run.
    """
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} has no config.json: give the output folder of a training run")
    settings = _read(run / "config.json")
    base = settings["model"]["path"]
    parts = [
        _front_matter(base, form),
        f"# {here}\n\nTrained from `{base}` by genalign ({_short(settings['recipe'])}).",
        "## Use\n\n" + _fenced(_USES[_use(run, form)].format(base=base, here=here)),
        "## Rewards\n\n" + _rewards(settings["rewards"]),
        "## Figures\n\n" + _figures(run),
        "## How it was made\n\n" + _fenced(json.dumps(_protocol(settings), indent=2), "json"),
        "Versions: " + ", ".join(f"{name} {value}" for name, value in _read(run / "environment.json").items()),
    ]
    return "\n\n".join(parts) + "\n"


def _use(run: Path, form: str) -> str:
    """A LoRA that PEFT wrote is opened by it: diffusers has no loader for every family."""
    return "peft" if form == "lora" and (run / "lora" / PEFT_CONFIG).is_file() else form


def _front_matter(base: str, form: str) -> str:
    lines = [f"base_model: {base}", f"base_model_relation: {'adapter' if form == 'lora' else 'finetune'}"]
    return "\n".join(["---", *lines, "library_name: diffusers", "tags: [genalign, reinforcement-learning]", "---"])


def _rewards(rewards: Mapping[str, Any]) -> str:
    lines = ["| reward | weight | function |", "|---|---|---|"]
    for name, reward in rewards.items():
        lines.append(f"| {name} | {reward['weight']:g} | `{_short(reward['function'])}` |")
    return "\n".join(lines)


def _short(choice: Any) -> str:
    """A configured object as a call, and a group of settings as one of no name."""
    if not isinstance(choice, dict):
        return str(choice)
    settings = choice.get("init_args", {}) if "class_path" in choice else choice
    arguments = ", ".join(f"{key}={_short(value)}" for key, value in settings.items())
    return f"{choice.get('class_path', '').rsplit('.', 1)[-1]}({arguments})"


def _figures(run: Path) -> str:
    """Gains between the evaluations before and after, and how those were made."""
    if not (run / "gain.json").is_file():
        return "The run was not evaluated before and after."
    before, after = (_read(run / name / "summary.json") for name in ("before", "after"))
    lines = ["| score | before | after | gain (95% interval) | pairs |", "|---|---|---|---|---|"]
    for name, gain in _read(run / "gain.json").items():
        old, new = (found["overall"][name]["mean"] for found in (before, after))
        interval = f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        lines.append(f"| {name} | {old:.3f} | {new:.3f} | {interval} | {gain['n']} |")
    protocol = ", ".join(f"{key} {value}" for key, value in after["protocol"].items() if key != "sigmas")
    return "\n".join([*lines, "", f"Protocol {after['protocol_hash']}: {protocol}."])


def _protocol(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("prompts", "recipe", "sampling", "training", "lora")}


def _fenced(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
