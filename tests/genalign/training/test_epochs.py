"""Passes over a round's samples: what each update sees, and that PRDP needs them to reach its optimum."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genalign.algorithms.interfaces import UpdateBatch
from genalign.algorithms.matching import MatchingObjective
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipes import awm, flow_grpo, nft, prdp
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import Rollout, RolloutInputs, kernel_per_step
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE, Kernel, transition
from genalign.scoring.score import NamedReward
from genalign.training.epochs import shuffled, updates_of_round
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Conditioning, NoiseLevel, Prompt, PromptSet
from pipelines import SD3
from tests.genalign.search.tiny_searches import Gauss
from tests.genalign.training.toy_runs import SETTINGS, toy_trainer


def numbered(start: int, count: int, group_size: int) -> UpdateBatch:
    """A batch whose samples carry their number in the round as credit, as seed and in every tensor."""
    rows = torch.arange(start, start + count)
    values = rows.float()[:, None]
    inputs = RolloutInputs(Conditioning({"text": torch.zeros(99, 1)}), rows, tuple(rows.tolist()), tuple(rows.tolist()))
    rollout = Rollout(inputs, (0,), values[:, None].expand(-1, 2, -1), values[:, None], values)
    return UpdateBatch(rollout, rows.float(), rows // group_size, False)


SIZES = (12, 8, 4, 0)  # of the batches of all ranks
BATCHES = {0: numbered(0, 12, 4), 1: numbered(12, 8, 4), 2: numbered(20, 4, 4)}


def rows_of(batch: UpdateBatch) -> list[int]:
    """The numbers of a batch's samples, which all of its parts must agree on."""
    rows = batch.credit.long().tolist()
    inputs = batch.rollout.inputs
    assert rows == inputs.prompt.tolist() == list(inputs.noise_seeds) == list(inputs.step_seeds)
    for tensor in batch.rollout.tensors().values():
        assert torch.equal(tensor.flatten(1)[:, 0], batch.credit)
    assert batch.group.tolist() == [row // 4 for row in rows]
    return rows


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_every_sample_is_in_one_update(unit: int, updates: int) -> None:
    parts = list(shuffled(BATCHES, SIZES, updates, unit, seed=1))
    rows = [[row for batch in part.values() for row in rows_of(batch)] for part in parts]
    assert sorted(itertools.chain(*rows)) == list(range(24))
    assert max(map(len, rows)) - min(map(len, rows)) <= unit
    if unit == 4:
        assert all(part[::4] == [row // 4 * 4 for row in part[::4]] for part in rows)  # groups are whole
    again, other = (list(shuffled(BATCHES, SIZES, updates, unit, seed=seed)) for seed in (1, 2))
    assert [[rows_of(batch) for batch in part.values()] for part in again] == [
        [rows_of(batch) for batch in part.values()] for part in parts
    ]
    if updates > 1:
        assert [list(part) for part in other] != [list(part) for part in parts] or any(
            rows_of(one[number]) != rows_of(two[number])
            for one, two in zip(other, parts, strict=True)
            for number in one
        )


def test_more_updates_than_groups_leave_some_without_samples() -> None:
    parts = list(shuffled({0: numbered(0, 8, 4)}, (8,), 3, 4, seed=0))
    assert sorted(len(part) for part in parts) == [0, 1, 1]


def test_ranks_have_their_samples_of_the_updates_of_one_process() -> None:
    whole = list(shuffled(BATCHES, SIZES, 2, 1, seed=3))
    first, second = (list(shuffled({n: BATCHES[n] for n in own}, SIZES, 2, 1, seed=3)) for own in ((0, 2), (1,)))
    for update, parts in enumerate(zip(first, second, strict=True)):
        together = {number: rows_of(batch) for part in parts for number, batch in part.items()}
        assert together == {number: rows_of(batch) for number, batch in whole[update].items()}


def test_the_first_pass_is_in_the_order_of_the_round() -> None:
    parts = list(updates_of_round(BATCHES, SIZES, updates=2, epochs=2, unit=1, seed=0))
    assert [list(part) for part in parts[:2]] == [[0, 1], [2]] and len(parts) == 4


@pytest.mark.parametrize(
    "recipe", [flow_grpo(window=1), prdp(window=1), nft(), awm()], ids=["flow", "prdp", "nft", "awm"]
)
def test_a_pass_costs_replays_and_no_samples(tiny_folder: Path, recipe: Recipe) -> None:
    trainers = (toy_trainer(SD3.load(tiny_folder), recipe, settings=replace(SETTINGS, epochs=n)) for n in (1, 2))
    once, twice = (next(trainer.rounds()) for trainer in trainers)
    assert twice.samples == once.samples and twice.calls["decode"] == once.calls["decode"]
    assert twice.calls["nfe backward"] == 2 * once.calls["nfe backward"]


def test_ratios_leave_the_clip_range_only_when_samples_are_reused(tiny_folder: Path) -> None:
    recipe = flow_grpo(window=2, clip_range=1e-6)
    settings = replace(SETTINGS, updates_per_round=1, batch_size=8)
    for epochs, clipped in ((1, 0.0), (3, 2 / 3)):
        trainer = toy_trainer(SD3.load(tiny_folder), recipe, settings=replace(settings, epochs=epochs))
        result = next(trainer.rounds())
        assert result.clip_fraction == pytest.approx(clipped, abs=0.05) and result.log_ratio_max == 0.0


def test_matching_draws_other_noise_in_each_pass(tiny: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def backward(self: MatchingObjective, context: object, batch: UpdateBatch, scales: object, seed: int) -> None:
        seeds.append(seed)

    monkeypatch.setattr(MatchingObjective, "backward", backward)
    next(toy_trainer(tiny, awm(), settings=replace(SETTINGS, epochs=3)).rounds())
    assert len(set(seeds)) == 2 * 3  # of two batches in three passes


class Shifted(nn.Module):
    """A trainable constant for each step of a grid."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(steps))


class SteeredGauss(Gauss):
    """Gaussian data whose network adds a trainable constant at each step: a linear reward has its optimum there."""

    def __init__(self, steps: int) -> None:
        self.denoiser, self.steps = Shifted(steps), steps

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning | None, guidance: float = 1.0) -> Tensor:
        sigma = level.sigma.float().reshape(-1)
        places = torch.searchsorted(-self.grid(self.steps).sigma[:-1].float(), -sigma).clamp(max=self.steps - 1)
        slope = ((2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2))[:, None]
        return slope * x + self.denoiser.shift[places][:, None]

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.cat([torch.randn(1, 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def mean_and_variance(pipeline: SteeredGauss, kernels: Sequence[Kernel]) -> tuple[float, float]:
    """The mean of samples, and the variance that the noise of the steps adds: a chain of linear steps."""
    grid, mean, variance = pipeline.grid(pipeline.steps), 0.0, 0.0
    for index, kernel in enumerate(kernels):
        step, x = grid[index], torch.tensor([[mean], [mean + 1]])
        move = transition(pipeline.path, kernel, x, pipeline.predict(x, step, None).detach(), step)
        mean, above = move.mean.flatten().tolist()
        variance = (above - mean) ** 2 * variance + float(move.std) ** 2
    return mean, variance


@pytest.mark.parametrize("epochs", [1, 8])
def test_prdp_reaches_the_tilted_optimum_by_enough_updates(epochs: int) -> None:
    """The optimum is p exp(r / beta): for r = x, the Gaussian is shifted by its variance over beta."""
    beta, kernel = 0.8, FlowSDE(0.7)
    pipeline = SteeredGauss(steps=4)
    settings = TrainerSettings(
        rounds=15,
        prompts_per_round=2,
        group_size=16,
        updates_per_round=1,
        epochs=epochs,
        learning_rate=0.05,
        learning_rate_schedule="linear",
        weight_decay=0.0,
        max_grad_norm=1e9,
    )
    recipe = prdp(kernel, beta=beta, clip_range=0.5, steps="sum")
    kernels = kernel_per_step(kernel, recipe.steps(pipeline.path, pipeline.grid(4), 0, 0), 4)
    before, variance = mean_and_variance(pipeline, kernels)
    reward = NamedReward("x", lambda samples, prompts: samples.flatten(1)[:, 0])
    prompts = PromptSet("two", (Prompt("a"), Prompt("b")))
    policy = Policy(pipeline.denoiser, None)
    list(Trainer(pipeline, policy, [reward], prompts, recipe, settings, Sampling(num_steps=4)).rounds())
    shift = (mean_and_variance(pipeline, kernels)[0] - before) / (variance / beta)
    assert (shift == pytest.approx(1.0, abs=0.02)) == (epochs == 8), shift
