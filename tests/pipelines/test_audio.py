"""The audio families: Stable Audio's sampler against diffusers with the same noises, and waveforms."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from diffusers import CosineDPMSolverMultistepScheduler, EDMEulerScheduler, StableAudioPipeline
from torch import Tensor

import pipelines
from genalign.algorithms.recipes import flow_grpo
from genalign.cli.main import main
from genalign.diffusion.paths import EDMPath
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import ReplayBatch, Rollout, RolloutInputs, replay, rollout
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import DPMSDE, ODE, FlowSDE, Kernel, trainable_steps
from genalign.runtime.media import read_waveform, writer
from genalign.scoring.score import NamedReward
from genalign.search import BestOfN, FKSteering, ReNO, search
from genalign.training.memory_estimate import estimate_memory
from genalign.training.settings import TrainerSettings
from genalign.types import Prompt, PromptSet
from pipelines import AceStep, AudioLDM2, StableAudio, steer
from pipelines.base import DiffusersPipeline
from pipelines.meta_device import outline
from tests.pipelines.tiny_checkpoints import FolderOf

# torch's older weight_norm in diffusers' AutoencoderOobleck, torchsde at the ends of its interval, numpy 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have t"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

PROMPTS = ["a red circle", "two big blue squares"]
STEPS = 5
SECONDS = 3.0


@pytest.fixture
def stable_audio(folder_of: FolderOf) -> StableAudio:
    return StableAudio.load(folder_of("stable_audio"), seconds=SECONDS)


@pytest.fixture
def ace_step(folder_of: FolderOf) -> AceStep:
    return AceStep.load(folder_of("ace_step"), seconds=SECONDS)


@pytest.mark.parametrize("family", ["stable_audio", "ace_step"])
def test_opening_does_not_warn_of_weight_norm(family: str, folder_of: FolderOf) -> None:
    folder = folder_of(family)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pipelines.load(folder, seconds=SECONDS)
    assert not [warning for warning in seen if "weight_norm" in str(warning.message)]


def _ours(pipeline: DiffusersPipeline, kernel: Kernel, guidance: float) -> Rollout:
    start = RolloutInputs(pipeline.encode(PROMPTS), torch.arange(2), (1, 2), (1, 2))
    kernels = [*[kernel] * (STEPS - 1), ODE()]
    return rollout(pipeline, start, pipeline.grid(STEPS), kernels, guidance, store=range(STEPS))


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (3.0, ""), (3.0, "two blue squares")])
@pytest.mark.parametrize("kernel", [DPMSDE(), ODE()])
def test_kernels_equal_the_samplers_of_diffusers(
    folder_of: FolderOf, kernel: Kernel, guidance: float, negative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDE equals the first-order DPM-Solver++ with its noises, and the ODE equals EDM's Euler sampler."""
    stable_audio = StableAudio.load(folder_of("stable_audio"), seconds=SECONDS, negative_prompt=negative)
    noises: list[Tensor] = []
    scheduler: Any
    if isinstance(kernel, DPMSDE):
        scheduler = CosineDPMSolverMultistepScheduler(solver_order=1)
        update = scheduler.dpm_solver_first_order_update

        def record(*args: Tensor, **named: Tensor) -> Tensor:
            noises.append(named["noise"])
            return update(*args, **named)

        monkeypatch.setattr(scheduler, "dpm_solver_first_order_update", record)
        monkeypatch.setattr("genalign.diffusion.rollout.step_noise", lambda seeds, step, like: noises[step])
    else:
        options = {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "sigma_schedule": "exponential"}
        scheduler = EDMEulerScheduler(prediction_type="v_prediction", **options)
        monkeypatch.setattr(scheduler, "precondition_noise", lambda sigma: sigma.atan() * 2 / math.pi)
    pipe = StableAudioPipeline.from_pretrained(folder_of("stable_audio"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    latents: list[Tensor] = []
    waveforms = pipe(
        PROMPTS,
        audio_end_in_s=SECONDS,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        negative_prompt=[negative] * len(PROMPTS) if negative else None,
        latents=stable_audio.initial_noise([1, 2]) / stable_audio.pipe.scheduler.init_noise_sigma,
        generator=torch.Generator().manual_seed(0),
        callback=lambda step, timestep, x: latents.append(x),
    ).audios
    ours = _ours(stable_audio, kernel, guidance)
    assert len(noises) == (STEPS if isinstance(kernel, DPMSDE) else 0) and float(latents[0].std()) > 50
    assert ours.x.dtype == ours.x_next.dtype == ours.prediction.dtype == torch.float32
    for i, theirs in enumerate(latents):
        torch.testing.assert_close(ours.x_next[:, i], theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    torch.testing.assert_close(stable_audio.decode(ours.final), waveforms.clamp(-1, 1), rtol=0, atol=1e-4)


def test_noise_levels_of_stable_audio_open(stable_audio: StableAudio) -> None:
    grid = stable_audio.grid(5)
    assert grid.sigma.tolist() == pytest.approx([500, 78.254, 12.247, 1.9168, 0.3, 0], rel=1e-4)
    assert stable_audio.path == EDMPath(1.0, "v_prediction") and bool((grid.alpha == 1).all())
    assert trainable_steps(DPMSDE(), grid) == (0, 1, 2, 3)
    explicit = stable_audio.grid(2, [500.0, 2.0])
    assert explicit.timestep[1].item() == pytest.approx(0.7048327647, abs=1e-9)
    assert explicit.sigma.tolist() == [500.0, 2.0, 0.0]
    again = stable_audio.grid(5, grid.sigma[:-1].tolist())
    torch.testing.assert_close(again.timestep, grid.timestep, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="must begin at this model's sigma_max, 500, not 80"):
        stable_audio.grid(2, [80.0, 2.0])


def test_the_network_sees_latents_of_unit_variance(stable_audio: StableAudio) -> None:
    seen: list[Tensor] = []
    stable_audio.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, step = torch.full((1, *stable_audio.latent_shape), 1.5), stable_audio.grid(2, [500.0, 2.0])[1]
    with torch.no_grad():
        stable_audio.predict(x, step, stable_audio.encode(PROMPTS[:1]), 1.0)
    torch.testing.assert_close(seen[0], x * 0.4472135955)


def test_the_share_of_noise_on_every_path(stable_audio: StableAudio, ace_step: AceStep) -> None:
    share = stable_audio.grid(STEPS).noise_share
    assert share[0].item() == pytest.approx(500 / 501) and share[3].item() == pytest.approx(1.9168 / 2.9168, rel=1e-4)
    flow = ace_step.grid(STEPS)
    torch.testing.assert_close(flow.noise_share, flow.sigma)


def test_training_levels_are_even_in_the_timestep(stable_audio: StableAudio) -> None:
    level = stable_audio.level(torch.tensor([0.0, 0.5, 1.0]))
    assert level.sigma.tolist() == pytest.approx([0.3, (level.timestep[1] * math.pi / 2).tan().item(), 500], rel=1e-9)
    assert level.timestep[1].item() == pytest.approx((level.timestep[0] + level.timestep[2]).item() / 2)


@pytest.mark.parametrize("family", ["stable_audio", "ace_step", "audio_ldm2"])
def test_ratios_are_one_before_training(family: str, folder_of: FolderOf) -> None:
    pipeline = pipelines.load(folder_of(family), seconds=SECONDS)
    Policy(pipeline.denoiser, Lora(rank=4))
    kernel: Kernel = FlowSDE(0.7) if family == "ace_step" else DPMSDE()
    ours = _ours(pipeline, kernel, 3.0)
    for stored in range(STEPS - 1):
        again = replay(pipeline, ours, pipeline.grid(STEPS), kernel, ReplayBatch.of_step(stored, 2), 3.0)
        assert torch.equal(again.log_ratio, torch.zeros(2))


def test_noise_optimisation_starts_from_noise_of_the_first_level(stable_audio: StableAudio) -> None:
    spreads: list[float] = []

    class Watched(ReNO):
        def penalty(self, noises: Tensor) -> Tensor:
            if noises.numel():  # there are none where calls are counted
                spreads.append(float(noises.detach().std()))
            return super().penalty(noises)

    find = functools.partial(search, stable_audio, PROMPTS[:1], loudness, sampling=Sampling(STEPS))
    alone, tried = find(BestOfN(1)), find(Watched(iterations=1))
    torch.testing.assert_close(tried.samples, alone.samples, rtol=0, atol=1e-5)
    assert bool((find(Watched(iterations=2)).scores >= tried.scores).all())
    assert spreads[0] == pytest.approx(1.0, abs=0.3)


def test_a_spectrogram_is_of_whole_frames(folder_of: FolderOf) -> None:
    folder = folder_of("audio_ldm2")
    whole, part = (AudioLDM2.load(folder, seconds=seconds) for seconds in (None, 2.3))
    assert (whole.seconds, whole.latent_shape, whole.sample_shape) == (4.0, (4, 8, 4), (1, 64))
    assert (part.latent_shape, part.sample_shape) == ((4, 5, 4), (1, 36))  # nine frames of four, in pairs
    assert part.sample_rate == 16 and part.decode(torch.randn(1, *part.latent_shape)).shape == (1, 1, 36)
    whole.pipe.text_encoder_2.config.model_type = "vits"
    with pytest.raises(ValueError, match=r"text_encoder_2/config\.json has model_type 'vits'.*need a transcript"):
        AudioLDM2(whole.pipe)


def test_a_clip_is_cut_to_its_duration(folder_of: FolderOf) -> None:
    whole, part = (StableAudio.load(folder_of("stable_audio"), seconds=seconds) for seconds in (None, 1.5))
    assert whole.sample_shape == (2, 64) and part.sample_shape == (2, 24) and part.resolution == (24,)
    latents = torch.randn(1, *part.latent_shape)
    with torch.no_grad():
        assert torch.equal(part.decode(latents), whole.decode(latents)[..., :24])
    with pytest.raises(ValueError, match=r"above 0 and at most 4 for this model, not 4\.5"):
        StableAudio.load(folder_of("stable_audio"), seconds=4.5)


def test_a_prompt_of_ace_step_is_the_same_alone_and_among_longer_ones(ace_step: AceStep) -> None:
    x, step, both = ace_step.initial_noise([1, 2]), ace_step.grid(STEPS)[1], ace_step.encode(PROMPTS)
    lengths = both.tensors["mask"].sum(1)
    assert lengths[0] != lengths[1]
    with torch.no_grad():
        for guidance in (1.0, 3.0):
            together = ace_step.predict(x, step, both, guidance)
            for i in range(2):
                alone = ace_step.predict(x[i : i + 1], step, ace_step.encode(PROMPTS[i : i + 1]), guidance)
                torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)


def test_ace_step_has_one_loudness_and_its_own_levels(ace_step: AceStep) -> None:
    waveforms = ace_step.decode(torch.randn(2, *ace_step.latent_shape))
    assert waveforms.abs().amax((1, 2)).tolist() == pytest.approx([10 ** (-1 / 20)] * 2)
    level, grid = ace_step.level(torch.tensor([0.5])), ace_step.grid(2)
    assert level.sigma.item() == level.timestep.item() == pytest.approx(0.75)
    assert grid.sigma.tolist() == pytest.approx([1.0, 0.75, 0.0])
    assert ace_step.grid(2, [1.0, 0.4]).timestep.tolist() == [1.0, 0.4]


def test_a_turbo_model_takes_no_guidance(ace_step: AceStep) -> None:
    ace_step.pipe.is_turbo = True
    with pytest.raises(ValueError, match=r"distilled into this turbo model: set sampling\.guidance to 1, not 4"):
        ace_step.require_guidance(4.0)
    assert ace_step.guidance_scale(None) == 1.0


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("stable_audio", {"height": 64}, "makes audio: leave height and width out, and give seconds"),
        ("sd3", {"seconds": 1.0}, "makes images: leave seconds out, and give height and width"),
    ],
)
def test_sizes_of_the_other_medium_are_refused(
    family: str, options: dict[str, Any], message: str, folder_of: FolderOf
) -> None:
    with pytest.raises(ValueError, match=message):
        pipelines.load(folder_of(family), **options)


def test_an_adapter_of_another_network_or_format_is_refused(
    stable_audio: StableAudio, ace_step: AceStep, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file of an adapter"):
        stable_audio.load_lora(tmp_path)
    policy = Policy(stable_audio.denoiser, Lora(rank=2))
    assert policy.config is not None
    stable_audio.save_lora(tmp_path, policy.adapter_state(), policy.config)
    with pytest.raises(ValueError, match="was trained on another base checkpoint"):
        ace_step.load_lora(tmp_path)
    (tmp_path / "base.json").unlink()
    with pytest.raises(ValueError, match=r"entries fit no layer of this model, such as 'base_model\.model\."):
        ace_step.load_lora(tmp_path)


@pytest.mark.parametrize(("family", "denoiser"), [("stable_audio", "transformer"), ("audio_ldm2", "unet")])
def test_the_memory_of_audio_is_estimated(family: str, denoiser: str, folder_of: FolderOf) -> None:
    meta = outline(folder_of(family), seconds=SECONDS)
    names = [network.name for network in meta.networks]
    assert names[0] == denoiser and {"vae", "text_encoder"} <= {*names}
    policy = Policy(meta.pipeline.denoiser, Lora(2))
    sizes = TrainerSettings(group_size=4, batch_size=4).fit(PromptSet.of(["first", "second"]), "sample")
    rewards = [NamedReward("loudness", loudness)]
    (estimate,) = estimate_memory(meta, policy, flow_grpo(), sizes, Sampling(3, guidance=3.0), rewards).values()
    assert estimate.phases["decoding"]["tensors"] > 4 * math.prod(meta.pipeline.sample_shape) * 4
    assert estimate.peaks["encoding texts"] > 0 and estimate.peak[1] == max(estimate.peaks.values())


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_waveforms_are_written_at_their_rate_and_nan_as_silence(tmp_path: Path, suffix: str) -> None:
    samples = torch.rand(2, 2, 4800) * 2 - 1
    samples[1, 0, 100] = math.nan
    names = writer(44100, suffix)(samples, tmp_path, 7)
    assert names == [f"audio/00007.{suffix}", f"audio/00008.{suffix}"]
    assert soundfile.info(tmp_path / names[1]).format == suffix.upper()
    audio = read_waveform(tmp_path / names[1])
    assert audio.sample_rate == 44100
    torch.testing.assert_close(audio.waveform, samples[1].nan_to_num(), rtol=0, atol=1 / 32767)
    with pytest.raises(ValueError, match="are not of the medium 'audio'"):
        writer(16)(samples[None], tmp_path, 0)


def loudness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.abs().flatten(1).mean(1)


@pytest.mark.parametrize("audio", ["wav", "flac"])
def test_steer_writes_audio_and_a_page_that_plays_it(audio: str, folder_of: FolderOf, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {
        "output": str(tmp_path / "found"),
        "model": {"path": str(folder_of("stable_audio")), "seconds": SECONDS},
        "prompts": str(tmp_path / "prompts.txt"),
        "rewards": {"loud": {"function": f"{__name__}.loudness"}},
        "strategy": {"class_path": "genalign.search.BestOfN", "init_args": {"candidates": 2}},
        "sampling": {"num_steps": 3},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert main(["steer", "--config", str(tmp_path / "config.yaml"), "--audio", audio]) == 0
    waveform, rate = soundfile.read(tmp_path / "found" / "audio" / f"00001.{audio}")
    assert waveform.shape == (48, 2) and rate == 16
    page = (tmp_path / "found" / "report.html").read_text()
    assert page.count('<audio controls preload="metadata" src="data:audio/flac;base64,') == 2 * len(
        PROMPTS
    )  # beside what plain sampling makes


def test_guidance_does_not_lead_away_from_the_empty_prompt(stable_audio: StableAudio) -> None:
    """diffusers takes zeros without a negative prompt, but encodes an empty one."""
    empty = stable_audio.encode([""]).tensors
    assert bool(empty["context"].any())
    away = stable_audio.unconditional_tensors(empty)
    assert not bool(away["context"].any()) and torch.equal(away["seconds"], empty["seconds"])


def test_momentum_in_guidance_is_not_resampled(ace_step: AceStep) -> None:
    message = r"AceStepPipeline guides with a momentum"
    with pytest.raises(ValueError, match=message), steer(ace_step.pipe, loudness, FKSteering(2, lam=1.0)):
        pass
