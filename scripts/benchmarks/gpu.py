"""Speed and memory of training SD3.5 Medium's architecture with random weights on a GPU, beside a plain loop.

    python scripts/benchmarks/gpu.py                            docs/results/gpu_sd35.json, which docs/results.md shows
    python scripts/benchmarks/gpu.py --device cpu --size tiny   the same program in seconds, printed only

Rounds of the preset sd35-medium-1gpu at 512 pixels, with embeddings of texts made beforehand, a reward of the samples'
place, and no text encoders, which would only wait. The plain loop has the same network, adapter, precision, batches,
steps and optimizer: it calls the network as diffusers does, backpropagates the output of every trained step, and makes
a step of the optimizer. Both take turns, round by round. The model FLOPs of a round are counted on the meta device
(scripts/benchmarks/flops.py). The machine needs the packages of pyproject.toml, and no network and no weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign import assets
from genalign.cli.train_settings import Train
from genalign.diffusion.policy import Policy
from genalign.runtime.distributed import own_device
from genalign.scoring.score import NamedReward
from genalign.training.memory_estimate import estimate_memory
from genalign.training.trainer import Trainer
from genalign.types import Conditioning, Prompt, PromptSet
from pipelines import SD3
from pipelines.meta_device import outline_of
from scripts.benchmarks import flops
from scripts.benchmarks.published_results import Measurement, ratios, write_results
from scripts.benchmarks.published_sizes import default_dtype, sd35_medium
from scripts.benchmarks.trained_runs import head

RESULTS, AUTOCAST = Path("docs/results"), torch.bfloat16
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s of cards by a part of their names, from the makers' data sheets."""


@dataclass(frozen=True)
class Workload:
    """The sizes of the network and of a round that are measured.

    Attributes:
        blocks: Blocks of each kind; None for all.
        pixels: The side of an image.
        text_tokens: Tokens of T5.
        prompts: Prompts in a round.
        rounds: Rounds that are timed.
        positions: The side of the network's grid of positions.
    """

    blocks: int | None = None
    pixels: int = 512
    text_tokens: int = 128
    prompts: int = 16
    rounds: int = 5
    positions: int = 384


SIZES = {"full": Workload(), "tiny": Workload(blocks=1, pixels=32, text_tokens=3, prompts=2, rounds=1, positions=8)}


class Embedded(SD3):
    """SD3 with random embeddings in place of its text encoders."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        rows = self.longest_conditioning(len(prompts))
        return Conditioning({name: torch.randn(tensor.shape, dtype=tensor.dtype) for name, tensor in rows.items()})

    def unconditional_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def places(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward of the samples' places in their batch, so that every sample has credit."""
    return torch.linspace(-1, 1, len(samples))


def open_randomly(device: torch.device, size: Workload, dtype: torch.dtype, options: Mapping[str, Any]) -> Embedded:
    """Build SD3.5 Medium on ``device`` with random weights, without text encoders."""
    with default_dtype(dtype), device:
        pipe = sd35_medium(size.blocks, texts=False, positions=size.positions)
    return Embedded(
        pipe,
        device=str(device),
        height=size.pixels,
        width=size.pixels,
        max_sequence_length=size.text_tokens,
        **options,
    )


def settings_of(size: Workload) -> Train:
    """The preset for one GPU, at this size."""
    settings = flops.training_settings(assets.preset(flops.ONE_GPU))
    model = replace(settings.model, height=size.pixels, width=size.pixels, max_sequence_length=size.text_tokens)
    training = replace(settings.training, rounds=10**6, prompts_per_round=size.prompts)
    if size.blocks is not None:
        training = replace(training, group_size=2, batch_size=2, micro_batch=2)
    return replace(settings, model=model, training=training)


class OurRounds:
    """Training by genalign; a call makes a round."""

    def __init__(self, pipeline: Embedded, settings: Train) -> None:
        policy = Policy(pipeline.denoiser, settings.lora)
        prompts = PromptSet.of([str(number) for number in range(settings.training.prompts_per_round or 1)])
        self.trainer = Trainer(pipeline, policy, places, prompts, settings.recipe, settings.training, settings.sampling)
        self.updates = self.trainer.settings.updates_per_round
        self.samples = sum(self.trainer.learner.batch_sizes)
        self._rounds = self.trainer.rounds()
        self.learning = 0.0  # seconds of the last round
        learn = self.trainer.learner.learn

        def timed(*arguments: Any) -> Any:
            synchronize(pipeline.device)
            began = time.perf_counter()
            result = learn(*arguments)
            synchronize(pipeline.device)
            self.learning = time.perf_counter() - began
            return result

        self.trainer.learner.learn = timed  # type: ignore[method-assign]  # a clock around one method of this instance

    def __call__(self) -> None:
        next(self._rounds)


class PlainRounds:
    """As many calls of the network as in our rounds, made plainly; a call makes a round."""

    def __init__(self, ours: OurRounds, pipeline: Embedded) -> None:
        trainer = ours.trainer
        self.pipeline, self.trainer = pipeline, trainer
        self.trained = len(trainer.recipe.steps(pipeline.path, trainer.grid, 0, 0))
        self.optimizer = torch.optim.AdamW(trainer.policy.parameters, lr=1e-9)
        self.sizes, self.updates = trainer.learner.batch_sizes, ours.updates

    def __call__(self) -> None:
        transformer, device, dtype = self.pipeline.denoiser, self.pipeline.device, self.pipeline.denoiser.dtype
        batches = []
        for size in self.sizes:
            x = torch.randn(size, *self.pipeline.latent_shape, device=device)
            texts = self.pipeline.longest_conditioning(size)
            with torch.no_grad():
                for step in self.trainer.grid:
                    x = x + 0.1 * self._velocity(transformer, x, step.timestep, texts, dtype)
            with torch.no_grad():
                self.pipeline.decode(x)
            batches.append((x, texts))
        per_update = len(batches) // self.updates
        for update in range(self.updates):
            for x, texts in batches[update * per_update : (update + 1) * per_update]:
                for begin in range(0, len(x), self.trainer.learner.micro_batch):
                    rows = slice(begin, begin + self.trainer.learner.micro_batch)
                    part = {name: tensor[rows] for name, tensor in texts.items()}
                    for step in list(self.trainer.grid)[: self.trained]:
                        output = self._velocity(transformer, x[rows], step.timestep, part, dtype)
                        torch.autograd.backward(output.square().mean())
            torch.nn.utils.clip_grad_norm_(self.trainer.policy.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _velocity(
        self, transformer: Any, x: Tensor, timestep: Tensor, texts: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        autocast = self.pipeline.autocast
        mixed: AbstractContextManager[object] = nullcontext()
        if autocast is not None:
            mixed = torch.autocast(x.device.type, autocast)
        with mixed:
            velocity: Tensor = transformer(
                hidden_states=x.to(dtype),
                timestep=timestep.float().to(x.device).expand(len(x)),
                encoder_hidden_states=texts["context"],
                pooled_projections=texts["pooled"],
                return_dict=False,
            )[0]
        return velocity.float()


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed_rounds(
    contenders: Mapping[str, Callable[[], None]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of rounds that are made in turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            synchronize(device)
            began = time.perf_counter()
            contender()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def estimated_peak(settings: Train, size: Workload, dtype: torch.dtype) -> float:
    """The peak of ``genalign plan`` for a round of this size, in bytes, but for the encoding of texts."""
    with torch.device("meta"):
        pipe = sd35_medium(size.blocks, positions=size.positions)
    pixels = {"height": size.pixels, "width": size.pixels, "max_sequence_length": size.text_tokens}
    outline = outline_of(pipe, SD3, dtype, autocast=AUTOCAST, memory=settings.model.memory, **pixels)
    prompts = PromptSet.of([str(number) for number in range(size.prompts)])
    fitted = settings.training.fit(prompts, settings.recipe.objective.unit)
    policy, rewards = Policy(outline.pipeline.denoiser, settings.lora), [NamedReward("places", places)]
    (estimate,) = estimate_memory(outline, policy, settings.recipe, fitted, settings.sampling, rewards).values()
    return max(peak for phase, peak in estimate.peaks.items() if phase != "encoding texts")


def card(device: torch.device) -> str:
    """The name of the card that is measured, for the result file."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def measure(device: torch.device, size: Workload) -> list[Measurement]:
    """Run rounds of ours and of the plain loop, and return what was measured."""
    settings, dtype = settings_of(size), torch.bfloat16
    options = {"autocast": AUTOCAST, "memory": replace(settings.model.memory, offload="none")}
    pipeline = open_randomly(device, size, dtype, options)
    ours = OurRounds(pipeline, settings)
    plain = PlainRounds(ours, pipeline)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ours()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    learning: list[float] = []

    def our_round() -> None:
        ours()
        learning.append(ours.learning / ours.updates)

    seconds = timed_rounds({"ours": our_round, "plain": plain}, device, size.rounds)
    hundred = replace(settings, training=replace(settings.training, rounds=100))  # with the choices of trained steps
    work = flops.our_flops(hundred, size.blocks) * ours.samples
    rows = [
        *(Measurement(name, "samples/s", ours.samples / value) for name, column in seconds.items() for value in column),
        *(Measurement("ours.update", "seconds a training step", value) for value in learning[1:]),
        *ratios("ours.over_plain", "seconds of a round over the plain loop's", seconds["ours"], seconds["plain"]),
        *(Measurement("ours.speed", "TFLOP/s of the model", work / value / 1e12) for value in seconds["ours"]),
    ]
    limit = next((value for name, value in PEAKS.items() if name in card(device)), None)
    if limit is not None:
        rows += [Measurement("ours.mfu", "model FLOPs utilization", work / value / limit) for value in seconds["ours"]]
    rows.append(
        Measurement(
            "ours.estimated_memory", "GB at the peak, by genalign plan", estimated_peak(settings, size, dtype) / 1e9
        )
    )
    if peak is not None:
        rows.append(Measurement("ours.memory", "GB at the peak, of the allocator", peak / 1e9))
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, and write the result file of the full size on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args(words)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device: run this on a GPU, or try it by --device cpu --size tiny", file=sys.stderr)
        return 2
    device = own_device(options.device)
    measured = measure(device, SIZES[options.size])
    for row in measured:
        print(f"{row.name:24s}{row.metric:44s}{row.value:10.4g}")
    if device.type == "cuda" and options.size == "full":
        claim = "Training of SD3.5 Medium's architecture with random weights at 512 pixels: speed and memory"
        described = {**head(claim, "python scripts/benchmarks/gpu.py"), "machine": card(device)}
        write_results(RESULTS, "gpu_sd35", described, measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
