"""Generated samples of this round and of earlier ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.types import Prompt


@dataclass(frozen=True)
class Batch:
    """Generated samples (B, ...) and their prompts."""

    samples: Tensor
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.prompts):
            raise ValueError(f"{len(self.samples)} samples have {len(self.prompts)} prompts: give one for each")

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Sequence[int]) -> Batch:
        """These rows."""
        return Batch(self.samples[list(index)], tuple(self.prompts[i] for i in index))

    def joined(self, other: Batch) -> Batch:
        """These samples, then those of ``other``."""
        return Batch(torch.cat([self.samples, other.samples]), self.prompts + other.prompts)

    def finite(self) -> Batch:
        """Without samples that hold NaN or infinity. Raises ValueError where none is left."""
        kept = self.samples.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        if not kept:
            raise ValueError(
                "no sample of this round is finite: the generator has diverged, or decodes in half precision"
            )
        return self if len(kept) == len(self) else self.rows(kept)


class Replay:
    """The last ``capacity`` generated samples, first in, first out; kept on the CPU in float16."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.kept: Batch | None = None

    def __len__(self) -> int:
        return 0 if self.kept is None else len(self.kept)

    def push(self, batch: Batch) -> None:
        """Add samples at the end; the oldest leave. Raises ValueError for samples of another shape."""
        if self.capacity == 0:
            return
        arrived = Batch(batch.samples.detach().to("cpu", torch.float16), batch.prompts)
        if self.kept is not None and self.kept.samples.shape[1:] != arrived.samples.shape[1:]:
            raise ValueError(
                f"samples were {tuple(self.kept.samples.shape[1:])} and are now {tuple(arrived.samples.shape[1:])}:"
                " keep one size per run"
            )
        joined = arrived if self.kept is None else self.kept.joined(arrived)
        self.kept = joined.rows(range(max(0, len(joined) - self.capacity), len(joined)))

    def draw(self, count: int, generator: torch.Generator) -> Batch | None:
        """At most ``count`` different samples in float32; None for none."""
        if self.kept is None or count == 0:
            return None
        drawn = self.kept.rows(torch.randperm(len(self.kept), generator=generator)[:count].tolist())
        return Batch(drawn.samples.float(), drawn.prompts)

    def tensors(self) -> dict[str, Tensor]:
        """Samples, and prompts as UTF-8 JSON; nothing where it is empty."""
        if self.kept is None:
            return {}
        rows = [{"text": prompt.text, "metadata": prompt.metadata} for prompt in self.kept.prompts]
        text = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)
        return {"samples": self.kept.samples, "prompts": text}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what ``tensors()`` gave."""
        if "samples" not in tensors:
            self.kept = None
            return
        rows = json.loads(bytes(tensors["prompts"].tolist()))
        self.kept = Batch(tensors["samples"].cpu(), tuple(Prompt(row["text"], row["metadata"]) for row in rows))
