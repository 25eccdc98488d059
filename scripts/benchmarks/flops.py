"""The FLOPs of an image in training, of our loop and of Flow-GRPO's published one, counted on shapes alone.

    python scripts/benchmarks/flops.py            docs/results/flops.json

Stable Diffusion 3.5 Medium is built from its published configuration on torch's meta device, and one round is sampled
and learned there by the code of the trainer: rollouts, replays, reference policy and backward passes. Every matrix
product and attention of the denoiser is counted (a multiplication and an addition are two FLOPs), those of the LoRA and
of recomputed blocks included. Text encoders, the autoencoder and rewards are counted for neither loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genalign import assets
from genalign.algorithms.interfaces import MetricSums, TermScales, UpdateBatch, UpdateContext
from genalign.cli import config, parsing
from genalign.diffusion.policy import ATTENTION, Lora, Policy
from genalign.diffusion.rollout import kernel_per_step, rollout
from genalign.runtime.memory_options import Memory
from genalign.training.trainer import Trainer
from genalign.types import Conditioning
from pipelines import SD3
from scripts.benchmarks.proofs import head
from scripts.benchmarks.published_results import Measurement, write_results
from scripts.benchmarks.published_sizes import sd35_medium

GENEVAL = "scripts/configs/train/sd35_medium_flow_grpo_geneval.yaml"
ONE_GPU = "sd35-medium-1gpu"  # a preset
RESULTS = Path("docs/results")
ROUNDS = 100  # over which the choice of trained steps is averaged


@dataclass(frozen=True)
class PublishedLoop:
    """Flow-GRPO's published settings for SD3.5 Medium on GenEval (its repository, ``geneval_sd3``).

    Its training script samples ``steps`` steps with guidance, and replays ``int(steps * fraction)`` of them with the
    negative prompts stacked on the batch, once with the adapter and a backward pass, and once without for the KL.
    """

    steps: int = 10
    fraction: float = 0.99
    guidance: float = 4.5
    pixels: int = 512
    text_tokens: int = 128
    lora: Lora = Lora(32, 64, tuple(f"attn.{name}" for name in ATTENTION))  # not in the second attention of a block


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Attention as the one operation of fused kernels, whose FLOPs torch has a formula for."""
    if attn_mask is not None:
        raise NotImplementedError("attention with a mask is not counted")
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return output


class ShapesOnly(SD3):
    """SD3 on the meta device, whose texts are all of the greatest length."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(self.longest_conditioning(len(prompts)))

    def unconditional_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.longest_conditioning(len(next(iter(tensors.values()))))

    def _mixed_precision(self) -> AbstractContextManager[object]:
        return nullcontext()  # the meta device has no autocast


def open_on_meta(pixels: int, text_tokens: int, checkpointing: bool, blocks: int | None = None) -> ShapesOnly:
    """Build SD3.5 Medium without weights; ``blocks`` limits the number of blocks of each kind."""
    with torch.device("meta"):
        pipe = sd35_medium(blocks)
    memory = Memory(checkpointing=checkpointing)
    return ShapesOnly(pipe, device="meta", height=pixels, width=pixels, max_sequence_length=text_tokens, memory=memory)


@contextmanager
def counted(into: Counter[str], name: str, times: float = 1) -> Iterator[None]:
    """Add the FLOPs of the context, ``times`` over, to ``into[name]``."""
    fused = mock.patch.object(F, "scaled_dot_product_attention", _fused_attention)  # a mode of torch ends at a backward
    with fused, FlopCounterMode(display=False) as counter:
        yield
    into[name] += times * counter.get_total_flops()


def published_flops(loop: PublishedLoop, blocks: int | None = None) -> Counter[str]:
    """The FLOPs of sampling and of learning an image by Flow-GRPO's published loop."""
    pipeline = open_on_meta(loop.pixels, loop.text_tokens, checkpointing=False, blocks=blocks)
    policy = Policy(pipeline.denoiser, loop.lora)
    rows = 2 if loop.guidance > 1 else 1
    x, conditioning = pipeline.zeros(rows, *pipeline.latent_shape), pipeline.longest_conditioning(rows)
    timestep = torch.zeros(rows, device="meta")
    flops = Counter[str]()
    with counted(flops, "sampling"), torch.no_grad():
        for _ in range(loop.steps):
            pipeline.run_denoiser(x, timestep, conditioning)
    with counted(flops, "learning"):
        for _ in range(int(loop.steps * loop.fraction)):
            output = pipeline.run_denoiser(x, timestep, conditioning)
            with torch.no_grad(), policy.reference():
                pipeline.run_denoiser(x, timestep, conditioning)
            torch.autograd.backward(output.sum())
    return flops


def training_settings(file: str | Path) -> config.Train:
    """Read the configuration of a training run, with any prompts and reward."""
    anything = {"prompts": "prompts.txt", "output": "run", "rewards.any.function": "rewards.jpeg.compressibility"}
    words = [f"--{name}={value}" for name, value in anything.items()]
    settings, _ = parsing.parse(config.Train, ["--config", str(file), *words], "train")
    return settings


def our_flops(settings: config.Train, blocks: int | None = None) -> Counter[str]:
    """The FLOPs of sampling and of learning an image by the trainer's own code, if every sample has credit.

    They are the mean over the choices of trained steps. ``settings`` are those of a configuration of SD3.5 Medium.
    """
    model, training = settings.model, settings.training
    if model.height is None or model.max_sequence_length is None:
        raise ValueError("set model.height, model.width and model.max_sequence_length: they decide the FLOPs")
    pipeline = open_on_meta(model.height, model.max_sequence_length, model.memory.checkpointing, blocks)
    policy = Policy(pipeline.denoiser, settings.lora)
    texts = [str(number) for number in range(training.prompts_per_round or 16)]
    trainer = Trainer(
        pipeline, policy, lambda samples, _: samples[:, 0], texts, settings.recipe, training, settings.sampling
    )
    chosen = [settings.recipe.steps(pipeline.path, trainer.grid, index, training.seed) for index in range(ROUNDS)]
    flops = Counter[str]()
    for steps, count in Counter(chosen).items():
        flops.update({name: value * count / ROUNDS for name, value in _round(trainer, steps).items()})
    return flops


def _round(trainer: Trainer, steps: tuple[int, ...]) -> dict[str, float]:
    """The FLOPs of an image in a round that trains ``steps``.

    Two of its batches are run, of which the second stands for the others: the first one also measures the KL.
    """
    recipe, sizes = trainer.recipe, trainer.batch_sizes
    kernels = kernel_per_step(trainer.kernel, steps, len(trainer.grid))
    context = UpdateContext(
        trainer.pipeline, trainer.policy, trainer.grid, trainer.kernel, trainer.guidance, None, MetricSums()
    )
    inputs = trainer.sampler.inputs(recipe, next(trainer.prompts.rounds()), "flops").split(list(sizes))
    flops = Counter[str]()
    for batch, times in zip(inputs, (1, len(sizes) - 1), strict=False):
        with counted(flops, "sampling", times):
            sampled = rollout(trainer.pipeline, batch, trainer.grid, kernels, trainer.guidance, store=steps)
        update = UpdateBatch(sampled, torch.ones(len(batch)), batch.prompt, on_policy=True)
        with counted(flops, "learning", times):
            for part in update.split(trainer.micro_batch):
                recipe.objective.backward(context, part, TermScales(1.0, 1.0), 0)
    return {name: value / sum(sizes) for name, value in flops.items()}


def without_checkpointing(settings: config.Train) -> config.Train:
    """Keep activations, for which a smaller ``training.micro_batch`` makes room, instead of computing them again."""
    memory = replace(settings.model.memory, checkpointing=False)
    return replace(settings, model=replace(settings.model, memory=memory))


def count(blocks: int | None = None) -> dict[str, Counter[str]]:
    """Count every loop, by the name of its rows."""
    geneval, one_gpu = training_settings(GENEVAL), training_settings(assets.preset(ONE_GPU))
    return {
        "flow_grpo": published_flops(PublishedLoop(), blocks),
        "sd35_medium_flow_grpo_geneval": our_flops(geneval, blocks),
        "sd35_medium_flow_grpo_geneval.no_checkpointing": our_flops(without_checkpointing(geneval), blocks),
        ONE_GPU: our_flops(one_gpu, blocks),
    }


def measurements(flops: Mapping[str, Counter[str]]) -> list[Measurement]:
    """The rows of the table: TFLOP of an image, and all of them over those of Flow-GRPO's published loop."""
    rows = []
    for name, parts in flops.items():
        for part, value in parts.items():
            rows.append(Measurement(f"{name}.{part}", "TFLOP an image", value / 1e12))
        rows.append(Measurement(name, "TFLOP an image", parts.total() / 1e12))
        if name != "flow_grpo":
            rows.append(
                Measurement(f"{name}.ratio", "FLOPs over flow_grpo's", parts.total() / flops["flow_grpo"].total())
            )
    return rows


def main() -> None:
    """Count, and write the result file."""
    claim = "FLOPs of the denoiser for an image of SD3.5 Medium at 512 pixels, sampled and learned"
    rows = write_results(RESULTS, "flops", head(claim, "python scripts/benchmarks/flops.py"), measurements(count()))
    for row in rows:
        print(f"{row.name:60s}{row.metric:30s}{row.mean:10.4g}")


if __name__ == "__main__":
    main()
