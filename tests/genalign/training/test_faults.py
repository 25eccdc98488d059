"""Faults, one by one, in a run on the embedded model of the shapes world: it ends as the clean one, or says why not.

The same seeds make the same samples in all runs. Where a fault costs nothing, the weights are the clean run's bit for
bit; where it costs samples, what the run reaches is compared with the clean one's by the standard error of that.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from genalign import assets
from genalign.algorithms import recipes
from genalign.algorithms.interfaces import Objective, Unit, UpdateBatch, UpdateContext, half_micro_batch
from genalign.algorithms.matching import KTOLoss
from genalign.algorithms.recipes import Lag, Recipe
from genalign.algorithms.trajectory import PolicyGradient
from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import generate
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import FlowSDE
from genalign.runtime.state import State
from genalign.scoring.score import NamedReward, RewardError
from genalign.training.nonfinite import DivergedError, is_out_of_memory
from genalign.training.trainer import RoundResult, Trainer, TrainerSettings
from genalign.types import Prompt, PromptSet, RewardFunction
from genalign.worlds import shapes
from pipelines import SD3
from rewards.remote.http_client import Patience
from rewards.remote.remote_reward import RemoteReward
from rewards.shapes import ShapesReward
from tests.http_servers import INFO, free_port, serving

SETTINGS = TrainerSettings(
    rounds=3,
    prompts_per_round=4,
    group_size=4,
    batch_size=4,
    updates_per_round=2,
    learning_rate=3e-3,
    max_failed_fraction=0.3,
)
SAMPLING = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25))
PROMPTS = PromptSet("some", shapes.prompts("train").prompts[:8])
RECIPE = recipes.flow_grpo(FlowSDE(0.9), window=1, clip_range=1e-3)
verifier = ShapesReward("partial")


@pytest.fixture(scope="module")
def opened() -> SD3:
    return SD3.load(assets.resolve("shapes-sd3"))


class Run:
    """A training in the shapes world, on a network of its own."""

    def __init__(
        self,
        opened: SD3,
        reward: NamedReward | RewardFunction = verifier,
        settings: TrainerSettings = SETTINGS,
        recipe: Recipe = RECIPE,
        suspects: Path | None = None,
    ) -> None:
        self.pipeline = copy.deepcopy(opened)
        policy = Policy(self.pipeline.denoiser, Lora(rank=4, alpha=8))
        rewards = [reward if isinstance(reward, NamedReward) else NamedReward("partial", reward)]
        self.trainer = Trainer(self.pipeline, policy, rewards, PROMPTS, recipe, settings, SAMPLING, suspects)
        self.results: list[RoundResult] = []

    def finished(self) -> Run:
        """After all its rounds."""
        self.results = list(self.trainer.rounds())
        return self

    def weights(self) -> Tensor:
        """All that is trained (n,)."""
        return torch.cat([parameter.detach().flatten() for parameter in self.trainer.policy.parameters])

    def reached(self) -> Tensor:
        """Scores (48,) of the averaged policy on noises of their own."""
        asked = [prompt for prompt in PROMPTS.prompts for _ in range(6)]
        texts, grid = [prompt.text for prompt in asked], SAMPLING.grid(self.pipeline)
        with self.trainer.policy.averaged():
            made = torch.cat(list(generate(self.pipeline, texts, range(48), grid, 1.0, 16)))
        return verifier(made, asked)


@pytest.fixture(scope="module")
def clean(opened: SD3) -> Run:
    return Run(opened).finished()


def assert_within_noise(run: Run, clean: Run) -> None:
    """The difference of what two runs reach is below two standard errors, and both have moved."""
    ours, theirs = run.reached(), clean.reached()
    error = float((ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt())
    assert abs(float(ours.mean() - theirs.mean())) < 2 * error
    assert bool(run.weights().isfinite().all()) and not torch.equal(run.weights(), clean.weights())
    assert len(run.results) == SETTINGS.rounds


class Faulty:
    """The verifier, whose call number ``at`` does something else."""

    def __init__(self, at: int, fault: RewardFunction) -> None:
        self.calls, self.at, self.fault = 0, at, fault

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.calls += 1
        return (self.fault if self.calls == self.at else verifier)(samples, prompts)


def raising(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    raise ConnectionError("a moment")


def blind(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    scores = verifier(samples, prompts)
    scores[0], scores[1] = torch.nan, torch.inf
    return scores


def equal(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.ones(len(samples))


def constant_for_a_round(calls: list[int]) -> RewardFunction:
    """The verifier, but for the second round."""

    def reward(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(len(samples))
        return (equal if 4 < len(calls) <= 8 else verifier)(samples, prompts)

    return reward


# rewards


def test_a_reward_that_raises_once_changes_nothing(opened: SD3, clean: Run) -> None:
    run = Run(opened, Faulty(6, raising)).finished()
    assert torch.equal(run.weights(), clean.weights())
    assert [result.failed_rewards for result in run.results] == [0, 0, 0]


def test_a_reward_that_hangs_once_changes_nothing(opened: SD3, clean: Run) -> None:
    free = threading.Event()

    def hanging(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        free.wait()
        return verifier(samples, prompts)

    run = Run(opened, NamedReward("partial", Faulty(6, hanging), timeout=5.0)).finished()
    free.set()
    assert torch.equal(run.weights(), clean.weights())


def test_scores_that_are_nan_or_infinite_are_left_out(opened: SD3, clean: Run) -> None:
    run = Run(opened, Faulty(6, blind)).finished()
    assert [result.failed_rewards for result in run.results] == [0, 2, 0]
    assert_within_noise(run, clean)


def test_a_sample_that_a_reward_cannot_bear_costs_its_own_score(opened: SD3, clean: Run) -> None:
    poison: list[Tensor] = []

    def refusing(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = verifier(samples, prompts)
        if not poison and len(scores.unique()) > 1:  # else the sample has no credit to lose
            poison.append(samples[scores.argmax()].clone())
        if any(torch.equal(sample, bad) for sample in samples for bad in poison):
            raise ValueError("too large")
        return scores

    run = Run(opened, NamedReward("partial", refusing, score_batch=4)).finished()
    assert sum(result.failed_rewards for result in run.results) == 1
    assert_within_noise(run, clean)


def test_a_wrong_shape_ends_the_run_which_goes_on_once_it_is_mended(opened: SD3, clean: Run) -> None:
    def shapeless(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return verifier(samples, prompts).mean()

    broken = Run(opened, Faulty(6, shapeless))
    states: list[State] = []
    with pytest.raises(RewardError, match=r"reward 'partial' returned shape \(\) for 4 samples: return one score per"):
        for _ in broken.trainer.rounds():
            states.append(copy.deepcopy(broken.trainer.state()))
    mended = Run(opened)
    mended.trainer.restore(states[-1])
    mended.pipeline.encode_together(broken.pipeline.encoded)  # as a checkpoint has it
    mended.finished()
    assert len(states) == 1 and torch.equal(mended.weights(), clean.weights())


def test_a_round_of_equal_scores_leaves_the_weights_alone(opened: SD3, clean: Run) -> None:
    run = Run(opened, constant_for_a_round([]))
    weights: list[Tensor] = []
    for result in run.trainer.rounds():
        run.results.append(result)
        weights.append(run.weights())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert run.results[1].zero_std_share == 1.0
    assert_within_noise(run, clean)


def test_equal_scores_do_not_let_a_penalty_loose(opened: SD3) -> None:
    """Samples without credit do not count in the mean, and a mean over nothing is not a sum."""
    recipe = recipes.flow_grpo(FlowSDE(0.9), window=1, clip_range=1e-3, kl=10.0)
    run = Run(opened, constant_for_a_round([]), replace(SETTINGS, rounds=2), recipe)
    first, second = (run.weights() for _ in run.trainer.rounds())
    assert torch.equal(first, second) and not torch.equal(first, Run(opened).weights())


@pytest.mark.slow
def test_a_server_that_is_gone_for_five_minutes_costs_five_minutes(opened: SD3) -> None:
    """Of a clock fifty times as fast: the client's default patience and the server's absence are divided by 50."""
    usual = Patience()
    quick = replace(
        usual,
        **{
            name: getattr(usual, name) / 50
            for name in ("deadline", "timeout", "connect", "first_pause", "longest_pause")
        },
    )
    assert usual.deadline > 300
    port = free_port()

    def run(absent: float) -> tuple[Run, float]:
        with ExitStack() as stack:
            first = stack.enter_context(ExitStack())
            url = first.enter_context(serving(verifier, INFO, port=port))
            made = Run(opened, RemoteReward(url, patience=quick))
            for result in made.trainer.rounds():
                made.results.append(result)
                if result.round == 0 and absent:
                    first.close()  # the server ends
                    back = threading.Timer(absent, lambda: stack.enter_context(serving(verifier, INFO, port=port)))
                    back.start()
                    gone = time.monotonic()
                elif result.round == 1 and absent:
                    waited = time.monotonic() - gone
                    back.join()
        return made, waited if absent else 0.0

    (without, _), (with_outage, waited) = run(0.0), run(300 / 50)
    assert waited >= 300 / 50
    assert [result.failed_rewards for result in with_outage.results] == [0, 0, 0]
    assert torch.equal(with_outage.weights(), without.weights())


def test_an_image_that_cannot_be_decoded_costs_its_own_score(opened: SD3, clean: Run) -> None:
    seen: list[bool] = []

    def particular(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append(bool(samples.isfinite().all()))
        return verifier(samples, prompts)

    run = Run(opened, particular)
    decode, calls = run.trainer.pipeline.decode, []

    def overflowing(latents: Tensor) -> Tensor:
        images = decode(latents).clone()
        calls.append(len(images))
        if len(calls) == 6:
            images[2, 1, 5, 5] = torch.nan
        return images

    run.trainer.pipeline.decode = overflowing  # type: ignore[method-assign]
    run.finished()
    assert [result.failed_rewards for result in run.results] == [0, 1, 0]
    assert all(seen)  # a reward is shown black in its place
    assert_within_noise(run, clean)


# learning


@dataclass(frozen=True)
class Wrapped:
    """An objective that does something else at its calls number ``first`` to ``last``."""

    objective: Objective
    fault: Callable[[UpdateBatch], None]

    @property
    def unit(self) -> Unit:
        return self.objective.unit

    @property
    def clip_range(self) -> float | None:
        return None

    def terms(self, batch: UpdateBatch) -> int:
        return self.objective.terms(batch)

    def backward(self, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        self.objective.backward(context, batch, scale, seed)
        self.fault(batch)


def spoiling(run: Run, updates: range) -> None:
    """Make gradients NaN in these of a run's updates, of one batch each."""
    calls: list[int] = []

    def spoil(batch: UpdateBatch) -> None:
        calls.append(len(batch))
        if len(calls) - 1 in updates:
            parameter = run.trainer.policy.parameters[0]
            parameter.grad = torch.full_like(parameter, torch.nan)

    run.trainer.recipe = replace(run.trainer.recipe, objective=Wrapped(run.trainer.recipe.objective, spoil))


ONE_BATCH = replace(SETTINGS, updates_per_round=4)


def test_an_update_that_is_not_finite_is_left_out_and_kept(opened: SD3, clean: Run, tmp_path: Path) -> None:
    run = Run(opened, settings=ONE_BATCH, suspects=tmp_path / "suspects")
    spoiling(run, range(5, 6))
    run.finished()
    assert [result.skipped_updates for result in run.results] == [0, 1, 0]
    assert run.results[1].as_dict()["skipped_updates"] == 1 and run.results[1].as_dict()["grad_norm"] is not None
    assert_within_noise(run, Run(opened, settings=ONE_BATCH).finished())
    path = tmp_path / "suspects" / "round-000001-update-1.safetensors"
    tensors, about = load_file(path), json.loads(path.with_suffix(".json").read_text())
    assert tensors["batch.0.prediction"].shape[:2] == (4, 1) and tensors["batch.0.credit"].shape == (4,)
    assert about["grad_norm"] == "nan" and about["not_finite"] == [] and len(about["batches"][0]["prompts"]) == 4


def test_updates_that_are_never_finite_end_the_run(opened: SD3, tmp_path: Path) -> None:
    run = Run(opened, settings=replace(ONE_BATCH, rounds=30), suspects=tmp_path)
    before = run.weights()
    spoiling(run, range(1000))
    with pytest.raises(
        DivergedError, match=r"5 updates in a row .* not finite \(training\.max_skipped_updates\), see .*\.saf"
    ):
        run.finished()
    assert torch.equal(run.weights(), before)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # the first ones


def test_a_disk_without_room_for_a_suspect_is_no_reason_to_stop(
    opened: SD3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "suspects").write_text("a file where the folder should be")
    run = Run(opened, settings=replace(ONE_BATCH, rounds=1), suspects=tmp_path / "suspects")
    spoiling(run, range(1))
    run.finished()
    assert "was skipped: gradient norm nan, loss 0.0, and its tensors could not be written" in caplog.text


def starved(run: Run, most: int) -> list[int]:
    """Let memory run out where more than ``most`` samples are learnt from at once; the sizes that were tried."""
    tried: list[int] = []

    def full(batch: UpdateBatch) -> None:
        tried.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    run.trainer.recipe = replace(run.trainer.recipe, objective=Wrapped(run.trainer.recipe.objective, full))
    return tried


def test_out_of_memory_halves_the_micro_batch_and_not_the_run(
    opened: SD3, clean: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(opened, settings=replace(SETTINGS, on_out_of_memory="halve"))
    tried = starved(run, 2)
    run.finished()
    assert tried[:5] == [4, 2, 2, 2, 2] and set(tried[1:]) == {2}
    assert "Out of memory with micro-batches of 4: continuing with 2" in caplog.text
    assert run.trainer.state().numbers["micro_batch"] == 2
    moved = (clean.weights() - Run(opened).weights()).norm()
    assert float((run.weights() - clean.weights()).norm() / moved) < 0.05  # rounding, through Adam's first steps
    assert_within_noise(run, clean)


def test_out_of_memory_stops_unless_told_otherwise_and_where_nothing_is_left_to_halve(opened: SD3) -> None:
    for most, on_out_of_memory in ((2, "stop"), (0, "halve")):
        run = Run(opened, settings=replace(SETTINGS, on_out_of_memory=on_out_of_memory))
        starved(run, most)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            run.finished()


def test_the_command_tells_what_would_hold_less(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward = PolicyGradient.backward

    def full(objective: PolicyGradient, context: UpdateContext, batch: UpdateBatch, scale: float, seed: int) -> None:
        if batch.rollout.final.ndim == 4:  # and not the stand-in that calls are counted with
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nand a page of figures")
        backward(objective, context, batch, scale, seed)

    monkeypatch.setattr("genalign.algorithms.trajectory.PolicyGradient.backward", full)
    settings = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_folder)},
        "recipe": {"class_path": "genalign.algorithms.recipes.flow_grpo", "init_args": {"window": 1}},
        "rewards": {"partial": {"function": {"class_path": "rewards.shapes.ShapesReward"}}},
        "sampling": {"num_steps": 3},
        "training": {"rounds": 1, "prompts_per_round": 4, "group_size": 2, "batch_size": 4, "updates_per_round": 1},
        "held_out": {"every": 0},
        "before_after": None,
    }
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert main(["train", "--config", str(tmp_path / "run.json")]) == 1
    told = capsys.readouterr().err
    assert "error: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB\n`genalign plan` puts these" in told
    figure = r"\(\d+\.\d{3} GiB\)"
    less = rf"--model\.memory\.checkpointing true {figure}; --model\.memory\.offload true {figure};"
    assert re.search(rf"{less} --training\.batch_size 2 {figure}; --training\.on_out_of_memory halve", told), told
    assert main(["plan", "--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "other")]) == 0
    assert "--training.batch_size 2" in capsys.readouterr().out


def test_another_error_is_no_lack_of_memory(opened: SD3) -> None:
    run = Run(opened, settings=replace(SETTINGS, on_out_of_memory="halve"))

    def broken(batch: UpdateBatch) -> None:
        raise RuntimeError("shapes differ")

    run.trainer.recipe = replace(RECIPE, objective=Wrapped(RECIPE.objective, broken))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run.finished()
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))


DIVISIBLE = {
    "flow_grpo": (lambda: recipes.flow_grpo(FlowSDE(0.9), window=2, clip_range=1e-3, kl=0.1), 1),
    "dense_grpo": (lambda: recipes.dense_grpo(FlowSDE(0.9), window=2), 3),
    "prdp": (lambda: recipes.prdp(FlowSDE(0.9), window=2), 4),
    "nft": (lambda: recipes.nft(lag=Lag(slope=0.3)), 2),
    "awm": (recipes.awm, 3),
    "dragon": (lambda: recipes.dragon(anchor=0.1), 4),
}


@pytest.mark.parametrize("name", DIVISIBLE)
def test_the_gradient_of_parts_is_that_of_the_whole(opened: SD3, name: str) -> None:
    make, size = DIVISIBLE[name]

    def gradient(micro_batch: int) -> Tensor:
        run = Run(opened, settings=replace(SETTINGS, batch_size=8, rounds=1, updates_per_round=1), recipe=make())
        run.trainer.micro_batch = micro_batch
        found: list[Tensor] = []

        def keep(terms: int) -> None:
            found.append(torch.cat([p.grad.flatten() for p in run.trainer.policy.parameters if p.grad is not None]))

        run.trainer._step = keep  # type: ignore[method-assign]
        run.finished()
        return found[0]

    whole, parts = gradient(8), gradient(size)
    assert float(whole.norm()) > 0
    assert float((whole - parts).norm() / whole.norm()) < 1e-3


def test_what_may_be_halved() -> None:
    assert [half_micro_batch(8, "sample", 4), half_micro_batch(1, "sample", 4)] == [4, None]
    assert [half_micro_batch(12, "group", 4), half_micro_batch(8, "group", 4), half_micro_batch(4, "group", 4)] == [
        4,
        4,
        None,
    ]
    assert KTOLoss(1.0).unit == "batch" and half_micro_batch(8, "batch", 4) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_failed_fraction": 1.5}, r"training\.max_failed_fraction must be in \[0, 1\], not 1\.5"),
        ({"max_skipped_updates": 0}, r"training\.max_skipped_updates must be at least 1, not 0"),
    ],
)
def test_impossible_limits(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **settings)  # type: ignore[arg-type]
