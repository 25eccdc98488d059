"""The composition root: joins genalign, the pipelines and the rewards, and dispatches the commands."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

import pipelines
from genalign import assets
from genalign.cli import config, parsing
from genalign.cli.compare import calibrate_command, compare_command, report_command
from genalign.cli.context import Checkpoint, CommandContext
from genalign.cli.error_messages import error_line
from genalign.cli.evaluate import evaluate_command
from genalign.cli.export import export_command
from genalign.cli.plan import plan_command
from genalign.cli.reward import reward_command, serve_command
from genalign.cli.steer import prices_command, steer_command, train_noise_aware_command
from genalign.cli.train import demo_command, train_command
from genalign.runtime.cpu import retain_freed_memory
from genalign.training.memory_estimate import Outline
from pipelines.base import Options
from pipelines.checkpoint_files import require_weights
from pipelines.low_memory import quantization_arguments
from pipelines.meta_device import outline
from rewards.backbones.world_verifier import SCORES
from rewards.geneval import GenEvalJudge
from rewards.noise_aware import save_scorer
from rewards.shapes import ShapesReward
from rewards.tones import TonesReward


def load_model(model: config.Model) -> Checkpoint:
    """Load the pipeline that a configuration names, without the progress bars of diffusers and transformers."""
    disable_diffusers_bars()
    disable_transformers_bars()
    config.require_device(model.device)
    if model.device == "cpu":
        retain_freed_memory()
    return pipelines.load(assets.resolve(model.path), dtype=getattr(torch, model.dtype), **_options(model))


def outline_model(model: config.Model) -> Outline:
    """Open the pipeline that a configuration names without its weights."""
    options = _options(replace(model, compiled=False))  # nothing is computed
    return outline(assets.resolve(model.path), dtype=getattr(torch, model.dtype), **options)


def require_model(model: config.Model) -> None:
    """Raise ValueError for a device or quantization that is not available, FileNotFoundError for missing weights."""
    config.require_device(model.device)
    require_weights(assets.resolve(model.path))
    quantization_arguments(model.memory, "", getattr(torch, model.dtype))


def _options(model: config.Model) -> Options:
    options = {name: getattr(model, name) for name in Options.__annotations__}
    autocast = getattr(torch, model.autocast) if model.autocast else None
    return cast(Options, options | {"autocast": autocast})


CONTEXT = CommandContext(
    load_model,
    outline_model,
    require_model,
    {
        "shapes": {score: ShapesReward(score) for score in SCORES},
        "tones": {score: TonesReward(score) for score in SCORES},
    },
    save_scorer,
    GenEvalJudge(),
)

COMMANDS: dict[str, Callable[[CommandContext, Sequence[str]], int]] = {
    "train": train_command,
    "evaluate": evaluate_command,
    "plan": plan_command,
    "calibrate": calibrate_command,
    "compare": compare_command,
    "steer": steer_command,
    "prices": prices_command,
    "train-noise-aware": train_noise_aware_command,
    "serve": serve_command,
    "reward": reward_command,
    "export": export_command,
    "report": report_command,
    "demo": demo_command,
}


def main(arguments: Sequence[str]) -> int:
    """Run the command that ``arguments`` starts with; wrong input is one line on standard error and exit status 2.

    ``--debug`` among the arguments adds the traceback, and those of rewards that fail and are called again.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    debug, (name, *rest) = "--debug" in arguments, [word for word in arguments if word != "--debug"]
    logging.getLogger("genalign").setLevel(
        logging.DEBUG if debug else logging.INFO
    )  # a line per round, without a terminal
    if os.getcwd() not in sys.path:  # of modules that configurations name; installed ones of the same name come first
        sys.path.append(os.getcwd())
    try:
        return COMMANDS[name](CONTEXT, rest)
    except parsing.INPUT_ERRORS as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error_line(error)}", file=sys.stderr)
        return 2
