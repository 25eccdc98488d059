"""Sums of objectives: each part is a mean over its own terms, and the loop treats the sum as its strictest part."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from genalign.algorithms.interfaces import (
    MetricSums,
    Objective,
    ObjectiveTraits,
    TermCounts,
    TermScales,
    Unit,
    UpdateBatch,
    UpdateContext,
    traits_of,
    with_stronger_kl,
)
from genalign.algorithms.matching import MatchingObjective
from genalign.algorithms.matching_losses import DPOLoss, KTOLoss, RewardWeightedLoss
from genalign.algorithms.objective_sum import ObjectivePart, SumObjective
from genalign.algorithms.pathwise import PathwiseObjective
from genalign.algorithms.tails import Chain
from genalign.algorithms.trajectory import CoupledObjective, PRDPLoss
from genalign.diffusion.transitions import ODE
from pipelines import SD3
from tests.genalign.algorithms.updates import flat_gradient, update_batch, update_context

SFT, DPO = MatchingObjective(RewardWeightedLoss(), draws=1), MatchingObjective(DPOLoss(10.0), draws=2, anchor=0.1)
KTO = MatchingObjective(KTOLoss(10.0))


def summed(*parts: tuple[Objective, float]) -> SumObjective:
    return SumObjective([ObjectivePart(f"part{place}", *part) for place, part in enumerate(parts)])


def test_the_gradient_of_a_sum_is_that_of_its_means(tiny: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts have 2 and 2 x 1 terms, and 4 and 8 distances: each is divided by its own."""
    monkeypatch.setattr("genalign.algorithms.objective_sum.derived_seed", lambda seed, name: seed)
    context = update_context(tiny, ODE())
    batch, both = update_batch(context), summed((SFT, 0.5), (DPO, 2.0))
    counts = both.terms(batch)
    assert counts.parts == (TermCounts(2, 4), TermCounts(2, 8)) and (counts.losses, counts.distances) == (4, 12)
    assert TermCounts.from_list((counts + counts).as_list()).parts == (TermCounts(4, 8), TermCounts(4, 16))
    both.backward(context, batch, TermScales.of_means(counts), seed=3)
    together, metrics, loss = flat_gradient(context), context.metrics, 0.0
    expected = torch.zeros_like(together)
    for part, weight in ((SFT, 0.5), (DPO, 2.0)):
        alone = replace(context, metrics=MetricSums())
        part.backward(alone, batch, TermScales.of_means(part.terms(batch)), seed=3)
        expected += weight * flat_gradient(context)
        loss += weight * alone.metrics.mean("loss")
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-8)
    assert metrics.mean("loss") == pytest.approx(loss, rel=1e-6)
    assert {"part0/loss", "part1/loss", "part1/kl"} <= metrics.means().keys()
    assert metrics.sizes["kl"] == metrics.sizes["part0/kl"] + 8


def test_micro_batches_of_a_sum_add_up(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    batch, both = update_batch(context), summed((SFT, 0.5), (DPO, 2.0))
    scales = TermScales.of_means(both.terms(batch))
    both.backward(context, batch, scales, seed=3)
    whole, loss = flat_gradient(context), context.metrics.mean("loss")
    apart = replace(context, metrics=MetricSums())
    for part in batch.split(2):
        both.backward(apart, part, scales, seed=3)
    torch.testing.assert_close(flat_gradient(context), whole, rtol=1e-4, atol=1e-8)
    assert apart.metrics.mean("loss") == pytest.approx(loss, rel=1e-5)


def test_without_distances_no_part_holds_to_the_reference(tiny: SD3) -> None:
    context = update_context(tiny, ODE())
    batch, both = update_batch(context), summed((SFT, 1.0), (replace(SFT, anchor=3.0), 1.0))
    scales = TermScales.of_means(both.terms(batch))
    both.backward(context, batch, scales.without_distances(), seed=3)
    loose = flat_gradient(context)
    both.backward(context, batch, scales, seed=3)
    assert not torch.allclose(flat_gradient(context), loose)
    summed((SFT, 1.0), (SFT, 1.0)).backward(context, batch, scales, seed=3)
    torch.testing.assert_close(flat_gradient(context), loose)


def test_a_sum_is_as_strict_as_its_strictest_part() -> None:
    pathwise, coupled = PathwiseObjective(Chain()), CoupledObjective(PRDPLoss(1e-2, 1e-3))
    assert summed((SFT, 1.0), (DPO, 1.0)).unit == "group" and summed((DPO, 1.0), (KTO, 1.0)).unit == "batch"
    assert summed((SFT, 1.0), (coupled, 1.0)).clip_range == coupled.clip_range
    assert summed((SFT, 1.0)).clip_range is None
    assert traits_of(summed((SFT, 1.0), (DPO, 1.0))) == ObjectiveTraits() == traits_of(SFT)
    assert traits_of(summed((SFT, 1.0), (pathwise, 1.0))) == traits_of(pathwise) == ObjectiveTraits(True, True)


class Bare:
    """An objective without any of the optional abilities."""

    unit: ClassVar[Unit] = "sample"
    clip_range: ClassVar[float | None] = None

    def terms(self, batch: UpdateBatch) -> TermCounts:
        return TermCounts(len(batch), 0)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        raise NotImplementedError


def test_the_first_part_that_can_strengthens_its_penalty() -> None:
    both = summed((Bare(), 1.0), (DPO, 1.0), (SFT, 1.0))
    stronger = with_stronger_kl(both, 0.5)
    assert isinstance(stronger, SumObjective)
    assert [part.objective for part in stronger.parts] == [both.parts[0].objective, replace(DPO, anchor=0.5), SFT]
    alone = summed((Bare(), 1.0))
    with pytest.raises(ValueError, match="no part of this sum of objectives has a penalty"):
        with_stronger_kl(alone, 0.5)


def test_parts_need_names_of_their_own() -> None:
    for parts in ([], [ObjectivePart("one", SFT), ObjectivePart("one", DPO)]):
        with pytest.raises(ValueError, match="need different names"):
            SumObjective(parts)
