"""Generated samples of this round and of earlier ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.types import Prompt


@dataclass(frozen=True)
class SampleBatch:
    """Generated samples (B, ...) and their prompts."""

    samples: Tensor
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.prompts):
            raise ValueError(f"{len(self.samples)} samples have {len(self.prompts)} prompts: give one for each")

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Sequence[int]) -> SampleBatch:
        """Select the samples of ``index``."""
        return SampleBatch(self.samples[list(index)], tuple(self.prompts[i] for i in index))

    def joined(self, other: SampleBatch) -> SampleBatch:
        """Append the samples of ``other``."""
        return SampleBatch(torch.cat([self.samples, other.samples]), self.prompts + other.prompts)

    def finite(self) -> SampleBatch:
        """Drop samples with NaN or infinity. Raises ValueError if none remains."""
        finite = self.samples.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        if not finite:
            raise ValueError("no sample of this round is finite: the model has diverged, or decodes in half precision")
        return self if len(finite) == len(self) else self.rows(finite)


class ReplayBuffer:
    """The last ``capacity`` generated samples, first in, first out, stored on the CPU in float16."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.stored: SampleBatch | None = None

    def __len__(self) -> int:
        return 0 if self.stored is None else len(self.stored)

    def push(self, batch: SampleBatch) -> None:
        """Append samples and drop the oldest. Raises ValueError for samples of another shape."""
        if self.capacity == 0:
            return
        joined = SampleBatch(batch.samples.detach().to("cpu", torch.float16), batch.prompts)
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
        return SampleBatch(drawn.samples.float(), drawn.prompts)

    def tensors(self) -> dict[str, Tensor]:
        """Return samples, and prompts as UTF-8 JSON, for a checkpoint; empty if nothing is stored."""
        if self.stored is None:
            return {}
        rows = [{"text": prompt.text, "metadata": prompt.metadata} for prompt in self.stored.prompts]
        text = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)
        return {"samples": self.stored.samples, "prompts": text}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors()`` returned."""
        if "samples" not in tensors:
            self.stored = None
            return
        rows = json.loads(bytes(tensors["prompts"].tolist()))
        self.stored = SampleBatch(tensors["samples"].cpu(), tuple(Prompt(row["text"], row["metadata"]) for row in rows))
