"""``genalign export``: the weights of a run, for use without genalign, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genalign.cli import config, parsing
from genalign.cli.context import CommandContext
from genalign.diffusion.lora import PEFT_CONFIG
from genalign.runtime.files import write_text
from genalign.training.run_folder import RunFolder

_USES = {
    "lora": "pipe = DiffusionPipeline.from_pretrained({base!r})\npipe.load_lora_weights({name!r})",
    "peft": "pipe = DiffusionPipeline.from_pretrained({base!r})\n"
    "pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {name!r})",
    "merged": "# The network alone, for the component of its name in a pipeline of {base!r}: from_pretrained({name!r})",
    "pipeline": "pipe = DiffusionPipeline.from_pretrained({name!r})",
}


def export_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign export``: write the weights of a run in a form that diffusers or PEFT loads, with a model card."""
    settings, _ = parsing.parse(config.Export, arguments, "export")
    run, output = Path(settings.run), Path(settings.output)
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output, or remove it")
    RunFolder(run).require_format()
    card = model_card(run, settings.form, output.name)
    adapter, network = run / "lora", run / "denoiser"
    if not adapter.is_dir() and not network.is_dir():
        raise FileNotFoundError(f"{run} has neither lora/ nor denoiser/: training did not finish a round")
    if settings.form == "lora":
        if not adapter.is_dir():
            raise ValueError(f"{run} trained the whole network: export it with --form merged or pipeline")
        shutil.copytree(adapter, output)
    else:
        pipeline = context.load(config.model_of(_read(run / "config.json")))
        if adapter.is_dir():
            pipeline.load_lora(adapter)
        else:
            pipeline.load_denoiser(network)
        pipeline.save_merged(output, whole=settings.form == "pipeline")
    write_text(output / "README.md", card)
    print(f"{settings.form}: {output}")
    return 0


def model_card(run: Path, form: str, name: str) -> str:
    """Write a model card from a run's config.json, gain.json, evaluations and environment.json.

    Raises FileNotFoundError for a folder that holds no run.

    Args:
        run: The folder of the run.
        form: The exported form: lora, merged or pipeline.
        name: The name of the exported model.

    Returns:
        Markdown with the Hub's front matter.
    """
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} has no config.json: give the output folder of a training run")
    settings = _read(run / "config.json")
    base = settings["model"]["path"]
    # diffusers cannot load the LoRA of every family; PEFT loads what it wrote
    use = "peft" if form == "lora" and (run / "lora" / PEFT_CONFIG).is_file() else form
    rewards = "\n".join(
        f"| {reward} | {choice['weight']:g} | `{_as_call(choice['function'])}` |"
        for reward, choice in settings["rewards"].items()
    )
    training = {key: settings[key] for key in ("prompts", "recipe", "sampling", "training", "lora")}
    versions = ", ".join(f"{library} {version}" for library, version in _read(run / "environment.json").items())
    return f"""---
base_model: {base}
base_model_relation: {"adapter" if form == "lora" else "finetune"}
library_name: diffusers
tags: [genalign, reinforcement-learning]
---

# {name}

Trained from `{base}` by genalign ({_as_call(settings["recipe"])}).

## Use

```python
{_USES[use].format(base=base, name=name)}
```

## Rewards

| reward | weight | function |
|---|---|---|
{rewards}

## Figures

{_figures(run)}

## Training settings

```json
{json.dumps(training, indent=2)}
```

Versions: {versions}
"""


def _as_call(setting: Any) -> str:
    """Write a configured object as a call, and a group of settings as a call without a name."""
    if not isinstance(setting, dict):
        return str(setting)
    arguments = setting.get("init_args", {}) if "class_path" in setting else setting
    text = ", ".join(f"{key}={_as_call(value)}" for key, value in arguments.items())
    return f"{setting.get('class_path', '').rsplit('.', 1)[-1]}({text})"


def _figures(run: Path) -> str:
    """Tabulate the gains from the evaluation before training to the one after, and name their protocol."""
    if not (run / "gain.json").is_file():
        return "The run was not evaluated before and after."
    before, after = (_read(run / name / "summary.json") for name in ("before", "after"))
    lines = ["| score | before | after | gain (95% interval) | pairs |", "|---|---|---|---|---|"]
    for name, gain in _read(run / "gain.json").items():
        old, new = before["overall"][name]["mean"], after["overall"][name]["mean"]
        interval = f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        lines.append(f"| {name} | {old:.3f} | {new:.3f} | {interval} | {gain['n']} |")
    protocol = ", ".join(f"{key} {value}" for key, value in after["protocol"].items() if key != "sigmas")
    return "\n".join([*lines, "", f"Protocol {after['protocol_hash']}: {protocol}."])


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
