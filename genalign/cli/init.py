"""``genalign init``: a commented training configuration for the user's own model, prompts and reward."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from genalign import assets
from genalign.cli import parsing
from genalign.cli.context import CommandContext, prompt_set
from genalign.cli.model_settings import Model
from genalign.cli.reward import named_settings
from genalign.cli.train_settings import Train
from genalign.prompts import split_held_out
from genalign.runtime.files import write_text
from genalign.types import AnyCallable

Preset = Literal["flux-dev-80gb", "sd15-24gb", "sd35-medium-1gpu", "sd35-medium-80gb", "sdxl-80gb"]

_GPU = "  # A GPU: half-precision weights; text encoders are on it only while they work\n"
_RECIPE = """\
recipe: genalign.flow_grpo  # the method; docs/choosing.md compares them
sampling: {num_steps: 10}  # few steps train faster; kernel and guidance are the defaults of the model's family
# evaluation: {num_steps: 28}  # more steps for evaluations
training:
  rounds: 100
  group_size: 12  # samples per prompt, which are compared with each other
  BATCH  # samples at a time, a multiple of group_size
  learning_rate: auto  # adapted so that each round moves the policy by the target of training.trust_region
lora: {rank: 32, alpha: 64}
"""


@dataclass(frozen=True, kw_only=True)
class Init:
    """A commented training configuration, to edit and pass to `genalign train --config FILE`.

    The reward is MODULE:FUNCTION or MODULE:CLASS, with the parameters of a class as --args.NAME.

    Args:
        prompts: Training prompts: a file, or a split of a world.
        reward: The function, or the class with callable objects.
        model: A diffusers folder, a Hub id (owner/name) or an embedded model; null takes the preset's.
        preset: Settings for a model and a GPU's memory; null takes settings for any model and this machine.
        output: YAML file to write; null prints the configuration.
    """

    prompts: str
    reward: AnyCallable
    model: str | None = None
    preset: Preset | None = None
    output: str | None = None


def init_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign init``: check model, prompts and reward, and write a configuration with them."""
    settings, plain = parsing.parse(Init, named_settings(arguments, "init"), "init")
    output = Path(settings.output) if settings.output else None
    if output and output.exists():
        raise FileExistsError(f"{output} exists: choose another output, or remove it")
    text = configuration(context, settings, plain["reward"])
    if output is None:
        print(text, end="")
        return 0
    write_text(output, text)
    print(f"{output}: next, genalign plan --config {output}, then genalign train --config {output}")
    return 0


def configuration(context: CommandContext, settings: Init, reward: Any) -> str:
    """Write a training configuration as YAML with comments.

    Raises ValueError or FileNotFoundError for a model or prompts that cannot be used.

    Args:
        context: The pipelines and rewards.
        settings: The settings of the command.
        reward: The reward as plain JSON.
    """
    prompts = prompt_set(settings.prompts)
    distinct = len({prompt.text for prompt in prompts.prompts})
    if settings.model is not None:
        _require_model(context, settings.model)
    body = _body(settings)
    path = yaml.safe_load(body)["model"]["path"]
    name = (reward["class_path"] if isinstance(reward, dict) else reward).rsplit(".", 1)[-1]
    function = yaml.safe_dump(reward, default_flow_style=True, width=sys.maxsize)  # within one line
    function = function.removesuffix("\n").removesuffix("\n...")
    evaluations = _EVALUATIONS if distinct > 1 else "# No evaluations: they need a second prompt, to hold out.\n"
    if distinct > 1:
        held_out = len(split_held_out(prompts, Train.held_out_fraction)[1].prompts)
        evaluations = evaluations.replace("HELD_OUT", str(held_out))
    return f"""\
# genalign train --config FILE: train {path} on {name}.
# docs/settings.md and genalign train --help explain every setting. Any may be given on the command line, too.
output: {_quoted(f"runs/{Path(path).name}")}
prompts: {_quoted(settings.prompts)}  # {distinct} different ones
rewards:
  # weight: in the sum of several; score_batch: samples in one call, for large networks
  {_quoted(name)}: {{function: {function}, weight: 1.0}}

{body}
{evaluations}"""


_EVALUATIONS = """\
# Evaluations with the rewards on HELD_OUT held-out prompts, which are not trained on
held_out: {every: 10, samples_per_task: 32}
before_after: {samples_per_task: 32}
sample_grid: {every: 10}  # samples of the training prompts, in samples/ and in the report
checkpoint: {every: 1, keep: 2}  # in rounds; each has a LoRA to try (genalign export --run RUN --round N)
"""


def _require_model(context: CommandContext, path: str) -> None:
    """Check the files of a local model. A Hub model is looked up when it is trained."""
    if assets.resolve(path) == path and not Path(path).exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return
        raise FileNotFoundError(f"there is no folder {path}: give a diffusers folder, a Hub id or an embedded model")
    context.require(Model(path))
    context.outline(Model(path))


def _body(settings: Init) -> str:
    """Settings of model and training: a preset with the user's model, or settings for this machine's device."""
    if settings.preset:
        text = assets.preset(str(settings.preset)).read_text(encoding="utf-8")
        path = yaml.safe_load(text)["model"]["path"]
        return text.replace(f"  path: {path}\n", f"  path: {_quoted(settings.model)}\n") if settings.model else text
    if settings.model is None:
        raise ValueError("name a model, --model PATH_OR_ID, or a preset, --preset sd35-medium-80gb")
    lines = f"model:\n  path: {_quoted(settings.model)}\n"
    if torch.cuda.is_available():
        lines += f"{_GPU}  dtype: bfloat16\n  device: cuda\n"
        lines += "  memory: {offload: text, checkpointing: true, decode_batch: 8}\n"
        return f"{lines}{_RECIPE.replace('BATCH', 'batch_size: 12')}"
    return f"{lines}  device: cpu  # or cuda, with dtype: bfloat16\n{_RECIPE.replace('BATCH', '# batch_size: 12')}"


def _quoted(text: str) -> str:
    """Write a text as a YAML scalar, quoted if YAML would parse it as something else."""
    try:
        plain = yaml.safe_load(f"x: {text}") == {"x": text}
    except yaml.YAMLError:  # such as for "a: b"
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)
