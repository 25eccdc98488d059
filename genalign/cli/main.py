"""The composition root: joins genalign, the pipelines and the rewards, and dispatches the commands.

Imports are lazy, as importing torch takes seconds.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from genalign import assets
from genalign.cli.commands import split_command

if TYPE_CHECKING:
    from torch import nn

    from genalign.cli.context import Checkpoint, CommandContext
    from genalign.cli.model_settings import Model
    from genalign.evaluation.geneval.judge import Judge
    from genalign.evaluation.scorers import Scorer
    from genalign.search.noise_aware import NoiseAware
    from genalign.training.outline import Outline
    from pipelines.options import Options


def load_model(model: Model) -> Checkpoint:
    """Load the pipeline that a configuration names, without its libraries' progress bars and misleading warnings."""
    import torch

    from genalign.cli.model_settings import require_device
    from genalign.runtime.cpu import retain_freed_memory
    from genalign.runtime.library_logs import quiet_libraries
    from pipelines import load

    quiet_libraries()
    require_device(model.device)
    if model.device == "cpu":
        retain_freed_memory()
    return load(assets.resolve(model.path), family=model.family, dtype=getattr(torch, model.dtype), **_options(model))


def outline_model(model: Model) -> Outline:
    """Open the pipeline that a configuration names without its weights."""
    import torch

    from pipelines.meta_device import outline

    options = _options(replace(model, compile=False))  # nothing is computed
    return outline(assets.resolve(model.path), family=model.family, dtype=getattr(torch, model.dtype), **options)


def require_model(model: Model) -> None:
    """Check that a model can be loaded here.

    Raises ValueError for an unavailable device, quantization or compiler, or an unknown family, and FileNotFoundError
    for missing weights.
    """
    from genalign.cli.model_settings import require_device
    from pipelines.auto import import_family
    from pipelines.checkpoint_files import require_weights
    from pipelines.compilation import require_compiler
    from pipelines.low_memory import require_quantization

    require_device(model.device)
    if model.family is not None:
        import_family(model.family)
    require_weights(assets.resolve(model.path), model.weights, model.variant)
    require_quantization(model.memory, model.device)
    if model.compile:
        require_compiler(model.device, model.memory)


def _options(model: Model) -> Options:
    import torch

    from pipelines.options import Options

    options = {name: getattr(model, name) for name in Options.__annotations__}
    autocast = getattr(torch, model.autocast) if model.autocast else None
    return cast(Options, options | {"autocast": autocast})


def world_scorers(world: str) -> Mapping[str, Scorer]:
    """Build the named scores of a world's verifier; the strict one also reports what the verifier recognizes."""
    from genalign.worlds.shapes.verifier import verify as verify_shapes
    from genalign.worlds.tones.verifier import verify as verify_tones
    from rewards.backbones.world_verifier import SCORES, judge, scores

    verify = verify_shapes if world == "shapes" else verify_tones
    return {score: partial(judge if score == "strict" else scores, verify, score) for score in SCORES}


def save_scorer(path: Path, scorer: NoiseAware, student: nn.Module) -> None:
    """Write a noise-aware reward and the kind of its student to a file."""
    from rewards.noise_aware import save_scorer as save

    save(path, scorer, student)


def geneval_judge() -> Judge:
    """Build the default judge of GenEval evaluations."""
    from rewards.geneval import GenEvalJudge

    return GenEvalJudge()


def command_context(started: float) -> CommandContext:
    """Collect the functions of pipelines and rewards for commands; ``started`` is when the command began."""
    from genalign.cli.context import CommandContext

    joined = load_model, outline_model, require_model, world_scorers, save_scorer, geneval_judge
    return CommandContext(*joined, started)


def main(arguments: Sequence[str]) -> int:
    """Run the command at the start of ``arguments``; wrong input is one line on standard error and exit status 2.

    ``--debug`` among the arguments adds the traceback, and those of rewards that fail and are retried.
    """
    started = time.monotonic()  # before torch is imported
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    debug = "--debug" in arguments
    logging.getLogger("genalign").setLevel(logging.DEBUG if debug else logging.INFO)  # phases, without a terminal
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    command, rest = split_command([word for word in arguments if word != "--debug"])
    assert command is not None, "the entry point refuses other names"
    if os.getcwd() not in sys.path:  # of modules that configurations name; installed ones of the same name come first
        sys.path.append(os.getcwd())

    from genalign.cli.error_messages import error_line, print_errors
    from genalign.cli.parsing import INPUT_ERRORS

    try:
        return command.run(command_context(started), rest)
    except INPUT_ERRORS as error:
        if debug:
            traceback.print_exc()
        print_errors(getattr(error, "problems", [error_line(error)]))
        return 2
