"""Few-step recipes on the one loop: they learn, resume exactly, are counted, and are refused where they cannot work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.few_step_recipes import consistency, distribution_matching, reward_instruct, rg_lcd
from genalign.algorithms.pathwise import Ascent
from genalign.algorithms.recipe import Recipe
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import CPS
from genalign.scoring.budget import NFE
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.dry_run import ToyPipeline, dry_run
from genalign.training.pools import PoolInfo, PoolSample, write_part
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines import SD3
from tests.genalign.ranks import Channels
from tests.genalign.training.toy_runs import PROMPTS, SETTINGS, Session, redness, require_same_checkpoints, weights

TWO_STEPS = Sampling(2, (1.0, 0.5), kernel=CPS(1.0))
ONCE = replace(SETTINGS, updates_per_round=1, batch_size=8, micro_batch=4)


def hard_redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return 100 * redness(samples.detach(), prompts)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "consistency": lambda: consistency(steps=4, guidance=2.0),
    "rg_lcd": lambda: rg_lcd(scale=100.0, steps=4),  # the rewards vary by a hundredth
    "rg_lcd with a proxy": lambda: rg_lcd(proxy=Channels, steps=4),
    "reward_instruct": reward_instruct,
    "distribution_matching": lambda: distribution_matching(guidance=2.0, fake_steps=2),
    "distribution_matching with rewards": lambda: distribution_matching(reward=1.0, fake_steps=1),
}


def _trainer(
    tiny: SD3, recipe: Recipe, settings: TrainerSettings = ONCE, reward: Callable[..., Tensor] = redness
) -> Trainer:
    policy = Policy(tiny.denoiser, Lora(rank=2), seed=0)
    return Trainer(tiny, policy, [NamedReward("red", reward)], PROMPTS, recipe, settings, TWO_STEPS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_resumed_as_if_it_had_not_stopped(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    """Target, fake score, proxy and their optimizers are part of a checkpoint."""
    reward = hard_redness if "proxy" in name else redness

    def session(folder: Path) -> Session:
        trainer = _trainer(SD3.load(tiny_folder, height=32, width=32), RECIPES[name](), ONCE, reward)
        return Session(folder, trainer, ScoreLog())

    whole = session(tmp_path / "whole")
    rows = whole.go(2)
    assert whole.go(2) == []
    stopped = session(tmp_path / "stopped")
    first = stopped.go(1)
    resumed = session(tmp_path / "stopped")
    resumed.resume()
    second = resumed.go(2)
    numbers = [{k: v for k, v in row.items() if k != "seconds"} for row in (*first, *second)]
    assert numbers == [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    for one, other in zip(weights(whole.trainer), weights(resumed.trainer), strict=True):
        assert torch.equal(one, other)
    paths = [checkpoints / "round-000002" for checkpoints in (tmp_path / "whole", tmp_path / "stopped")]
    require_same_checkpoints(*paths)


@pytest.mark.slow
def test_the_residual_of_a_student_falls(tiny_folder: Path) -> None:
    settings = replace(ONCE, rounds=30, learning_rate=2e-2)
    trainer = _trainer(SD3.load(tiny_folder, height=32, width=32), consistency(steps=4, decay=0.5), settings)
    losses = [result.loss for result in trainer.rounds()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rg_lcd", "reward_instruct", "distribution_matching with rewards"])
def test_the_reward_of_a_student_rises(tiny_folder: Path, name: str) -> None:
    tiny = SD3.load(tiny_folder, height=32, width=32)
    results = list(_trainer(tiny, RECIPES[name](), replace(ONCE, rounds=24)).rounds())
    first, last = (sum(result.reward for result in part) / 4 for part in (results[:4], results[-4:]))
    assert last > first + 0.5 * results[0].reward_std


def test_metrics_of_parts_and_companions_are_logged(tiny_folder: Path) -> None:
    tiny = SD3.load(tiny_folder, height=32, width=32)
    (result, *_) = _trainer(tiny, RECIPES["rg_lcd with a proxy"](), reward=hard_redness).rounds()
    assert {"consistency/loss", "consistency/kl", "reward/loss", "companion/loss"} <= result.metrics.keys()
    expected = result.metrics["consistency/loss"] + result.metrics["reward/loss"]
    assert result.loss == pytest.approx(expected, rel=1e-5) and result.grad_norm > 0
    (other, *_) = _trainer(SD3.load(tiny_folder, height=32, width=32), RECIPES["distribution_matching"]()).rounds()
    assert other.metrics["companion/error"] > 0 and other.loss > 0


def test_equal_scores_do_not_end_a_distillation(tiny_folder: Path) -> None:
    """The first round without credit would stop this run, if it learned from scores."""
    tiny = SD3.load(tiny_folder, height=32, width=32)
    sizes = {"prompts_per_round": 1, "group_size": 2, "batch_size": 2, "micro_batch": None}
    settings = replace(ONCE, rounds=1, max_rounds_without_credit=1, **sizes)
    trainer = _trainer(tiny, consistency(steps=2), settings, lambda samples, _: torch.ones(len(samples)))
    (result,) = trainer.rounds()
    assert result.zero_std_share == 1.0 and not trainer.learner.without_credit


def test_students_are_distilled_from_a_pool(tiny: SD3, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    PoolInfo(tiny.autoencoder, tuple(tiny.latent_shape), ("human",), {"by": "a test"}).write(folder)
    samples = [PoolSample(Prompt(f"{n // 2} circles"), {"human": float(n)}) for n in range(4)]
    write_part(folder, 0, torch.randn(4, *tiny.latent_shape, generator=torch.Generator().manual_seed(0)), samples)
    settings = replace(ONCE, group_size=2, batch_size=4, micro_batch=None, data=str(folder), rounds=1)
    prompts = PromptSet("pool", (Prompt("0 circles"), Prompt("1 circles")))
    for recipe in (consistency(steps=4), rg_lcd(steps=4)):
        policy = Policy(tiny.denoiser, Lora(rank=2), seed=0, has_adapter=hasattr(tiny.denoiser, "peft_config"))
        rewards = [NamedReward("human", redness)]
        (result,) = Trainer(tiny, policy, rewards, prompts, recipe, settings, TWO_STEPS).rounds()
        assert result.reward == 1.5 and result.grad_norm > 0  # the column of the pool
    with pytest.raises(ValueError, match="learns from the sampling steps of its own samples"):
        Trainer(tiny, policy, rewards, prompts, reward_instruct(), settings, TWO_STEPS)


def test_what_a_student_costs() -> None:
    """Consistency: one NFE with a gradient, one of the target, and one of the teacher, or two with guidance."""

    def calls(recipe: Recipe) -> float:
        sizes = {"prompts_per_round": 2, "group_size": 2, "batch_size": 4, "updates_per_round": 1}
        settings = TrainerSettings(rounds=1, learning_rate=1e-3, **sizes)
        rewards, toy = [NamedReward("red", redness)], ToyPipeline.flow(2)
        counted = dry_run(toy, rewards, PROMPTS, recipe, settings, 1.0, CPS(1.0))
        return counted.first.counts[NFE] / 4

    sampling, matching = 2, 5 + 1 + 2  # the updates of the fake score, the estimate, and both scores
    assert calls(consistency(steps=4)) == sampling + 3
    assert calls(consistency(steps=4, guidance=2.0)) == sampling + 4
    assert 0 < calls(distribution_matching()) - sampling - matching < 1  # the kl of a part of the round
    assert calls(rg_lcd(proxy=Channels, steps=4)) == sampling + 2 + 3 + 2  # proxy, consistency, estimate and its kl


@pytest.mark.parametrize("name", RECIPES)
def test_sharded_networks_and_second_passes_are_refused(tiny: SD3, name: str) -> None:
    if name == "consistency":
        return
    policy, rewards = Policy(tiny.denoiser, Lora(rank=2), seed=0), [NamedReward("red", redness)]
    with pytest.raises(ValueError, match=r"set training\.epochs to 1"):
        Trainer(tiny, policy, rewards, PROMPTS, RECIPES[name](), replace(ONCE, epochs=2), TWO_STEPS)
    policy.sharded = True
    with pytest.raises(ValueError, match="FSDP"):
        Trainer(tiny, policy, rewards, PROMPTS, RECIPES[name](), ONCE, TWO_STEPS)


def test_a_student_samples_without_guidance(tiny: SD3) -> None:
    policy, rewards = Policy(tiny.denoiser, Lora(rank=2), seed=0), [NamedReward("red", redness)]
    for recipe in (consistency(guidance=3.0), distribution_matching(guidance=3.0)):
        guided = replace(TWO_STEPS, guidance=2.0)
        with pytest.raises(
            ValueError, match=r"into which guidance 3 is distilled: set sampling\.guidance to 1 or null, not 2"
        ):
            Trainer(tiny, policy, rewards, PROMPTS, recipe, ONCE, guided)
    assert reward_instruct().objective.traits.student_guidance is None  # type: ignore[attr-defined]
    assert reward_instruct(ascent=Ascent()).companion is None
