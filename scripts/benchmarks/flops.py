"""The FLOPs of an image in training, of our loop and of Flow-GRPO's published one, counted on shapes alone.

    python scripts/benchmarks/flops.py            docs/results/flops.json

The calls of the denoiser, forward and backward, are counted by running the trainer's own loop on a toy (``dry_run``),
for configurations as they are shipped. The FLOPs of a call are counted by torch on the meta device, on Stable Diffusion
3.5 Medium at its published size with the adapter: every matrix product and attention, those of the LoRA and of blocks
that checkpointing runs again included; a multiplication and an addition are two FLOPs. Text encoders, the autoencoder
and rewards are counted for neither loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from genalign import assets
from genalign.cli import parsing
from genalign.cli.train_settings import Train
from genalign.diffusion.policy import Policy
from genalign.runtime.counted_memory import fused_attention
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward
from genalign.training.dry_run import ToyPipeline, dry_run
from genalign.types import PromptSet
from pipelines import SD3
from pipelines.base import DiffusersPipeline
from pipelines.meta_device import outline_of
from scripts.benchmarks.published_results import Measurement, write_results
from scripts.benchmarks.published_sizes import sd35_medium
from scripts.benchmarks.trained_runs import head

GENEVAL = "scripts/configs/train/sd35_medium_flow_grpo_geneval.yaml"
ONE_GPU = "sd35-medium-1gpu"  # a preset
RESULTS = Path("docs/results")


@dataclass(frozen=True)
class Calls:
    """The denoiser's evaluations of single samples for an image, forward and backward; guidance counts twice."""

    forward: float
    backward: float


def published_calls(steps: int = 10, fraction: float = 0.99, rows: int = 2) -> Calls:
    """The calls of Flow-GRPO's published loop for SD3.5 Medium on GenEval (``geneval_sd3`` of its repository).

    It samples ``steps`` steps, with guidance in ``rows`` rows. It replays ``int(steps * fraction)`` of them, with
    guidance too: once with a backward pass, and once without the adapter for the KL.
    """
    trained = int(steps * fraction)
    return Calls(rows * (steps + 2 * trained), rows * trained)


def open_on_meta(pixels: int, text_tokens: int, checkpointing: bool, blocks: int | None = None) -> DiffusersPipeline:
    """Build SD3.5 Medium without weights; ``blocks`` limits the number of blocks of each kind."""
    with torch.device("meta"):
        pipe = sd35_medium(blocks, texts=False)
    memory, size = Memory(checkpointing=checkpointing), {"height": pixels, "width": pixels}
    pipeline = outline_of(pipe, SD3, torch.float32, **size, max_sequence_length=text_tokens, memory=memory).pipeline
    assert isinstance(pipeline, DiffusersPipeline)
    return pipeline


@contextmanager
def counted(into: Counter[str], name: str) -> Iterator[None]:
    """Add the FLOPs of the context to ``into[name]``."""
    fused = mock.patch.object(F, "scaled_dot_product_attention", fused_attention)  # a mode of torch ends at a backward
    with fused, FlopCounterMode(display=False) as counter:
        yield
    into[name] += counter.get_total_flops()


def training_settings(file: str | Path) -> Train:
    """Read the configuration of a training run, with any prompts and reward."""
    anything = {"prompts": "prompts.txt", "output": "run", "rewards.any.function": "rewards.jpeg.compressibility"}
    words = [f"--{name}={value}" for name, value in anything.items()]
    settings, _ = parsing.parse(Train, ["--config", str(file), *words], "train")
    return settings


def our_calls(settings: Train, pipeline: DiffusersPipeline) -> Calls:
    """The calls of a whole run of the trainer, divided by its images, if every sample has credit."""
    prompts = PromptSet.of([str(number) for number in range(settings.training.prompts_per_round or 16)])
    fitted = settings.training.fit(prompts, settings.recipe.objective.unit)
    toy, guidance = ToyPipeline.like(pipeline, settings.sampling), settings.sampling.guidance_scale(pipeline)
    run = dry_run(toy, [NamedReward("any", len)], prompts, settings.recipe, fitted, guidance)  # which is not called
    images = run.rounds * fitted.prompts_per_round * fitted.group_size
    return Calls(run.total.counts["nfe"] / images, run.total.counts["nfe backward"] / images)


def call_flops(pipeline: DiffusersPipeline) -> Calls:
    """The FLOPs of one forward call with the adapter, and of its backward pass, with what that runs again."""
    x, conditioning = pipeline.zeros(1, *pipeline.latent_shape), pipeline.longest_conditioning(1)
    flops = Counter[str]()
    with counted(flops, "forward"):
        output = pipeline.run_denoiser(x, torch.zeros(1, device="meta"), conditioning)
    with counted(flops, "backward"):
        torch.autograd.backward(output.sum())
    return Calls(flops["forward"], flops["backward"])


def model_on_meta(settings: Train, blocks: int | None = None) -> DiffusersPipeline:
    """Build SD3.5 Medium with the adapter and the sizes of a configuration."""
    model = settings.model
    if model.height is None or model.max_sequence_length is None:
        raise ValueError("set model.height, model.width and model.max_sequence_length: they decide the FLOPs")
    pipeline = open_on_meta(model.height, model.max_sequence_length, model.memory.checkpointing, blocks)
    Policy(pipeline.denoiser, settings.lora)
    return pipeline


def our_flops(settings: Train, blocks: int | None = None) -> float:
    """The FLOPs of an image in training by ``settings``."""
    pipeline = model_on_meta(settings, blocks)
    return product(our_calls(settings, pipeline), call_flops(pipeline))


def product(calls: Calls, flops: Calls) -> float:
    """The FLOPs of ``calls`` of which each takes ``flops``."""
    return calls.forward * flops.forward + calls.backward * flops.backward


def measurements(blocks: int | None = None) -> list[Measurement]:
    """Count every loop: its calls and TFLOP an image, and these over those of Flow-GRPO's published loop."""
    geneval, one_gpu = training_settings(GENEVAL), training_settings(assets.preset(ONE_GPU))
    ours = {"sd35_medium_flow_grpo_geneval": geneval, ONE_GPU: one_gpu}
    published, flops = (
        published_calls(),
        call_flops(model_on_meta(geneval, blocks)),
    )  # of the published adapter and sizes
    whole = product(published, flops)
    rows = [
        Measurement("call.forward", "TFLOP of a row", flops.forward / 1e12),
        Measurement("call.backward", "TFLOP of a row", flops.backward / 1e12),
        *_loop("flow_grpo", published, whole),
    ]
    for name, settings in ours.items():
        pipeline = model_on_meta(settings, blocks)
        calls = our_calls(settings, pipeline)
        value = product(calls, call_flops(pipeline))
        rows += [*_loop(name, calls, value), Measurement(f"{name}.ratio", "FLOPs over flow_grpo's", value / whole)]
    return rows


def _loop(name: str, calls: Calls, flops: float) -> list[Measurement]:
    return [
        Measurement(f"{name}.nfe", "NFE an image", calls.forward),
        Measurement(f"{name}.backward", "backward NFE an image", calls.backward),
        Measurement(name, "TFLOP an image", flops / 1e12),
    ]


def main() -> None:
    """Count, and write the result file."""
    claim = "FLOPs of the denoiser for an image of SD3.5 Medium at 512 pixels, sampled and learned"
    rows = write_results(RESULTS, "flops", head(claim, "python scripts/benchmarks/flops.py"), measurements())
    for row in rows:
        print(f"{row.name:60s}{row.metric:30s}{row.mean:10.4g}")


if __name__ == "__main__":
    main()
