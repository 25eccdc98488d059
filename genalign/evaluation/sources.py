"""Where the samples of an evaluation come from: a pipeline, or the files of another program.

A source divides its samples into numbered batches, and a batch is the same whichever process makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from genalign.diffusion.rollout import SeededSamples
from genalign.diffusion.transitions import ODE, Kernel
from genalign.evaluation.evaluate import EvaluationProtocol, SampleSpec
from genalign.types import Grid, Pipeline

_TEXTS_AT_ONCE = 512  # that are encoded and held at once; embeddings of large text encoders take megabytes each


@dataclass(frozen=True)
class SourceBatch:
    """Samples (B, ...) of B specs, and their files if they are saved already."""

    specs: Sequence[SampleSpec]
    samples: Tensor
    files: Sequence[Path] | None = None


class SampleSource(Protocol):
    """All samples of an evaluation."""

    @property
    def specs(self) -> Sequence[SampleSpec]:
        """The samples in the order of the records."""

    @property
    def batch_size(self) -> int:
        """The number of samples of every batch but the last."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def batch(self, number: int) -> Iterator[SourceBatch]:
        """Make the samples of a batch, in the order of ``specs``; those of different shapes come separately."""


class PipelineSource:
    """Samples of a pipeline by a kernel.

    Args:
        pipeline: The model in its present state.
        specs: Prompts and noise indices, as from ``plan_samples``.
        protocol: Noise levels, guidance and batch size.
        kernel: The move of every step, which the protocol names.

    Raises:
        ValueError: The pipeline samples on other noise levels, or by another kernel, than the protocol's.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        specs: Sequence[SampleSpec],
        protocol: EvaluationProtocol,
        kernel: Kernel = ODE(),  # noqa: B008  # frozen
    ) -> None:
        if repr(kernel) != protocol.kernel:
            raise ValueError(f"the protocol names the kernel {protocol.kernel}, not {kernel}: make it of this one")
        self.kernel = kernel
        self.pipeline, self.specs, self.batch_size = pipeline, specs, protocol.batch_size
        self._grid, self._guidance = _protocol_grid(pipeline, protocol), protocol.guidance
        self._starts = _chunk_starts(specs, self.batch_size)
        self._chunks: dict[int, SeededSamples] = {}  # the first and the last one that was used

    def __len__(self) -> int:
        return -(-len(self.specs) // self.batch_size)

    def batch(self, number: int) -> Iterator[SourceBatch]:
        """Generate a batch of one shape."""
        chunk = sum(start <= number for start in self._starts) - 1
        # The texts of the first chunk are encoded before any others, as an embedding's last bits depend on the order
        for needed in {0, chunk} - self._chunks.keys():
            self._chunks = {k: part for k, part in self._chunks.items() if k == 0}
            first, last = self._starts[needed], (*self._starts[needed + 1 :], len(self))[0]
            specs = self.specs[first * self.batch_size : last * self.batch_size]
            prompts, seeds = [spec.prompt for spec in specs], [spec.seed for spec in specs]
            self._chunks[needed] = SeededSamples(
                self.pipeline, prompts, seeds, self._grid, self._guidance, self.batch_size, self.kernel
            )
        samples = self._chunks[chunk].batch(number - self._starts[chunk])
        yield SourceBatch(self.specs[number * self.batch_size : (number + 1) * self.batch_size], samples)


def _chunk_starts(specs: Sequence[SampleSpec], size: int) -> list[int]:
    """Divide batches of ``size`` specs into chunks of at most ``_TEXTS_AT_ONCE`` texts, and return their first ones."""
    starts, texts = [0], set[str]()
    for number in range(-(-len(specs) // size)):
        new = {spec.prompt.text for spec in specs[number * size : (number + 1) * size]}
        if texts and len(texts | new) > _TEXTS_AT_ONCE:
            starts.append(number)
            texts = set()
        texts |= new
    return starts


def _protocol_grid(pipeline: Pipeline, protocol: EvaluationProtocol) -> Grid:
    """Return the pipeline's grid on the protocol's sigmas; raise ValueError if the pipeline shifts them again."""
    grid = pipeline.grid(len(protocol.sigmas) - 1, protocol.sigmas[:-1])
    expected = torch.tensor(protocol.sigmas, dtype=torch.float64)
    if grid.sigma.shape != expected.shape or not torch.allclose(grid.sigma, expected, rtol=0, atol=1e-6):
        raise ValueError(
            f"the pipeline samples on sigmas {grid.sigma.tolist()}, the protocol says {list(protocol.sigmas)}: "
            "make the protocol from pipeline.grid(...).sigma, final 0 included"
        )
    return grid


@dataclass(frozen=True)
class FileSource:
    """Samples that another program saved, which ``read`` returns by path; they may differ in shape.

    The noises are unknown, so the number of a sample among those of its prompt stands for its noise.
    """

    specs: Sequence[SampleSpec]
    files: Sequence[Path]
    read: Callable[[Path], Tensor]
    batch_size: int
    device: str = "cpu"

    def __len__(self) -> int:
        return -(-len(self.specs) // self.batch_size)

    def batch(self, number: int) -> Iterator[SourceBatch]:
        """Read the samples of a batch. Raises ValueError or FileNotFoundError as ``read``."""
        rows = range(len(self.specs))[number * self.batch_size : (number + 1) * self.batch_size]
        loaded = [(row, self.read(self.files[row])) for row in rows]
        for _, group in groupby(loaded, key=lambda item: item[1].shape):
            numbers, samples = zip(*group, strict=True)
            specs, files = [self.specs[row] for row in numbers], [self.files[row] for row in numbers]
            yield SourceBatch(specs, torch.stack(samples).to(self.device), files)
