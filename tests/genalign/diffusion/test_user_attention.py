"""Attention to users: a network without them, their effect, the reference, files, dropout, training and resuming."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.algorithms.preference_recipes import dpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import distinct_inputs
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.user_attention import (
    USER,
    USERS_FILE,
    Users,
    attach_users,
    projection_state,
    projections_of,
    with_user_dropout,
)
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.offline import stored_score
from genalign.training.pools import Pool, PoolInfo, PoolSample, write_part
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, users_of
from pipelines import SD3
from tests.genalign.training.toy_runs import Session, require_same_checkpoints

SAMPLING = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25), guidance=1.0)
ADA, BOB, NOBODY = Prompt("a circle", {"user": "ada"}), Prompt("a circle", {"user": "bob"}), Prompt("a circle")


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "embeddings.safetensors"
    generator = torch.Generator().manual_seed(0)
    Users({name: torch.randn(2, 6, generator=generator) for name in ("ada", "bob")}, {}).save(path)
    return path


def _predicted(pipeline: SD3, prompts: list[Prompt], guidance: float = 1.0) -> Tensor:
    x = pipeline.initial_noise([7]).expand(len(prompts), -1, -1, -1)
    with torch.no_grad():
        return pipeline.predict(x, pipeline.grid(4)[2], pipeline.encode(prompts), guidance)


def _taught(pipeline: SD3) -> None:
    """Give V' values, as training does."""
    for number, projections in enumerate(projections_of(pipeline.denoiser)):
        generator = torch.Generator().manual_seed(number)
        projections.to_value.weight.data.normal_(std=0.3, generator=generator)


def test_an_untrained_attention_to_users_changes_nothing(tiny_folder: Path, users: Path) -> None:
    plain, seeing = SD3.load(tiny_folder), SD3.load(tiny_folder, users=str(users))
    assert len(projections_of(seeing.denoiser)) == 2 and plain.fingerprint == seeing.fingerprint
    torch.testing.assert_close(_predicted(seeing, [ADA, NOBODY]), _predicted(plain, [ADA, NOBODY]), rtol=0, atol=0)


def test_each_sample_sees_its_own_user_and_none_is_the_network_itself(tiny_folder: Path, users: Path) -> None:
    plain, seeing = SD3.load(tiny_folder), SD3.load(tiny_folder, users=str(users))
    _taught(seeing)
    together = _predicted(seeing, [ADA, BOB, NOBODY])
    for row, prompt in enumerate([ADA, BOB, NOBODY]):
        torch.testing.assert_close(together[row], _predicted(seeing, [prompt])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[2], _predicted(plain, [NOBODY])[0], rtol=1e-4, atol=1e-4)
    assert float((together[0] - together[1]).abs().max()) > 1e-2
    # the unconditional rows of guidance see no user
    guided = _predicted(seeing, [ADA], guidance=3.0)
    away = _predicted(plain, [Prompt("")])
    torch.testing.assert_close(guided, away + 3 * (_predicted(seeing, [ADA]) - away), rtol=1e-3, atol=1e-3)


def test_the_output_of_a_layer_is_its_own_plus_attention_to_the_user(tiny_folder: Path, users: Path) -> None:
    """Z + softmax(Q K'^T / sqrt(d)) V', by torch's own attention."""
    pipeline = SD3.load(tiny_folder, users=str(users))
    _taught(pipeline)
    layer = pipeline.denoiser.transformer_blocks[0].attn
    hidden, context = torch.randn(2, 16, 64), torch.randn(2, 5, 64)
    with torch.no_grad():
        plain, _ = layer(hidden, context)
        embeddings = Users.load(users).rows([ADA, BOB])
        layer.user_projections.embeddings = embeddings
        seen, _ = layer(hidden, context)
        query = layer.to_q(hidden).unflatten(2, (layer.heads, -1)).transpose(1, 2)
        query = query if layer.norm_q is None else layer.norm_q(query)
        keys, values = (
            project(embeddings).unflatten(2, (layer.heads, -1)).transpose(1, 2)
            for project in (layer.user_projections.to_key, layer.user_projections.to_value)
        )
        attended = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen - plain, F.linear(attended, layer.to_out[0].weight), rtol=1e-3, atol=1e-4)


def test_tastes_are_interpolated(users: Path) -> None:
    loaded = Users.load(users)
    mixed = loaded.rows([Prompt("a", {"user": {"ada": 0.25, "bob": 0.75}})])[0]
    torch.testing.assert_close(mixed, 0.25 * loaded.embeddings["ada"] + 0.75 * loaded.embeddings["bob"])
    assert users_of("a plain string") == {} and Prompt("a", {"user": {"ada": 0.5}}).task == "0.5 ada"
    with pytest.raises(ValueError, match=r"user 'cy' has no embedding \(2 others have\)"):
        loaded.rows([Prompt("a", {"user": "cy"})])
    with pytest.raises(ValueError, match="a prompt's user is a name, or names with weights"):
        users_of(Prompt("a", {"user": 3}))
    texts, rows = distinct_inputs([ADA, BOB, ADA, NOBODY])
    assert rows.tolist() == [0, 1, 0, 2] and [users_of(text) for text in texts] == [{"ada": 1.0}, {"bob": 1.0}, {}]


def test_users_are_dropped_by_seed() -> None:
    prompts = [ADA] * 400
    dropped = [users_of(prompt) == {} for prompt in with_user_dropout(prompts, 0.25, "0/1")]
    assert 0.15 < sum(dropped) / 400 < 0.35
    assert dropped == [users_of(prompt) == {} for prompt in with_user_dropout(prompts, 0.25, "0/1")]
    assert dropped != [users_of(prompt) == {} for prompt in with_user_dropout(prompts, 0.25, "0/2")]
    assert with_user_dropout([ADA], 0.0, "0")[0].metadata == {"user": "ada"}


def test_the_reference_sees_no_user_and_a_frozen_adapter_is_part_of_it(tiny_folder: Path, users: Path) -> None:
    for frozen in (False, True):
        plain, pipeline = SD3.load(tiny_folder), SD3.load(tiny_folder, users=str(users))
        _taught(pipeline)
        policy = Policy(pipeline.denoiser, Lora(rank=2, frozen=frozen), seed=0)
        names = {n for n, p in pipeline.denoiser.named_parameters() if p.requires_grad}
        assert all("user_projections" in name for name in names) is frozen
        with policy.reference():
            torch.testing.assert_close(_predicted(pipeline, [ADA]), _predicted(plain, [ADA]), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(_predicted(pipeline, [ADA]), _predicted(plain, [ADA]), atol=1e-2)
        assert {n for n, p in pipeline.denoiser.named_parameters() if p.requires_grad} == names
        assert len(policy.parameters) == len(names)
    with pytest.raises(ValueError, match=r"lora\.frozen trains the attention to users alone, for which there is no"):
        policy.drift()


def _pairs(pipeline: SD3, folder: Path) -> Path:
    """Ada prefers latents of value 1 and Bob those of value -1, for the same prompts."""
    PoolInfo(pipeline.autoencoder, tuple(pipeline.latent_shape), ("preference",), {}).write(folder)
    samples, latents = list[PoolSample](), list[Tensor]()
    for number in range(4):
        for user, liked in (("ada", 1.0), ("bob", -1.0)):
            for value in (1.0, -1.0):
                prompt = Prompt(f"{number} circles", {"user": user})
                samples.append(PoolSample(prompt, {"preference": float(value == liked)}, group=f"{user}{number}"))
                latents.append(torch.full(pipeline.latent_shape, value))
    write_part(folder, 0, torch.stack(latents), samples)
    return folder


def _session(tiny_folder: Path, users: Path, pool: Path, output: Path, rounds: int = 2, rate: float = 1e-2) -> Session:
    pipeline = SD3.load(tiny_folder, height=32, width=32, users=str(users))
    policy = Policy(pipeline.denoiser, Lora(rank=2, frozen=True), ema_decay=0.5, seed=0)
    settings = TrainerSettings(
        rounds=rounds,
        prompts_per_round=4,
        group_size=2,
        updates_per_round=1,
        learning_rate=rate,
        data=str(pool),
        user_dropout=0.1,
    )
    rewards = [NamedReward("preference", stored_score)]
    trainer = Trainer(pipeline, policy, rewards, Pool.load(pool).prompts, dpo(draws=1), settings, SAMPLING)
    return Session(output, trainer, ScoreLog())


def test_a_resumed_run_learns_the_same(tiny_folder: Path, users: Path, tmp_path: Path) -> None:
    pool = _pairs(SD3.load(tiny_folder, height=32, width=32), tmp_path / "pool")
    rows = _session(tiny_folder, users, pool, tmp_path / "whole").go(until=2)
    _session(tiny_folder, users, pool, tmp_path / "broken").go(until=1)
    resumed = _session(tiny_folder, users, pool, tmp_path / "broken")
    resumed.resume()
    assert resumed.go(until=2) == rows[1:]
    require_same_checkpoints(*(tmp_path / name / "round-000002" for name in ("whole", "broken")))


def test_opposite_tastes_are_learned_by_one_network(tiny_folder: Path, users: Path, tmp_path: Path) -> None:
    pool = _pairs(SD3.load(tiny_folder, height=32, width=32), tmp_path / "pool")
    session = _session(tiny_folder, users, pool, tmp_path / "run", rounds=12, rate=3e-2)
    list(session.trainer.rounds())
    pipeline = session.trainer.pipeline.pipeline  # type: ignore[attr-defined]
    x = pipeline.initial_noise(range(4))
    step = pipeline.grid(4)[2]
    means = {}
    for name, user in (("ada", {"user": "ada"}), ("bob", {"user": "bob"}), ("none", None)):
        prompts = [Prompt(f"{number} circles", user) for number in range(4)]
        with torch.no_grad():
            prediction = pipeline.predict(x, step, pipeline.encode(prompts), 1.0)
        means[name] = float(pipeline.path.x0(x, prediction, step).mean())
    assert means["ada"] > means["none"] > means["bob"]
    # the adapter and the users are written together, and new users may take the place of those
    state = session.trainer.policy.adapter_state()
    config = session.trainer.policy.config
    assert config is not None
    pipeline.save_lora(tmp_path / "lora", state, config)
    saved = Users.load(tmp_path / "lora" / USERS_FILE)
    assert (
        saved.embeddings.keys() == {"ada", "bob"}
        and saved.projections.keys() == projection_state(pipeline.denoiser).keys()
    )
    opened = SD3.load(tiny_folder, height=32, width=32, users=str(users))
    opened.load_lora(tmp_path / "lora")
    conditioning = pipeline.encode([Prompt("0 circles", {"user": "ada"})])
    assert torch.equal(opened.predict(x[:1], step, conditioning, 1.0), pipeline.predict(x[:1], step, conditioning, 1.0))
    with pytest.raises(ValueError, match=r"was trained with users: set model.users to"):
        SD3.load(tiny_folder, height=32, width=32).load_lora(tmp_path / "lora")


def test_what_users_do_not_go_with_is_refused(tiny: SD3, tiny_folder: Path, users: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora.frozen leaves nothing to train"):
        Policy(copy.deepcopy(tiny.denoiser), Lora(rank=2, frozen=True))
    seeing = SD3.load(tiny_folder, users=str(users))
    with pytest.raises(ValueError, match="trained beside an adapter"):
        Policy(seeing.denoiser, None)
    with pytest.raises(ValueError, match=r"without model.compile, model.memory.checkpointing"):
        SD3.load(tiny_folder, users=str(users), compile=True)
    with pytest.raises(ValueError, match="Linear has no attention to the text"):
        attach_users(torch.nn.Linear(2, 2), Users.load(users))
    with pytest.raises(FileNotFoundError, match="write one with genalign learn-users"):
        Users.load(tmp_path / "none")
    with pytest.raises(ValueError, match="embeddings of one shape"):
        Users({"ada": torch.zeros(1, 2), "bob": torch.zeros(1, 3)}, {})
    other = replace(
        Users.load(users), projections={"transformer_blocks.0.attn.user_projections.to_key.weight": torch.ones(1, 1)}
    )
    with pytest.raises(ValueError, match="trained with another network than this one"):
        attach_users(copy.deepcopy(tiny.denoiser), other)
    assert USER in seeing.encode(["a circle"]).tensors and USER not in tiny.encode(["a circle"]).tensors
