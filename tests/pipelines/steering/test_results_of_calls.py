"""What a steering says after a call: the gain over plain sampling with its cost, and rewards that never score."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

import genalign.search
from genalign.scoring.score import RewardError
from genalign.search import DNO, NRG, Beam, BestOfN, Evolution, FKSteering, Prune, ReNO, ZeroOrder
from genalign.search.stepwise import StepwiseStrategy
from pipelines import prune, steer
from pipelines.steering.latent_scores import decode_latents
from pipelines.steering.steer import Steering
from tests.pipelines.steering.test_prompts_of_calls import ENCODED, _call, _open
from tests.pipelines.tiny_checkpoints import FolderOf
from tests.pipelines.tiny_pipelines import STEPS, Family, flux, sd3, sd15, sdxl, stable_audio

pytestmark = [  # of diffusers: tensors of numpy arrays, torch's old weight norm, and rounding in torchsde
    pytest.mark.filterwarnings("ignore:Should have t[ab](>=t0|<=t1) but:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]
PARTICLES = 4
FK = FKSteering(PARTICLES, lam=1e5, start=0.0, stop=0.5, every=0.25, ess=None)


def loudness(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    return samples.flatten(1).mean(1)


def plain_of(steering: Steering, place: int = 0) -> Any:
    plain = steering.result.per_prompt[place].plain
    assert plain is not None
    return plain


@pytest.mark.parametrize("build", [sd15, sdxl, sd3, flux], ids=lambda build: build.__name__)
def test_gain_is_over_an_unsteered_call_of_the_first_particle(build: Any) -> None:
    family: Family = build()
    with steer(family.pipe, loudness, FK, prompts=["noise"]) as steering:
        family.run(range(PARTICLES))
    unsteered = decode_latents(family.pipe, family.run([0]), (8, 8))
    plain = plain_of(steering)
    torch.testing.assert_close(plain.sample, unsteered[0], rtol=0, atol=1e-4)
    assert plain.extra and plain.ledger.counts == {"nfe": STEPS * family.nfe, "decode": 1, "reward/reward": 1}
    assert steering.ledger.nfe == STEPS * PARTICLES * family.nfe  # the plain call is counted apart
    (one,) = steering.result.per_prompt
    assert one.ledger.nfe == steering.ledger.nfe and one.samples.shape[0] == PARTICLES
    torch.testing.assert_close(one.gain, one.scores[0] - loudness(unsteered, []), rtol=0, atol=1e-4)
    torch.testing.assert_close(one.scores[:, 0], loudness(one.samples, []), rtol=0, atol=1e-5)
    assert float(one.scores[0]) == float(steering.scores[0])


@pytest.mark.parametrize("family", ENCODED)
def test_calls_by_text_have_a_plain_sample_of_each_prompt(family: str, folder_of: FolderOf) -> None:
    pipe, strategy = _open(folder_of(family)), FKSteering(2, start=0.0, stop=0.0)
    if family == "stable_audio":
        pipe.scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0)
    if family == "qwen_image":
        strategy = BestOfN()
    kind, made = type(pipe), {"num_inference_steps": 3}
    with steer(pipe, loudness, strategy) as steering:
        assert str(steering) == "no call of the pipeline is complete yet"
        assert type(pipe).__name__ == kind.__name__ and isinstance(pipe, kind)
        _call(pipe, family, prompt=["a ring", "a red circle"], generator=torch.Generator().manual_seed(3), **made)
        assert [one.prompt.text for one in steering.result.per_prompt] == ["a ring", "a red circle"]
        two = [plain_of(steering, place) for place in range(2)]
        _call(pipe, family, prompt="a ring", generator=torch.Generator().manual_seed(3), **made)
        assert "a red circle" not in str(steering)  # it is of the last call
    assert type(pipe) is kind
    assert all(plain.extra == (strategy != BestOfN()) for plain in two)
    assert not torch.equal(two[0].sample, two[1].sample) and all(bool(one.scores.isfinite().all()) for one in two)
    torch.testing.assert_close(plain_of(steering).sample, two[0].sample, rtol=0, atol=1e-3)  # of the same noise


def test_best_of_n_holds_its_plain_sample() -> None:
    family = sd15()
    with steer(family.pipe, loudness, BestOfN(), prompts=["noise", "silence"]) as steering:
        family.run(range(4))
    alone = decode_latents(family.pipe, family.run([0, 2]))
    for place in range(2):
        plain = plain_of(steering, place)
        torch.testing.assert_close(plain.sample, alone[place], rtol=0, atol=1e-4)
        assert not plain.extra and plain.ledger.counts == {"nfe": STEPS * 2, "decode": 1, "reward/reward": 1}
    assert steering.result.plain_ledger.nfe == 0
    assert str(steering).count("(plain: 8 NFE, among them)") == 2


def test_the_schedulers_own_moves_without_resampling_are_plain_sampling() -> None:
    family, still = sd15().on(EulerAncestralDiscreteScheduler), FKSteering(2, lam=0.0, kernel=None)
    with steer(family.pipe, loudness, still, prompts=["noise", "silence"]) as steering:
        family.run(range(4))
    assert not plain_of(steering).extra
    torch.testing.assert_close(
        plain_of(steering, 1).sample, decode_latents(family.pipe, family.run([2]))[0], rtol=0, atol=1e-4
    )


def test_plain_sampling_can_be_left_out_or_fail_without_loss(caplog: pytest.LogCaptureFixture) -> None:
    family = sd15()
    with steer(family.pipe, loudness, FK, prompts=["noise"], plain=False) as steering:
        family.run(range(PARTICLES))
    assert steering.result.per_prompt[0].plain is None and "over plain" not in str(steering) and caplog.text == ""

    class Started(StableDiffusionPipeline):
        """A pipeline that moves the latents that it is called with."""

        def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_latents(*args, **kwargs) + 1.0

    family.pipe.__class__ = Started
    with steer(family.pipe, loudness, FK, prompts=["noise"]) as steering:
        images = family.run(range(PARTICLES))
    assert len(images) == PARTICLES and steering.result.per_prompt[0].plain is None
    (line,) = (record.message for record in caplog.records)
    assert "the plain call failed (the pipeline does not start from the latents" in line and "plain=False" in line


def test_callbacks_of_the_user_see_the_steered_call_alone() -> None:
    family, seen = sd15(), []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    with steer(family.pipe, loudness, FK, prompts=["noise"]):
        family.run(range(PARTICLES), callback_on_step_end=note)
    assert seen == list(range(STEPS))


def test_a_steering_prints_saves_and_tiles_its_last_call(tmp_path: Path) -> None:
    family = sd15()
    with steer(family.pipe, {"loud": loudness, "quiet": lambda x, p: -loudness(x, p)}, FK, prompts="noise") as steering:
        with pytest.raises(ValueError, match="no call of the pipeline is complete: call it within the with block"):
            _ = steering.pil
        family.run(range(PARTICLES))
    text = str(steering)
    assert text.startswith("noise: loud ") and "NFE, counted apart)" in text and "tensor" not in repr(steering)
    assert f"{STEPS * PARTICLES * 2} NFE, {3 * PARTICLES} decodes" in text  # two previews and the end
    (image,) = steering.pil
    width, height = image.size
    assert steering.grid().size == (width * (1 + PARTICLES), height)
    (row,) = json.loads((steering.save(tmp_path) / "scores.json").read_text())
    assert (tmp_path / row["plain"]["image"]).is_file() and len(row["top"]) == PARTICLES - 1
    assert row["scores"]["loud"] == pytest.approx(float(steering.scores[0, 0]))


def test_sound_is_saved_at_the_rate_of_its_autoencoder(tmp_path: Path) -> None:
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0)
    family = stable_audio(scheduler=scheduler)
    with steer(family.pipe, loudness, BestOfN(), prompts=["noise"]) as steering:
        family.run(range(2))
    assert steering.result.sample_rate == 16
    assert (steering.save(tmp_path) / "audio" / "00000.wav").is_file()


# --- rewards that never score -----------------------------------------------------------------------------------------


def raising(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    raise KeyError("color")


def nothing(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.full((len(samples),), math.nan)


@pytest.mark.parametrize("strategy", [FK, BestOfN(4)], ids=repr)
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, r"reward 'bad' scored none of .*: it raised KeyError: 'color' \(test_results_of_calls\.py:\d+\)"),
        (nothing, "reward 'bad' scored none of the 4 samples of the call: it returned NaN"),
    ],
)
def test_a_reward_that_never_scores_ends_the_call(strategy: StepwiseStrategy, reward: Any, message: str) -> None:
    family = sd15()
    rewards = {"good": loudness, "bad": reward}
    with pytest.raises(RewardError, match=message), steer(family.pipe, rewards, strategy, prompts=["noise"]):
        family.run(range(PARTICLES))
    assert type(family.pipe) is StableDiffusionPipeline and "step" not in vars(family.pipe.scheduler)
    call = {
        **family.shared,
        **{key: tensor[:1] for key, tensor in family.samples.items()},
        "num_inference_steps": STEPS,
    }
    with pytest.raises(RewardError, match="reward 'bad' scored none of"):
        prune(family.pipe, "noise", rewards, Prune((0,), (0.5,), 2), **call)


def test_a_reward_that_fails_on_some_samples_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def moody(samples: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = loudness(samples, prompts)
        return torch.where(scores == scores.max(), math.nan, scores) if len(scores) > 1 else scores

    family = sd15()
    with caplog.at_level(logging.ERROR), steer(family.pipe, moody, FK, prompts=["noise"]) as steering:
        family.run(range(PARTICLES))
    assert bool(steering.result.scores.isfinite().all())


def test_a_steering_that_never_resampled_says_what_to_try(caplog: pytest.LogCaptureFixture) -> None:
    family = sd15()
    with steer(family.pipe, loudness, replace(FK, lam=1e-3, ess=0.5), prompts=["noise"]):
        family.run(range(PARTICLES))
    assert "FK steering never resampled" in caplog.text and "at lam=0.001" in caplog.text
    assert "try lam='auto', or lam=" in caplog.text


# --- strategies and schedulers ----------------------------------------------------------------------------------------

STRATEGIES = {
    "FKSteering": FK,
    "BestOfN": BestOfN(PARTICLES),
    "Prune": Prune((1,), (0.5,), PARTICLES),
    "Beam": Beam(),
    "ZeroOrder": ZeroOrder(1),
    "Evolution": Evolution(),
    "ReNO": ReNO(1),
    "DNO": DNO(1),
    "NRG": NRG(1.0),
}
WORKING = ("FKSteering", "BestOfN")


def test_every_public_strategy_steers_or_is_refused_by_name() -> None:
    public = {
        name: kind
        for name, kind in vars(genalign.search).items()
        if inspect.isclass(kind) and list(inspect.signature(kind.__call__).parameters)[1:] == ["run", "budget"]
    }
    assert set(STRATEGIES) == set(public)
    for name, strategy in STRATEGIES.items():
        family = sd15()
        if name in WORKING:
            with steer(family.pipe, loudness, strategy, prompts=["noise"]) as steering:
                family.run(range(PARTICLES))
            assert steering.result.samples.shape[0] == 1
            continue
        message = (
            f"^{name} cannot steer a pipeline of your own.*FKSteering and BestOfN can, and Prune by pipelines.prune"
        )
        with pytest.raises(TypeError, match=message), steer(family.pipe, loudness, strategy, prompts=["noise"]):
            family.run(range(PARTICLES))


@pytest.mark.parametrize("skip", [True, False])
def test_sd15_is_steered_with_pndm_as_it_is_shipped(skip: bool) -> None:
    """The second evaluation at one level moves nothing."""
    family = sd15().on(PNDMScheduler, skip_prk_steps=skip)
    with steer(family.pipe, loudness, FKSteering(PARTICLES), prompts=["noise"]) as steering:
        family.run(range(PARTICLES))
    assert any(node["parent"] is not None for node in steering.result.lineage)


def test_a_refused_scheduler_names_the_line_that_mends_it() -> None:
    family = sd15().on(HeunDiscreteScheduler)
    with (
        pytest.raises(ValueError, match=r"set pipe\.scheduler = DDIMScheduler\.from_config\((.*)\)") as refused,
        steer(family.pipe, loudness, FK, prompts=["noise"]),
    ):
        family.run(range(PARTICLES))
    line = str(refused.value).partition("set ")[2].partition(", or another of ")[0]
    exec(line, {"pipe": family.pipe, "DDIMScheduler": DDIMScheduler})
    with steer(family.pipe, loudness, FK, prompts=["noise"]) as steering:
        family.run(range(PARTICLES))
    assert steering.scores is not None
