"""Rollouts and replays on the tiny SD3 pipeline."""

from __future__ import annotations

import pytest
import torch

from genalign.diffusion.rollout import (
    ReplayBatch,
    RolloutInputs,
    generate,
    kernel_per_step,
    replay,
    rollout,
    step_noise,
)
from genalign.diffusion.transitions import CPS, ODE, FlowSDE, Kernel, transition
from genalign.scoring.budget import Ledger, Metered
from pipelines import SD3
from tests.genalign.diffusion.rollouts import five_steps, inputs, sample


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), CPS(0.8)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_on_policy_log_ratio_is_exactly_zero(tiny: SD3, kernel: Kernel, guidance: float) -> None:
    sampled = sample(tiny, (1, 2), True, guidance, kernel)
    for stored in range(2):
        again = replay(tiny, sampled, five_steps(tiny), kernel, ReplayBatch.of_step(stored, 6), guidance)
        assert torch.equal(again.log_ratio, torch.zeros(6))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_pairs_of_several_steps_are_replayed_alike(tiny: SD3, guidance: float) -> None:
    sampled = sample(tiny, (1, 2, 3), guidance=guidance)
    live = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    parts = ReplayBatch.batches(live)
    assert [(len(part.rows), part.count) for part in parts] == [(6, 6), (6, 1)]
    pairs_seen = torch.cat([torch.stack(part.index, dim=1) for part in parts])
    assert sorted(pairs_seen.tolist()) == live.nonzero().tolist()
    for pairs in parts:
        again = replay(tiny, sampled, five_steps(tiny), FlowSDE(0.7), pairs, guidance)
        # a sample's place in the batch may decide which way of adding up it meets
        torch.testing.assert_close(again.log_ratio, torch.zeros(pairs.count), rtol=0, atol=1e-7)
        rows, stored = pairs.index
        step, x = five_steps(tiny)[torch.tensor([1, 2, 3])[stored]], sampled.x[pairs.index]
        expected = transition(tiny.path, FlowSDE(0.7), x, sampled.prediction[rows, stored], step)
        assert torch.equal(again.old.mean, expected.mean) and torch.equal(again.x_next, sampled.x_next[pairs.index])


def test_pairs_are_left_out_only_where_that_saves_a_batch() -> None:
    few = torch.tensor([[True, False], [True, False], [False, True], [False, False]])
    (only,) = ReplayBatch.batches(few)
    assert only.count == 3 and only.rows.tolist() == [0, 1, 2, 0] and only.stored.tolist() == [0, 0, 1, 0]
    more = torch.tensor([[True, True], [True, True], [False, True], [False, False]])
    assert [(part.count, part.rows.tolist()) for part in ReplayBatch.batches(more)] == [(4, [0, 1, 2, 3])] * 2
    assert ReplayBatch.batches(torch.zeros(4, 2, dtype=torch.bool)) == []


def test_only_the_window_is_stored(tiny: SD3) -> None:
    sampled = sample(tiny, (1, 2))
    assert sampled.steps == (1, 2)
    assert sampled.levels == (1, 2, 3) and sampled.states.shape == (6, 3, 4, 16, 16)
    assert sampled.x.shape == sampled.x_next.shape == sampled.prediction.shape == (6, 2, 4, 16, 16)
    assert torch.equal(sampled.x[:, 1], sampled.x_next[:, 0])
    assert sample(tiny, ()).x.numel() == 0


def test_the_shared_prefix_is_computed_once_and_changes_nothing(tiny: SD3) -> None:
    metered = Metered(tiny, Ledger())
    together = sample(tiny, (2,), shared=True, metered=metered)
    assert metered.ledger.nfe == 2 * 2 + 3 * 6
    assert torch.equal(together.x[0], together.x[1]) and torch.equal(together.x[3], together.x[5])
    assert not torch.allclose(together.final[0], together.final[1])
    for row, part in enumerate(inputs(tiny, True).split(1)):
        alone = rollout(tiny, part, five_steps(tiny), kernel_per_step(FlowSDE(0.7), (2,), 5), 1.0)
        torch.testing.assert_close(alone.final[0], together.final[row], rtol=0, atol=1e-4)


def test_step_noise_depends_on_seed_and_step_alone() -> None:
    like = torch.zeros(3, 2, 2)
    noise = step_noise([4, 5, 6], 3, like)
    assert torch.equal(noise[1], step_noise([5], 3, like[:1])[0])
    assert not torch.equal(noise[1], step_noise([5], 2, like[:1])[0])
    many = step_noise(list(range(2000)), 0, torch.zeros(2000, 8))
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03


def test_lengths_are_checked(tiny: SD3) -> None:
    with pytest.raises(ValueError, match="one entry per sample"):
        RolloutInputs(tiny.encode(["a circle"]), torch.tensor([0, 0]), (1, 2), (1,))
    with pytest.raises(ValueError, match="the grid has 5 steps, got 4 kernels"):
        rollout(tiny, inputs(tiny, False), five_steps(tiny), [ODE()] * 4, 1.0)


def test_generate_does_not_depend_on_the_batch(tiny: SD3) -> None:
    texts = ["a circle", "two squares", "a circle"]
    whole, parts = (torch.cat(list(generate(tiny, texts, [1, 2, 3], five_steps(tiny), 1.0, size))) for size in (3, 2))
    assert whole.shape == (3, 3, 64, 64)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)
