"""Learning from a pool: what it holds, which groups a round takes, resuming, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.algorithms.advantages import UnsuitableScoresError
from genalign.algorithms.credit import DrawnPreference
from genalign.algorithms.interfaces import RoundScores, traits_of
from genalign.algorithms.pathwise_recipes import instruct_video
from genalign.algorithms.preference_recipes import dpo, gdro, kto, rpo, rwr, sft
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipes import dense_grpo, dragon, dragon_set, flow_grpo, nft
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.metrics.vendi import vendi_score
from genalign.runtime.distributed import ProcessGroup
from genalign.scoring.budget import reward_call
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.dry_run import ToyPipeline, dry_run
from genalign.training.offline import pool_of, stored_score
from genalign.training.pools import INFO, Pool, PoolInfo, PoolSample, drawn_group, part_files, write_part
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines import SD3
from tests.genalign.training.toy_runs import Session, channels, redness, require_same_checkpoints, write_pool

SAMPLING = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25))
PROMPTS = PromptSet.of(["0 circles", "1 circles", "2 circles"])


def _pool(tiny: SD3, folder: Path) -> Path:
    """Write a pool of three groups of four, whose second score has a gap."""
    prompts = [Prompt(f"{group} circles", {"tag": "counting"}) for group in range(3)]
    return write_pool(tiny, folder, prompts, scores=("human", "other"))


def _settings(folder: Path, **changes: object) -> TrainerSettings:
    sizes = TrainerSettings(
        rounds=2, prompts_per_round=2, group_size=3, batch_size=6, updates_per_round=1, learning_rate=1e-2
    )
    return replace(sizes, data=str(folder), **changes)  # type: ignore[arg-type]


def _trainer(
    tiny: SD3,
    folder: Path,
    recipe: Recipe,
    rewards: list[NamedReward] | None = None,
    settings: TrainerSettings | None = None,
) -> Trainer:
    policy = Policy(tiny.denoiser, Lora(rank=2), seed=0)
    rewards = rewards or [NamedReward("human", stored_score)]
    prompts = Pool.load(folder).prompts
    return Trainer(tiny, policy, rewards, prompts, recipe, settings or _settings(folder), SAMPLING)


def test_a_pool_is_read_as_it_was_written(tiny: SD3, tmp_path: Path) -> None:
    pool = Pool.load(_pool(tiny, tmp_path / "pool"))
    assert len(pool.samples) == 12 and pool.prompts.name == "pool"
    assert [prompt.text for prompt in pool.prompts.prompts] == ["0 circles", "1 circles", "2 circles"]
    assert pool.prompts.prompts[0].metadata == {"tag": "counting"} and pool.samples[3].scores["human"] == 3
    assert math.isnan(pool.samples[3].scores["other"])
    rows = [11, 0, 6, 4]
    both = torch.cat([pool.read([row]) for row in rows])
    torch.testing.assert_close(pool.read(rows), both)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(5, *tiny.latent_shape, generator=generator).half().float()
    torch.testing.assert_close(pool.read(range(5)), first)


def test_groups_of_a_prompt_stay_apart_and_are_drawn_without_replacement(tiny: SD3, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    PoolInfo(tiny.autoencoder, tuple(tiny.latent_shape), ("human",), {}).write(folder)
    samples = [PoolSample(Prompt("a"), {"human": 1.0}, group=str(number // 2)) for number in range(6)]
    samples.append(PoolSample(Prompt("b"), {"human": 1.0}))
    write_part(folder, 0, torch.zeros(7, *tiny.latent_shape), samples)
    pool = Pool.load(folder)
    assert pool.groups() == {"a": [[0, 1], [2, 3], [4, 5]], "b": [[6]]}
    pairs = {tuple(sorted(drawn_group(pool.groups()["a"], 2, f"seed/{number}"))) for number in range(30)}
    assert pairs == {(0, 1), (2, 3), (4, 5)}
    kept = pool.with_groups_of(2)
    assert [sample.prompt.text for sample in kept.samples] == ["a"] * 6
    with pytest.raises(ValueError, match=r"no group of .*pool has 3 samples: lower training.group_size"):
        pool.with_groups_of(3)


def test_a_run_learns_from_the_scores_of_the_pool_without_sampling(tiny: SD3, tmp_path: Path) -> None:
    trainer = _trainer(tiny, _pool(tiny, tmp_path), sft(draws=1))
    first, second = trainer.rounds()
    assert second.calls["nfe"] > 0 and "decode" not in second.calls
    assert first.rewards.keys() == {"human"} and 0 < first.reward < 3
    assert first.samples == 6 and trainer.policy.updates == 2


def test_latents_that_are_not_finite_cost_their_own_score_only(tiny: SD3, tmp_path: Path) -> None:
    PoolInfo(tiny.autoencoder, tuple(tiny.latent_shape), ("human",), {}).write(tmp_path)
    latents = torch.ones(3, *tiny.latent_shape)
    latents[1, 0, 0, 0] = torch.nan
    write_part(tmp_path, 0, latents, [PoolSample(Prompt("a"), {"human": float(number)}) for number in range(3)])
    settings = replace(_settings(tmp_path, rounds=1), prompts_per_round=1, batch_size=3, max_failed_fraction=0.5)
    rewards = [NamedReward("human", stored_score), NamedReward("red", redness)]
    trainer = _trainer(tiny, tmp_path, sft(draws=1), rewards, settings)
    (result,) = trainer.rounds()
    assert result.failed_rewards == 2 and trainer.policy.updates == 1 and result.skipped_updates == 0
    assert result.reward == pytest.approx(1 + result.rewards["red"])  # of samples 0 and 2


@pytest.mark.parametrize(
    "recipe", [sft(draws=1), kto(0.5, draws=1), instruct_video(moves=3)], ids=["sft", "kto", "video"]
)
def test_a_pool_of_single_samples_is_learned_from(tiny: SD3, tmp_path: Path, recipe: Recipe) -> None:
    """Each prompt has one sample, as in the data of SFT and KTO; half of them are good."""
    PoolInfo(tiny.autoencoder, tuple(tiny.latent_shape), ("human",), {}).write(tmp_path)
    samples = [PoolSample(Prompt(f"{number} circles"), {"human": float(number % 2)}) for number in range(4)]
    write_part(tmp_path, 0, torch.randn(4, *tiny.latent_shape, generator=torch.Generator().manual_seed(2)), samples)
    settings = _settings(tmp_path, rounds=1, prompts_per_round=4, group_size=1, batch_size=4)
    rewards = [NamedReward("human", stored_score, 0.0), NamedReward("red", redness)]
    rewards = rewards if traits_of(recipe.objective).reward_gradients else [NamedReward("human", stored_score)]
    trainer = _trainer(tiny, tmp_path, recipe, rewards, settings)
    weights = [parameter.detach().clone() for parameter in trainer.policy.parameters]
    (result,) = trainer.rounds()
    assert result.samples == 4 and result.rewards["human"] == 0.5 and trainer.policy.updates == 1
    assert any(not torch.equal(*pair) for pair in zip(weights, trainer.policy.parameters, strict=True))
    planned = dry_run(ToyPipeline.like(tiny, SAMPLING), rewards, Pool.load(tmp_path).prompts, recipe, settings, 1.0)
    assert dict(planned.total.counts) == dict(trainer.ledger.counts)


@pytest.mark.parametrize("recipe", [dpo(), gdro(), rwr(), dragon()], ids=["dpo", "gdro", "rwr", "dragon"])
def test_single_samples_are_refused_by_recipes_that_compare(tiny: SD3, tmp_path: Path, recipe: Recipe) -> None:
    settings = _settings(_pool(tiny, tmp_path), group_size=1)
    with pytest.raises(ValueError, match=r"group_size is 1, and this recipe compares the samples of a prompt: set it"):
        _trainer(tiny, tmp_path, recipe, settings=settings)
    with pytest.raises(ValueError, match=r"such as sft, kto or consistency"):
        dry_run(ToyPipeline.like(tiny, SAMPLING), [NamedReward("human", stored_score)], PROMPTS, recipe, settings, 1.0)


def test_small_groups_are_left_out_with_a_line_that_counts_them(
    tiny: SD3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    PoolInfo(tiny.autoencoder, tuple(tiny.latent_shape), ("human",), {}).write(tmp_path)
    samples = [PoolSample(Prompt(text), {"human": 1.0}) for text in "aaabbcc"]
    write_part(tmp_path, 0, torch.zeros(7, *tiny.latent_shape), samples)
    assert len(pool_of(str(tmp_path), tiny, 3).samples) == 3
    assert f"2 of the 3 groups of {tmp_path} have fewer than 3 samples (training.group_size)" in caplog.text
    caplog.clear()
    pool_of(str(tmp_path), tiny, 2)
    pool_of(str(tmp_path), tiny, 3, ProcessGroup(1, 2))
    assert caplog.text == ""


def test_rewards_are_followed_for_the_user_whose_group_was_drawn(tiny: SD3, tmp_path: Path) -> None:
    """One text of two users: what is scored, and what the gradient sees, is the prompt of the samples' own group."""
    prompts = [Prompt("a circle", {"user": user}) for user in ("ada", "bob")]
    settings = _settings(write_pool(tiny, tmp_path, prompts, group_size=3), rounds=6, prompts_per_round=1, batch_size=3)
    scored, followed = list[str](), list[str]()

    def seen(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        users = {str((prompt.metadata or {})["user"]) for prompt in prompts}
        (followed if samples.requires_grad else scored).extend(users)
        return redness(samples, prompts)

    list(_trainer(tiny, tmp_path, instruct_video(moves=2), [NamedReward("red", seen)], settings).rounds())
    assert followed == scored and set(followed) == {"ada", "bob"}


def test_other_rewards_score_the_decoded_samples(tiny: SD3, tmp_path: Path) -> None:
    rewards = [NamedReward("human", stored_score, 0.0), NamedReward("red", redness)]
    (result,) = _trainer(tiny, _pool(tiny, tmp_path), dragon(draws=1), rewards, _settings(tmp_path, rounds=1)).rounds()
    assert result.calls["decode"] == 6 and result.calls[reward_call("red")] == 6
    assert reward_call("human") not in result.calls


def test_features_are_those_of_the_decoded_samples(tiny: SD3, tmp_path: Path) -> None:
    settings = _settings(_pool(tiny, tmp_path), rounds=1)
    (result,) = _trainer(tiny, tmp_path, dragon_set(vendi_score, channels), settings=settings).rounds()
    assert result.calls["decode"] == 6


def test_a_resumed_run_takes_the_same_samples(tmp_path: Path, tiny_folder: Path) -> None:
    folder = _pool(SD3.load(tiny_folder), tmp_path / "pool")

    def session(name: str) -> Session:
        return Session(tmp_path / name, _trainer(SD3.load(tiny_folder), folder, dpo(draws=1)), ScoreLog())

    rows = session("whole").go(until=2)
    session("broken").go(until=1)
    resumed = session("broken")
    resumed.resume()
    assert resumed.go(until=2) == rows[1:]
    require_same_checkpoints(*(tmp_path / name / "round-000002" for name in ("whole", "broken")))


def _pairs(tiny: SD3, folder: Path) -> Path:
    """Write comparisons of a reference (preference 1) with a generated sample, whose reward is larger by log 3."""
    PoolInfo(tiny.autoencoder, tuple(tiny.latent_shape), ("preference", "likeness"), {}).write(folder)
    samples = [
        PoolSample(Prompt(f"{n} dogs"), {"preference": 1.0 - g, "likeness": g * math.log(3)}, group=str(n))
        for n in range(3)
        for g in (0, 1)
    ]
    latents = torch.randn(6, *tiny.latent_shape, generator=torch.Generator().manual_seed(1))
    write_part(folder, 0, latents, samples)
    return folder


RPO_REWARDS = [NamedReward("likeness", stored_score), NamedReward("preference", stored_score, 0.0)]


def test_a_preference_is_drawn_anew_in_every_round_by_its_reward() -> None:
    group, scores = (
        torch.arange(400).repeat_interleave(2),
        torch.tensor([[0.0, 1.0], [math.log(3), 0.0]]).repeat(400, 1),
    )
    rounds = [
        DrawnPreference()(RoundScores(scores, (1.0, 0.0), group, names=("likeness", "preference"), seed=f"0/{number}"))
        for number in (0, 0, 1)
    ]
    assert torch.equal(rounds[0], rounds[1]) and not torch.equal(rounds[0], rounds[2])
    assert torch.equal(rounds[0][0::2], -2 * rounds[0][1::2]) and set(rounds[0].abs().tolist()) == {1.0, 2.0}
    wins = torch.cat([credit[0::2] > 0 for credit in rounds[1:]]).double()
    assert float(wins.mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 800))  # sigmoid(-log 3)


def test_groups_that_are_no_pair_of_a_reference_teach_nothing() -> None:
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [math.nan, 0.0], [1.0, 1.0], [0.0, 0.0]])
    names = ("likeness", "preference")
    made = RoundScores(scores, (1.0, 0.0), torch.arange(3).repeat_interleave(2), names=names, seed="0")
    assert DrawnPreference()(made)[:4].tolist() == [0.0] * 4
    with pytest.raises(UnsuitableScoresError, match="no group of this round has one reference and one generated"):
        DrawnPreference()(replace(made, scores=torch.ones(6, 2)))
    with pytest.raises(ValueError, match="names the reward 'other'"):
        DrawnPreference("other")(made)


def test_a_resumed_run_draws_the_same_preferences(tmp_path: Path, tiny_folder: Path) -> None:
    folder = _pairs(SD3.load(tiny_folder), tmp_path / "pool")

    def session(name: str) -> Session:
        tiny = SD3.load(tiny_folder)
        settings = replace(_settings(folder), group_size=2, batch_size=4)
        return Session(tmp_path / name, _trainer(tiny, folder, rpo(draws=1), RPO_REWARDS, settings), ScoreLog())

    rows = session("whole").go(until=2)
    session("broken").go(until=1)
    resumed = session("broken")
    resumed.resume()
    assert resumed.go(until=2) == rows[1:]
    require_same_checkpoints(*(tmp_path / name / "round-000002" for name in ("whole", "broken")))


def test_a_dry_run_counts_no_sampling(tiny: SD3, tmp_path: Path) -> None:
    settings = _settings(_pool(tiny, tmp_path))
    rewards, recipe = [NamedReward("human", stored_score)], sft(draws=2)
    toy = ToyPipeline.like(tiny, SAMPLING)
    planned = dry_run(toy, rewards, Pool.load(tmp_path).prompts, recipe, settings, 1.0)
    trainer = _trainer(tiny, tmp_path, recipe, settings=settings)
    calls = [dict(trainer.ledger.counts) for _ in trainer.rounds()]
    assert dict(planned.total.counts) == calls[-1]


@pytest.mark.parametrize("recipe", [flow_grpo(window=1), dense_grpo(window=1), nft()], ids=["steps", "dense", "lag"])
def test_recipes_that_need_their_own_samples_are_refused(tiny: SD3, tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"which a pool does not contain|but those of a pool exist already"):
        _trainer(tiny, _pool(tiny, tmp_path), recipe)


def test_pools_of_others_are_refused(tiny: SD3, tmp_path: Path) -> None:
    folder = _pool(tiny, tmp_path / "pool")
    pool = Pool.load(folder)
    with pytest.raises(ValueError, match=r"latents of another autoencoder .*: collect a pool with this model"):
        pool.require("another", tiny.latent_shape)
    with pytest.raises(ValueError, match=r"latents of \d+x\d+x\d+, but the model samples 4x8x8: set the same size"):
        pool.require(tiny.autoencoder, (4, 8, 8))
    with pytest.raises(ValueError, match=r"no samples of the prompts in others: set prompts to the pool, too"):
        pool.restricted(PromptSet("others", (Prompt("a ring"),)))
    with pytest.raises(FileNotFoundError, match=r"is not a pool: it has no pool.json; make one with genalign collect"):
        Pool.load(tmp_path)
    with pytest.raises(ValueError, match=r"genalign.stored_score is a column of a pool"):
        stored_score(Tensor(), [])
    tensors, lines = part_files(folder, 1)
    lines.write_text(lines.read_text() + lines.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"part-00001.safetensors holds latents of .*: collect the pool again"):
        Pool.load(folder)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00001.safetensors is missing"):
        Pool.load(folder)
    info = json.loads((folder / INFO).read_text())
    (folder / INFO).write_text(json.dumps(info | {"format": 9}))
    with pytest.raises(ValueError, match=r"has format 9, but this version reads format 1"):
        Pool.load(folder)
