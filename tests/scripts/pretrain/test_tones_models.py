"""The networks of the tones world, as diffusers and transformers open them, and their data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ClapModel, ClapProcessor

from genalign.worlds import tones
from genalign.worlds.tones.instruments import LENGTH
from scripts.pretrain.captions import require_metadata
from scripts.pretrain.tones_audio import spectral_loss
from scripts.pretrain.tones_clap import assemble_clap, build_clap, feature_extractor, log_mel, matrices
from scripts.pretrain.tones_models import (
    FRAMES,
    LATENT_CHANNELS,
    TonesTextToAudio,
    assemble,
    build_vae,
    scale_latents,
    tokenizer,
)

pytestmark = [  # diffusers' own: its autoencoder and transformer use what torch and it have deprecated
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab](>=t0|<=t1) but:UserWarning"),  # rounding in torchsde
    pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning"),
]

TEXTS = ["a C5 organ tone", "two noise bursts", "a quiet sine tone then a louder square tone"]


def waves(count: int = 4) -> torch.Tensor:
    rng = np.random.default_rng(0)
    chosen = [group[0] for group in tones.prompts("iid").by_task().values()][:count]
    return tones.render([tones.sample_clip(require_metadata(prompt), rng) for prompt in chosen])


def test_a_clip_is_a_whole_number_of_frames() -> None:
    torch.manual_seed(0)
    vae, clips = build_vae(), waves()
    latents = vae.encode(clips).latent_dist.mode()
    assert latents.shape == (4, LATENT_CHANNELS, FRAMES)
    assert vae.decode(latents).sample.shape == (4, 1, LENGTH)


@torch.no_grad()
def test_scaled_latents_decode_as_before() -> None:
    torch.manual_seed(0)
    vae, clips = build_vae(), waves()
    posterior = vae.encode(clips).latent_dist
    decoded = vae.decode(posterior.mean).sample
    scale = torch.rand(LATENT_CHANNELS) + 0.5
    scale_latents(vae, scale)
    scaled = vae.encode(clips).latent_dist
    torch.testing.assert_close(scaled.mean, posterior.mean * scale.view(1, -1, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(scaled.mean).sample, decoded, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vanilla_diffusers_opens_the_folder_and_sees_the_same_network(tmp_path: Path) -> None:
    """One step of its sampler lands on x0 = z cos - v sin, from the network as it is trained."""
    pytest.importorskip("torchsde")
    from diffusers import StableAudioPipeline

    torch.manual_seed(0)
    model = TonesTextToAudio(layers=2, width=64)
    model.transformer.half().float()  # as it is stored
    assemble(model, build_vae(), tmp_path)
    pipeline = StableAudioPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    shipped = pipeline.scheduler
    pipeline.scheduler = shipped.from_config(shipped.config, sigma_min=1.0)  # where a single step begins: at t = 1/2
    x = torch.randn(len(TEXTS), LATENT_CHANNELS, FRAMES, generator=torch.Generator().manual_seed(1))
    start = x / pipeline.scheduler.init_noise_sigma
    made = pipeline(TEXTS, num_inference_steps=1, guidance_scale=1.0, latents=start, output_type="latent").audios
    z, half = x / 2**0.5, torch.full((len(TEXTS),), 0.5)
    velocity = model.float()(z, half, *model.tokens(TEXTS), torch.ones(len(TEXTS), dtype=torch.bool))
    torch.testing.assert_close(made, (z - velocity) / 2**0.5, rtol=1e-3, atol=1e-3)
    pipeline.scheduler = shipped
    assert pipeline(TEXTS[:1], num_inference_steps=2, guidance_scale=2.0).audios.shape == (1, 1, LENGTH)


def test_words_that_are_withheld_do_not_matter() -> None:
    torch.manual_seed(0)
    model = TonesTextToAudio(layers=1, width=64)
    z, time = torch.randn(1, LATENT_CHANNELS, FRAMES), torch.tensor([0.4])
    present, withheld = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    one, other = (model.tokens([text]) for text in TEXTS[:2])
    assert torch.equal(model(z, time, *one, withheld), model(z, time, *other, withheld))
    assert not torch.equal(model(z, time, *one, present), model(z, time, *other, present))


@torch.no_grad()
def test_frames_know_where_they_are_before_training() -> None:
    """The first block changes a frame by its distance from the clip's start, in the middle of the clip as well."""
    torch.manual_seed(0)
    model, found = TonesTextToAudio(layers=1, width=64), list[torch.Tensor]()
    model.transformer.transformer_blocks[0].attn1.register_forward_hook(lambda *call: found.append(call[-1]))
    ids, mask = model.tokens(TEXTS[:1])
    z, time = torch.randn(512, LATENT_CHANNELS, FRAMES), torch.full((512,), 0.9)
    model(z, time, ids.expand(512, -1), mask.expand(512, -1), torch.ones(512, dtype=torch.bool))
    means = found[0][:, 1:].mean(0)  # over noise: what depends on the place alone
    distances = [float((means[frame] - means[60]).norm()) for frame in (15, 30, 45)]
    chance = float(found[0][:, 61].std(0).norm()) / 512**0.5  # of a mean of 512
    assert distances[0] > distances[1] > distances[2] > 3 * chance


@torch.no_grad()
def test_transformers_opens_the_clap_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, clips = build_clap().eval(), waves(3)
    assert all(weight.ndim == 2 for weight in matrices(model))
    assemble_clap(model, tmp_path)
    opened = ClapModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = ClapProcessor.from_pretrained(tmp_path)
    inputs = processor(
        text=TEXTS, audio=list(clips[:, 0].numpy()), sampling_rate=8000, padding=True, return_tensors="pt"
    )
    words = tokenizer()(TEXTS, padding="max_length", return_tensors="pt")
    ours = model.float()(input_features=log_mel(clips), **words)
    torch.testing.assert_close(opened(**inputs).logits_per_audio, ours.logits_per_audio, rtol=1e-2, atol=1e-2)


def test_features_are_those_of_the_extractor() -> None:
    clips = waves()
    theirs = feature_extractor()(list(clips[:, 0].numpy()), sampling_rate=8000, return_tensors="pt").input_features
    ours, heard = log_mel(clips), theirs > -80  # dB; below, rounding of float32 shows, up to the floor of -100
    torch.testing.assert_close(ours[heard], theirs[heard], rtol=0, atol=0.02)
    torch.testing.assert_close(ours[~heard], theirs[~heard], rtol=0, atol=0.2)


def test_the_spectral_loss_hears_pitch_and_level_but_not_phase() -> None:
    seconds = torch.arange(4000) / 8000

    def sine(hertz: float, gain: float = 0.3, phase: float = 0.0) -> torch.Tensor:
        return gain * torch.sin(2 * torch.pi * hertz * seconds + phase)[None, None]

    turned, detuned, quiet = (
        float(spectral_loss(wave, sine(440))) for wave in (sine(440, 0.3, 1), sine(523), sine(440, 0.1))
    )
    assert 3 * turned < min(detuned, quiet)
    assert float(spectral_loss(sine(440), sine(440))) == 0
