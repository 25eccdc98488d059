"""Single faults in a run on the embedded shapes model: the run ends like one without a fault, or says why not.

The same seeds give the same samples in all runs. If a fault costs nothing, the weights equal those without it bit for
bit; if it costs samples, the mean scores after training are equal within two standard errors.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from genalign import assets
from genalign.algorithms import recipes
from genalign.algorithms.interfaces import Objective, TermScales, UpdateBatch, UpdateContext, half_micro_batch
from genalign.algorithms.matching_losses import KTOLoss
from genalign.algorithms.recipe import Lag, Recipe
from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import generate
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE
from genalign.runtime.state import State
from genalign.scoring.score import NamedReward, RewardError
from genalign.training.nonfinite import DivergedError
from genalign.training.out_of_memory import is_out_of_memory
from genalign.training.round_result import RoundResult
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet, RewardFunction
from genalign.worlds import shapes
from pipelines import SD3
from rewards.remote.http_client import Patience
from rewards.remote.remote_reward import RemoteReward
from rewards.shapes import ShapesReward
from tests.genalign.training.toy_runs import redness, write_config
from tests.http_servers import INFO, free_port, serving

SETTINGS = TrainerSettings(
    rounds=3,
    prompts_per_round=4,
    group_size=4,
    batch_size=4,
    updates_per_round=4,
    learning_rate=3e-3,
    max_failed_fraction=0.3,
)
SAMPLING = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25))
PROMPTS = PromptSet("some", shapes.prompts("train").prompts[-8:])  # of two colours: no group has equal scores
RECIPE = recipes.flow_grpo(FlowSDE(1.5), window=1, clip_range=1e-3)
verifier = ShapesReward("partial")


@pytest.fixture(scope="module")
def opened() -> SD3:
    return SD3.load(assets.resolve("shapes-sd3"))


class Run:
    """A training run on a copy of the shapes model."""

    def __init__(
        self,
        opened: SD3,
        reward: NamedReward | RewardFunction = verifier,
        settings: TrainerSettings = SETTINGS,
        recipe: Recipe = RECIPE,
        skipped_updates: Path | None = None,
    ) -> None:
        self.pipeline = copy.deepcopy(opened)
        policy = Policy(self.pipeline.denoiser, Lora(rank=4, alpha=8))
        rewards = [reward if isinstance(reward, NamedReward) else NamedReward("partial", reward)]
        self.trainer = Trainer(self.pipeline, policy, rewards, PROMPTS, recipe, settings, SAMPLING, skipped_updates)
        self.results: list[RoundResult] = []

    def finished(self) -> Run:
        """Run all rounds, and return the run."""
        self.results = list(self.trainer.rounds())
        return self

    def spoil(self, fault: Callable[[UpdateBatch], None]) -> None:
        """Call ``fault`` after each backward pass of the objective."""
        recipe = self.trainer.recipe
        self.trainer.learner.recipe = replace(recipe, objective=Wrapped(recipe.objective, fault))

    def weights(self) -> Tensor:
        """Return the trained weights (n,)."""
        return torch.cat([parameter.detach().flatten() for parameter in self.trainer.policy.parameters])

    @cached_property
    def reached(self) -> Tensor:
        """Scores (48,) of the averaged policy on noises of their own."""
        prompts = [prompt for prompt in PROMPTS.prompts for _ in range(6)]
        texts, grid = [prompt.text for prompt in prompts], SAMPLING.grid(self.pipeline)
        with self.trainer.policy.averaged():
            return verifier(torch.cat(list(generate(self.pipeline, texts, range(48), grid, 1.0, 16))), prompts)


@pytest.fixture(scope="module")
def clean(opened: SD3) -> Run:
    return Run(opened).finished()


def assert_within_noise(run: Run, clean: Run) -> None:
    """Require final scores that differ by less than two standard errors, and other weights."""
    ours, theirs = run.reached, clean.reached
    error = float((ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt())
    assert abs(float(ours.mean() - theirs.mean())) < 2 * error
    assert bool(run.weights().isfinite().all()) and not torch.equal(run.weights(), clean.weights())
    assert len(run.results) == SETTINGS.rounds


class Faulty:
    """The verifier, with a fault in some of its calls, which are numbered from 1."""

    def __init__(self, numbers: Sequence[int], fault: RewardFunction) -> None:
        self.calls, self.numbers, self.fault = 0, numbers, fault

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.calls += 1
        return (self.fault if self.calls in self.numbers else verifier)(samples, prompts)


release = threading.Event()


def raising(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    raise ConnectionError("a moment")


def hanging(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    release.wait()
    return verifier(samples, prompts)


def blind(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    scores = verifier(samples, prompts)
    scores[0], scores[1] = torch.nan, torch.inf
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("fault", [raising, hanging])
def test_a_reward_that_raises_or_hangs_once_changes_nothing(opened: SD3, clean: Run, fault: RewardFunction) -> None:
    run = Run(opened, NamedReward("partial", Faulty([6], fault), timeout=5.0)).finished()
    release.set()
    assert torch.equal(run.weights(), clean.weights())
    assert [result.failed_rewards for result in run.results] == [0, 0, 0]


@pytest.mark.slow
def test_scores_that_are_nan_or_infinite_are_left_out(opened: SD3, clean: Run) -> None:
    run = Run(opened, Faulty([6], blind)).finished()
    assert [result.failed_rewards for result in run.results] == [0, 2, 0]
    assert_within_noise(run, clean)


def test_a_wrong_shape_ends_the_run_which_resumes_exactly_with_a_correct_reward(opened: SD3, clean: Run) -> None:
    broken = Run(opened, Faulty([6], lambda samples, prompts: verifier(samples, prompts).mean()))
    states: list[State] = []
    with pytest.raises(RewardError, match=r"reward 'partial' returned shape \(\) for 4 samples: return one score per"):
        for _ in broken.trainer.rounds():
            states.append(copy.deepcopy(broken.trainer.state()))
    resumed = Run(opened)
    resumed.trainer.restore(states[-1])
    resumed.pipeline.encode_together(broken.pipeline.encoded)  # as a checkpoint does
    assert len(states) == 1 and torch.equal(resumed.finished().weights(), clean.weights())


def test_without_credit_a_kl_penalty_does_not_move_the_weights(opened: SD3) -> None:
    recipe = recipes.flow_grpo(FlowSDE(0.9), window=1, clip_range=1e-3, kl=10.0)
    equal = Faulty(range(5, 9), lambda samples, _: torch.ones(len(samples)))  # in the second round
    run = Run(opened, equal, replace(SETTINGS, rounds=2), recipe)
    first, second = (run.weights() for _ in run.trainer.rounds())
    assert torch.equal(first, second) and not torch.equal(first, Run(opened).weights())


@pytest.mark.slow
def test_a_server_outage_of_five_minutes_changes_nothing(opened: SD3) -> None:
    """The client's default patience and the outage are divided by 50."""
    usual, outage, port = Patience(), 300 / 50, free_port()
    names = ("deadline", "timeout", "connect", "first_pause", "longest_pause")
    quick = replace(usual, **{name: getattr(usual, name) / 50 for name in names})
    assert usual.deadline > 300

    def run(interrupted: bool) -> Run:
        with ExitStack() as stack:
            server = stack.enter_context(ExitStack())
            url = server.enter_context(serving(verifier, INFO, port=port))
            run = Run(opened, RemoteReward(url, patience=quick))
            for result in run.trainer.rounds():
                run.results.append(result)
                if result.round == 0 and interrupted:
                    server.close()
                    restart = threading.Timer(outage, lambda: stack.enter_context(serving(verifier, INFO, port=port)))
                    restart.start()
                    start = time.monotonic()
                elif result.round == 1 and interrupted:
                    assert time.monotonic() - start >= outage
                    restart.join()
        return run

    without, with_outage = run(False), run(True)
    assert [result.failed_rewards for result in with_outage.results] == [0, 0, 0]
    assert torch.equal(with_outage.weights(), without.weights())


@pytest.mark.slow
def test_an_image_that_is_not_finite_costs_its_own_score_only(opened: SD3, clean: Run) -> None:
    def checking(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert samples.isfinite().all()  # it is left out
        return verifier(samples, prompts)

    run = Run(opened, checking)
    decode, calls = run.trainer.pipeline.decode, itertools.count(1)

    def overflowing(latents: Tensor) -> Tensor:
        images = decode(latents).clone()
        if next(calls) == 6:
            images[2, 1, 5, 5] = torch.nan
        return images

    run.trainer.pipeline.decode = overflowing
    run.finished()
    assert [result.failed_rewards for result in run.results] == [0, 1, 0]
    assert_within_noise(run, clean)


class Wrapped:
    """An objective with a fault after each of its backward passes."""

    clip_range = None

    def __init__(self, objective: Objective, fault: Callable[[UpdateBatch], None]) -> None:
        self.objective, self.fault = objective, fault
        self.unit, self.terms = objective.unit, objective.terms

    def backward(self, context: UpdateContext, batch: UpdateBatch, scales: TermScales, seed: int) -> None:
        self.objective.backward(context, batch, scales, seed)
        self.fault(batch)


def without_gradient(run: Run, updates: range) -> None:
    """Set the gradient to NaN in some of a run's updates, which have one batch each."""
    calls = itertools.count()

    def fault(batch: UpdateBatch) -> None:
        if next(calls) in updates:
            parameter = run.trainer.policy.parameters[0]
            parameter.grad = torch.full_like(parameter, torch.nan)

    run.spoil(fault)


@pytest.mark.slow
def test_an_update_that_is_not_finite_is_skipped_and_written(opened: SD3, clean: Run, tmp_path: Path) -> None:
    run = Run(opened, skipped_updates=tmp_path / "skipped_updates")
    without_gradient(run, range(5, 6))
    run.finished()
    assert [result.skipped_updates for result in run.results] == [0, 1, 0]
    assert run.results[1].as_dict()["skipped_updates"] == 1 and run.results[1].as_dict()["grad_norm"] is not None
    assert_within_noise(run, clean)
    path = tmp_path / "skipped_updates" / "round-000001-update-1.safetensors"
    tensors, about = load_file(path), json.loads(path.with_suffix(".json").read_text())
    assert tensors["batch.0.prediction"].shape[:2] == (4, 1) and tensors["batch.0.credit"].shape == (4,)
    assert about["grad_norm"] == "nan" and about["not_finite"] == [] and len(about["batches"][0]["prompts"]) == 4


def test_updates_that_are_never_finite_end_the_run(opened: SD3, tmp_path: Path) -> None:
    run = Run(opened, settings=replace(SETTINGS, rounds=30), skipped_updates=tmp_path)
    before = run.weights()
    without_gradient(run, range(1000))
    message = r"5 updates in a row .* not finite \(training\.max_skipped_updates\), see .*\.saf"
    with pytest.raises(DivergedError, match=message):
        run.finished()
    assert torch.equal(run.weights(), before)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # the first ones


def test_a_skipped_update_that_cannot_be_written_does_not_stop_the_run(
    opened: SD3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "skipped_updates").write_text("a file where the folder should be")
    run = Run(opened, settings=replace(SETTINGS, rounds=1), skipped_updates=tmp_path / "skipped_updates")
    without_gradient(run, range(1))
    run.finished()
    assert re.search("was skipped: gradient norm nan, loss .*, and its tensors could not be written", caplog.text)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nand more lines")


def limit(run: Run, most: int, error: RuntimeError = FULL) -> list[int]:
    """Raise ``error`` for micro-batches above ``most`` samples, and return the list of sizes that were tried."""
    sizes: list[int] = []

    def fault(batch: UpdateBatch) -> None:
        sizes.append(len(batch))
        if len(batch) > most:
            raise error

    run.spoil(fault)
    return sizes


def test_out_of_memory_halves_the_micro_batch_and_not_the_run(
    opened: SD3, clean: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(opened, settings=replace(SETTINGS, on_out_of_memory="halve"))
    sizes = limit(run, 2)
    run.finished()
    assert sizes[:5] == [4, 2, 2, 2, 2] and set(sizes[1:]) == {2}
    assert "Out of memory with micro-batches of 4: continuing with 2" in caplog.text
    assert run.trainer.state().numbers["micro_batch"] == 2
    moved = (clean.weights() - Run(opened).weights()).norm()
    assert float((run.weights() - clean.weights()).norm() / moved) < 0.05  # rounding, through Adam's first steps
    assert_within_noise(run, clean)


@pytest.mark.parametrize(
    ("most", "on_out_of_memory", "error"),
    [(2, "stop", FULL), (0, "halve", FULL), (2, "halve", RuntimeError("shapes differ"))],
)
def test_an_error_that_halving_may_not_or_cannot_avoid_stops_the_run(
    opened: SD3, most: int, on_out_of_memory: str, error: RuntimeError
) -> None:
    run = Run(opened, settings=replace(SETTINGS, on_out_of_memory=on_out_of_memory))
    limit(run, most, error)
    with pytest.raises(RuntimeError) as raised:
        run.finished()
    assert raised.value is error


def test_the_command_says_which_settings_need_less_memory(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("genalign.algorithms.trajectory.PolicyGradient.backward", Mock(side_effect=FULL))
    training = {"rounds": 1, "prompts_per_round": 4, "batch_size": 4, "updates_per_round": 1}
    config = write_config(tmp_path / "run.json", tiny_folder, "tests.genalign.training.toy_runs.redness", training)
    assert main(["train", "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert error == (
        "error: Training stopped: CUDA out of memory. Tried to allocate 20.00 GiB. Less memory is needed with"
        " --model.memory.checkpointing true or --model.memory.offload all or --training.on_out_of_memory halve or (in"
        f" a new run) --training.batch_size 2. Resume with: genalign train --resume {tmp_path / 'run'}\n"
    )


DIVISIBLE = {
    "flow_grpo": (lambda: recipes.flow_grpo(FlowSDE(0.9), window=2, clip_range=1e-3, kl=0.1), 1),
    "dense_grpo": (lambda: recipes.dense_grpo(FlowSDE(0.9), window=2), 3),
    "prdp": (lambda: recipes.prdp(FlowSDE(0.9), window=2), 4),
    "nft": (lambda: recipes.nft(lag=Lag(slope=0.3)), 2),
    "awm": (recipes.awm, 3),
    "dragon": (lambda: recipes.dragon(anchor=0.1), 4),
}


@pytest.mark.parametrize("name", DIVISIBLE)
def test_micro_batches_have_the_same_gradient(small: SD3, name: str) -> None:
    make, size = DIVISIBLE[name]

    def gradient(micro_batch: int) -> Tensor:
        settings = replace(SETTINGS, batch_size=8, rounds=1, updates_per_round=1)
        run = Run(small, redness, settings, make())
        run.trainer.learner.micro_batch = micro_batch
        gradients: list[Tensor] = []

        def save(*_: object) -> None:
            gradients.append(torch.cat([p.grad.flatten() for p in run.trainer.policy.parameters if p.grad is not None]))

        run.trainer.learner.optimizer.register_step_pre_hook(save)
        run.finished()
        return gradients[0]

    whole, parts = gradient(8), gradient(size)
    assert float(whole.norm()) > 0
    assert float((whole - parts).norm() / whole.norm()) < 1e-3


def test_sizes_of_halved_micro_batches() -> None:
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    halves = [half_micro_batch(size, "group", 4) for size in (12, 8, 4)]
    assert halves == [4, 4, None] and [half_micro_batch(size, "sample", 4) for size in (8, 1)] == [4, None]
    assert KTOLoss(1.0).unit == "batch" and half_micro_batch(8, "batch", 4) is None
