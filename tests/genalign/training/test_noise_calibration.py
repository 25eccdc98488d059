"""Reward-aware noise levels on the tiny pipeline."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.recipe import Recalibration
from genalign.algorithms.recipe_changes import with_recalibration
from genalign.algorithms.recipes import dense_grpo, flow_grpo
from genalign.diffusion.transitions import CPS, CalibratedSDE, DanceSDE, FlowSDE, trainable_steps
from genalign.scoring.score import NamedReward
from genalign.training.noise_calibration import (
    Calibration,
    MovingNoise,
    calibrate,
    calibrated,
    initial_levels,
    moved_levels,
    save_kernel,
)
from genalign.training.sampler import Sampler
from genalign.training.settings import TrainerSettings
from genalign.types import Prompt, PromptSet, RewardFunction
from pipelines import SD3
from tests.genalign.training.toy_runs import SAMPLING, SETTINGS, toy_trainer

PROMPTS = (Prompt("a circle"), Prompt("two squares"))
SIGMAS = (1.0, 0.75, 0.5, 0.25)


def _calibrated(tiny: SD3, reward: RewardFunction, iterations: int) -> CalibratedSDE:
    settings = TrainerSettings(prompts_per_round=2, group_size=8, batch_size=16, updates_per_round=1)
    fitted, rewards = settings.fit(PromptSet("two", PROMPTS), "sample"), [NamedReward("reward", reward)]
    sampler = Sampler(tiny, rewards, tiny.grid(4, SIGMAS), 1.0, fitted, keep_samples=False)
    *_, last = calibrate(sampler, flow_grpo(), repeat(PROMPTS), Calibration(iterations=iterations, step=0.1))
    return last


def test_initial_levels_are_those_of_flow_sde(tiny: SD3) -> None:
    grid = tiny.grid(4, SIGMAS)
    kernel = CalibratedSDE(tuple(initial_levels(grid).tolist()), tuple(grid.sigma.tolist()), 1.0, ("r",))
    for i in range(4):
        ours, expected = kernel(grid[i]), FlowSDE(0.7)(grid[i])
        assert float(ours.c) == pytest.approx(float(expected.c)) and float(ours.s) == pytest.approx(float(expected.s))


def test_noise_that_only_harms_is_lowered_to_its_bound(small: SD3) -> None:
    calls = iter(range(10_000))

    def falling(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        # A batch is scored as a whole first, then the completions of its states from the noisiest on.
        place = next(calls) % (len(trainable_steps(FlowSDE(), small.grid(4, SIGMAS))) + 1)
        return torch.full((len(samples),), -100.0 if place == 0 else -float(place))

    last, grid = _calibrated(small, falling, 12), small.grid(4, SIGMAS)
    trained = trainable_steps(last, grid)
    assert all(last.levels[i] < 0.7 * float(initial_levels(grid)[i]) for i in trained)
    untrained = set(range(4)) - set(trained)
    assert all(last.levels[i] == pytest.approx(float(initial_levels(grid)[i])) for i in untrained)


def test_levels_move_by_the_balance_of_gains_and_losses() -> None:
    levels, first = torch.ones(4).double(), torch.ones(4).double()
    gains = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 2.0, 0.0], [3.0, 1.0, 0.0], [-2.0, 1.0, 0.0]])
    settings = Calibration(step=0.25, bounds=(0.8, 3.0))
    moved = moved_levels(levels, first, (0, 2, 3), gains, settings)
    assert moved.tolist() == [1.25, 1.0, 0.8, 1.0]  # balanced, not sampled, only gains (to the bound), none


def test_without_gains_nothing_moves(tiny: SD3) -> None:
    last = _calibrated(tiny, lambda samples, _: torch.ones(len(samples)), 2)
    assert last.levels == pytest.approx(initial_levels(tiny.grid(4, SIGMAS)).tolist())


def _stepwise(gains: Sequence[Sequence[float]]) -> RoundScores:
    """The scores of a round by two rewards: the first has the ``gains`` (N, S), the second only reports."""
    scores = torch.cat([torch.zeros(len(gains), 1), torch.tensor(gains).cumsum(1)], 1)
    stepwise = torch.stack([scores, torch.randn(scores.shape)], 2)
    return RoundScores(stepwise[:, -1], (2.0, 0.0), torch.zeros(len(gains)).long(), stepwise)


def test_levels_move_after_every_nth_round_and_come_back_from_the_state(tiny: SD3) -> None:
    grid = tiny.grid(4, SIGMAS)

    def moving() -> MovingNoise:
        return MovingNoise(Recalibration(every=2, step=0.25), DanceSDE(0.4), grid, 1.0, ("red",))

    noise, scores = moving(), _stepwise([[1.0, 1.0], [-1.0, 2.0], [3.0, 1.0], [-2.0, 1.0]])
    assert noise.after_round(0, (0, 2), scores) == pytest.approx({"noise_level/0": 0.4, "noise_level/2": 0.4})
    assert noise.kernel == DanceSDE(0.4)  # not yet
    restored = moving()
    restored.restore(noise.state())
    assert restored.kernel == DanceSDE(0.4)
    assert noise.after_round(1, (0, 2), scores) == pytest.approx({"noise_level/0": 0.5, "noise_level/2": 0.3})
    assert isinstance(noise.kernel, CalibratedSDE) and noise.kernel.levels == pytest.approx((0.5, 0.4, 0.3, 0.4))
    restored.restore(noise.state())
    assert restored.kernel == noise.kernel and torch.equal(restored.levels, noise.levels)
    noise.kernel.check(1.0, ["red"])


def test_a_level_does_not_rise_to_where_its_step_is_lost(tiny: SD3) -> None:
    grid, first = tiny.grid(4, SIGMAS), FlowSDE(1.2)
    noise = MovingNoise(Recalibration(step=0.4), first, grid, 1.0, ("red",))
    trained = trainable_steps(first, grid)
    for index in range(2):
        noise.after_round(index, trained, _stepwise([[1.0] * len(trained), [-1.0] * len(trained)]))
    assert trainable_steps(noise.kernel, grid) == trained
    raised = noise.levels > noise.first
    assert bool(raised.any()) and not bool(raised[list(trained)].all())


def test_training_samples_with_the_moved_levels_at_no_cost(tiny: SD3) -> None:
    recipe = dense_grpo(FlowSDE(0.9), window=2)
    first, second = toy_trainer(copy.deepcopy(tiny), with_recalibration(recipe, step=0.5)).rounds()
    levels = [result.metrics[name] for result in (first, second) for name in result.metrics if "noise_level" in name]
    rates = initial_levels(SAMPLING.grid(tiny), 0.9).tolist()
    assert len(levels) == 4 and not {round(level, 9) for level in levels} <= {round(rate, 9) for rate in rates}
    assert second.log_ratio_max == 0.0  # replayed with the kernel that sampled
    plain, same = (toy_trainer(copy.deepcopy(tiny), own) for own in (recipe, with_recalibration(recipe, every=3)))
    for expected, result in zip(plain.rounds(), same.rounds(), strict=True):
        assert (result.loss, result.nfe, result.calls) == (expected.loss, expected.nfe, expected.calls)


def test_a_recalibration_that_could_not_work_is_refused(tiny: SD3) -> None:
    with pytest.raises(ValueError, match="choose a recipe with a completion, such as dense_grpo"):
        with_recalibration(flow_grpo())
    with pytest.raises(ValueError, match="every of at least 1"):
        with_recalibration(dense_grpo(), every=0)
    with pytest.raises(ValueError, match=r"CPS\(eta=0\.8\) has no noise rate to recalibrate: choose FlowSDE"):
        toy_trainer(tiny, with_recalibration(dense_grpo(CPS(0.8))), settings=SETTINGS)


def test_a_kernel_comes_back_from_its_file_and_refuses_other_circumstances(tiny: SD3, tmp_path: Path) -> None:
    grid = tiny.grid(4, SIGMAS)
    kernel = CalibratedSDE((0.5, 0.4, 0.3, 0.2), tuple(grid.sigma.tolist()), 1.0, ("partial",))
    save_kernel(kernel, tmp_path / "psi.json")
    assert calibrated(str(tmp_path / "psi.json")) == kernel
    with pytest.raises(ValueError, match=r"calibrated on the grid .* run genalign calibrate on this one"):
        kernel(tiny.grid(4, (1.0, 0.8, 0.5, 0.25))[1])
    with pytest.raises(ValueError, match=r"calibrated with guidance 1\.0 and rewards partial, not with 4\.5"):
        kernel.check(4.5, ["partial"])
    with pytest.raises(ValueError, match="run genalign calibrate again"):
        kernel.check(1.0, ["strict"])
    (tmp_path / "other.json").write_text(json.dumps({"levels": [1]}))
    with pytest.raises(ValueError, match=r"other\.json is not a calibration"):
        calibrated(str(tmp_path / "other.json"))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 2 iterations"):
        Calibration(iterations=1)
