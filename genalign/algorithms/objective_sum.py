"""Weighted sums of objectives, each of which is a mean over the samples of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from genalign.algorithms.interfaces import (
    KLRegularized,
    Objective,
    ObjectiveTraits,
    PartMetrics,
    TermCounts,
    TermScales,
    Unit,
    UpdateBatch,
    UpdateContext,
    traits_of,
)
from genalign.diffusion.noise import derived_seed


@dataclass(frozen=True)
class ObjectivePart:
    """An objective of a sum: the name of its metrics, which are logged as ``name/metric``, and its weight."""

    name: str
    objective: Objective
    weight: float = 1.0


@dataclass(frozen=True)
class SumObjective:
    """The sum of the losses of several objectives, each times its weight.

    Each part takes means over its own terms, however many of them a sample has, so the weights apply to means. The
    logged loss is that of the sum, and ``kl`` is the mean of the distances that any part measures.

    Args:
        parts: The objectives, all on the same samples and credit; their names differ.
    """

    parts: Sequence[ObjectivePart]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if len(set(names)) < max(len(names), 1):
            raise ValueError(f"the parts of a sum of objectives need different names, not {names}")

    @property
    def unit(self) -> Unit:
        units = {part.objective.unit for part in self.parts}
        order: tuple[Unit, ...] = ("batch", "group", "sample")
        return next(unit for unit in order if unit in units)

    @property
    def clip_range(self) -> float | None:
        ranges = [part.objective.clip_range for part in self.parts if part.objective.clip_range is not None]
        return min(ranges, default=None)

    @property
    def traits(self) -> ObjectiveTraits:
        own = [traits_of(part.objective) for part in self.parts]
        guidance = [one.student_guidance for one in own if one.student_guidance is not None]
        return ObjectiveTraits(
            any(one.through_sampler for one in own),
            any(one.reward_gradients for one in own),
            guidance[0] if guidance else None,
        )

    def with_stronger_kl(self, minimum: float) -> SumObjective:
        """Strengthen the penalty of the first part that has one. Raises ValueError if none has."""
        for place, part in enumerate(self.parts):
            if isinstance(part.objective, KLRegularized):
                stronger = replace(part, objective=part.objective.with_stronger_kl(minimum))
                return SumObjective((*self.parts[:place], stronger, *self.parts[place + 1 :]))
        raise ValueError(
            "no part of this sum of objectives has a penalty on the distance from the reference policy: leave raise_kl"
            " out"
        )

    def terms(self, batch: UpdateBatch) -> TermCounts:
        """Count the terms of every part, and their sums."""
        own = tuple(part.objective.terms(batch) for part in self.parts)
        return TermCounts(sum(one.losses for one in own), sum(one.distances for one in own), own)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        """Accumulate the gradients of all parts, each with noise of its own.

        Args:
            context: The model, the sampler, the rewards and the metrics.
            batch: B samples with credit.
            scales: The factors of each part's summed losses and distances; those of the sum where there are no parts.
            seed: The seed of all noise.
        """
        own = scales.parts or (scales,) * len(self.parts)
        counted = next((place for place, scale in enumerate(own) if scale.losses), 0)
        for place, (part, scale) in enumerate(zip(self.parts, own, strict=True)):
            share = part.weight * scale.losses / own[counted].losses if own[counted].losses else 0.0
            metrics = PartMetrics(context.metrics, part.name, share, counted=place == counted)
            named = derived_seed(seed, part.name)
            part.objective.backward(replace(context, metrics=metrics), batch, scale.times(part.weight), named)
