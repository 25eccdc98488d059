"""Generated samples of this round and of earlier ones, of which each rank holds its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from genalign.runtime.media import eight_bits
from genalign.types import Prompt


@dataclass(frozen=True)
class SampleBatch:
    """The prompts of n samples of all ranks, and those of the samples (b, ...) that this rank holds.

    ``held`` are their numbers among the n, ascending or not; None for all of them, of a single rank. Whatever is drawn
    at random is drawn among all, equally on every rank.
    """

    samples: Tensor
    prompts: tuple[Prompt, ...]
    held: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.held is None:
            if len(self.samples) != len(self.prompts):
                raise ValueError(f"{len(self.samples)} samples have {len(self.prompts)} prompts: give one for each")
            object.__setattr__(self, "held", tuple(range(len(self.prompts))))
        elif len(self.samples) != len(self.held):
            raise ValueError(f"{len(self.samples)} samples have {len(self.held)} numbers: give one for each")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the samples of this rank."""
        assert self.held is not None
        return self.held

    @property
    def own_prompts(self) -> tuple[Prompt, ...]:
        """The prompts of the samples of this rank."""
        return tuple(self.prompts[number] for number in self.numbers)

    def rows(self, index: Sequence[int]) -> SampleBatch:
        """Select the samples of ``index``."""
        place = {number: i for i, number in enumerate(self.numbers)}
        held = [(new, place[old]) for new, old in enumerate(index) if old in place]
        samples = self.samples[[i for _, i in held]]
        return SampleBatch(samples, tuple(self.prompts[i] for i in index), tuple(new for new, _ in held))

    def joined(self, other: SampleBatch) -> SampleBatch:
        """Append the samples of ``other``."""
        held = (*self.numbers, *(len(self) + number for number in other.numbers))
        return SampleBatch(torch.cat([self.samples, other.samples]), self.prompts + other.prompts, held)

    def finite(self) -> SampleBatch:
        """Drop samples with NaN or infinity. Raises ValueError if none remains on any rank."""
        finite = torch.zeros(len(self), dtype=torch.long)
        finite[list(self.numbers)] = self.samples.isfinite().flatten(1).all(1).long().cpu()
        sum_over_ranks([finite])
        rows = finite.nonzero().flatten().tolist()
        if not rows:
            raise ValueError("no sample of this round is finite: the model has diverged, or decodes in half precision")
        return self if len(rows) == len(self) else self.rows(rows)


class ReplayBuffer:
    """The last ``capacity`` generated samples of all ranks, first in, first out; each rank stores its own on the CPU.

    Images (B, 3, H, W) are stored with the 8 bits of a picture file, other samples in float16.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.stored: SampleBatch | None = None

    def __len__(self) -> int:
        return 0 if self.stored is None else len(self.stored)

    def push(self, batch: SampleBatch) -> None:
        """Append samples and drop the oldest. Raises ValueError for samples of another shape."""
        if self.capacity == 0:
            return
        if len(batch) > self.capacity:
            batch = batch.rows(range(len(batch) - self.capacity, len(batch)))
        samples = batch.samples.detach()
        packed = eight_bits(samples).cpu() if samples.ndim == 4 else samples.to("cpu", torch.float16)
        joined = SampleBatch(packed, batch.prompts, batch.held)
        if self.stored is not None:
            old, new = (tuple(samples.shape[1:]) for samples in (self.stored.samples, joined.samples))
            if old != new:
                raise ValueError(f"samples were {old} and are now {new}: use one size per run")
            joined = self.stored.joined(joined)
        self.stored = joined.rows(range(max(0, len(joined) - self.capacity), len(joined)))

    def draw(self, count: int, generator: torch.Generator) -> SampleBatch | None:
        """Draw at most ``count`` different samples in float32; None where there are none."""
        if self.stored is None or count == 0:
            return None
        drawn = self.stored.rows(torch.randperm(len(self.stored), generator=generator)[:count].tolist())
        scale = 255 if drawn.samples.dtype == torch.uint8 else 1
        return SampleBatch(drawn.samples.float() / scale, drawn.prompts, drawn.held)

    def tensors(self) -> dict[str, Tensor]:
        """Return samples, the rank that holds each, and prompts as UTF-8 JSON, for a checkpoint.

        Every rank must call this; the samples of others are gathered by the main rank alone. Empty if nothing is
        stored.
        """
        if self.stored is None:
            return {}
        rows = [{"text": prompt.text, "metadata": prompt.metadata} for prompt in self.stored.prompts]
        text = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)
        held = torch.zeros(len(self.stored), dtype=torch.long)
        held[list(self.stored.numbers)] = rank()
        sum_over_ranks([held])
        samples = _gathered(self.stored, held)
        return {"prompts": text, "ranks": held} | ({} if samples is None else {"samples": samples})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors()`` of the main rank returned; each rank holds its own, of as many ranks as before."""
        if "samples" not in tensors:
            self.stored = None
            return
        rows = json.loads(bytes(tensors["prompts"].tolist()))
        prompts = tuple(Prompt(row["text"], row["metadata"]) for row in rows)
        own = [i for i, holder in enumerate(tensors["ranks"].tolist()) if holder % world_size() == rank()]
        self.stored = SampleBatch(tensors["samples"][own].cpu(), prompts, tuple(own))


def _gathered(batch: SampleBatch, ranks: Tensor) -> Tensor | None:
    """Gather the samples of all ranks in their order on the main rank; None on another."""
    if world_size() == 1:
        order = torch.tensor(batch.numbers).argsort()
        return batch.samples[order]
    counts = ranks.bincount(minlength=world_size()).tolist()
    padded = batch.samples.new_zeros(max(counts), *batch.samples.shape[1:])
    padded[: len(batch.samples)] = batch.samples[torch.tensor(batch.numbers, dtype=torch.long).argsort()]
    parts = [torch.empty_like(padded) for _ in counts] if rank() == 0 else None
    dist.gather(padded, parts, 0)
    if parts is None:
        return None
    samples = padded.new_empty(len(ranks), *padded.shape[1:])
    for holder, part in enumerate(parts):
        samples[ranks == holder] = part[: counts[holder]]
    return samples


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def rank() -> int:
    """Return the number of this rank."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks of the run, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
