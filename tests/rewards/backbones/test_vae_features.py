"""Features of a model's own VAE: its latents, part by part, for images and for waveforms of other formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderOobleck, AutoencoderTiny

from genalign.types import Prompt
from rewards.backbones.audio_features import FrameFeatures, extract_frame_features
from rewards.backbones.encoders import PatchFeatures
from rewards.backbones.image_features import extract_features
from rewards.backbones.reference_images import ImageTensor
from rewards.backbones.vae_features import VaeFeatures
from rewards.set_rewards import FrameFrechetReward, FrechetReward, PerSampleFrechetReward

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # of diffusers' Oobleck


@pytest.fixture(scope="module")
def image_vae(tiny_folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_folder, subfolder="vae").eval()


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stereo VAE of 8 channels and 16 samples a frame, at 4 kHz."""
    torch.manual_seed(0)
    sizes = {"encoder_hidden_size": 16, "decoder_channels": 8, "decoder_input_channels": 8}
    vae = AutoencoderOobleck(
        **sizes, downsampling_ratios=[4, 4], channel_multiples=[1, 2], audio_channels=2, sampling_rate=4000
    )
    folder: Path = tmp_path_factory.mktemp("audio")
    vae.save_pretrained(folder / "vae")
    return folder


def test_the_parts_of_an_image_are_its_latent_pixels(tiny_folder: Path, image_vae: AutoencoderKL) -> None:
    images, encoder = torch.rand(3, 3, 32, 32), VaeFeatures(str(tiny_folder))
    with torch.no_grad():
        latents = image_vae.encode(2 * images - 1).latent_dist.mean
    result = encoder.features(images)
    assert isinstance(encoder, PatchFeatures) and result.patches.shape == (3, 64, 4)
    torch.testing.assert_close(result.patches, latents.flatten(2).transpose(1, 2))
    torch.testing.assert_close(encoder(images)[:, :4], latents.mean((2, 3)))
    torch.testing.assert_close(encoder(images)[:, 4:], latents.flatten(2).std(2, correction=0), rtol=1e-3, atol=1e-4)


def test_a_patch_holds_neighbors_in_one_vector(tiny_folder: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    single = VaeFeatures(str(tiny_folder)).features(images).patches.view(2, 8, 8, 4)
    squares = VaeFeatures(str(tiny_folder), patch=2).features(images).patches
    assert squares.shape == (2, 16, 16)
    torch.testing.assert_close(squares[:, 0].view(2, 4, 2, 2), single[:, :2, :2].permute(0, 3, 1, 2))


def test_the_frames_of_a_clip_are_those_of_the_vae(audio_folder: Path) -> None:
    vae = AutoencoderOobleck.from_pretrained(audio_folder, subfolder="vae").eval()
    stereo = torch.rand(2, 2, 320) - 0.5
    with torch.no_grad():
        latents = vae.encode(stereo).latent_dist.mode()
    encoder = VaeFeatures(str(audio_folder), sample_rate=4000)
    torch.testing.assert_close(encoder.features(stereo).patches, latents.transpose(1, 2))
    pairs = VaeFeatures(str(audio_folder), 4000, patch=2).features(stereo).patches
    torch.testing.assert_close(pairs[:, 0].view(2, -1, 2), latents[:, :, :2])
    mono = stereo[:, :1]
    torch.testing.assert_close(encoder(mono), encoder(mono.expand(-1, 2, -1)))
    twice = VaeFeatures(str(audio_folder), sample_rate=8000).features(torch.rand(1, 2, 640) - 0.5)
    assert twice.patches.shape == (1, 20, 8)


@pytest.mark.parametrize("kind", ["images", "clips"])
def test_features_have_a_gradient_and_the_weights_have_none(kind: str, tiny_folder: Path, audio_folder: Path) -> None:
    images = kind == "images"
    encoder = VaeFeatures(str(tiny_folder)) if images else VaeFeatures(str(audio_folder), sample_rate=4000)
    samples = torch.full((1, 3, 32, 32) if images else (1, 2, 320), 0.5, requires_grad=True)
    encoder(samples).sum().backward()
    assert samples.grad is not None and bool(samples.grad.isfinite().all()) and bool(samples.grad.any())


def test_set_rewards_prefer_what_the_references_look_like(tiny_folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dark = torch.rand(12, 3, 32, 32, generator=generator) / 4
    references, encoder = ImageTensor(dark[:6]), VaeFeatures(str(tiny_folder))
    alike, other = dark[6:], 1 - dark[6:]
    parts, whole = extract_frame_features(references, encoder), extract_features(references, encoder)
    frames = FrameFeatures(encoder)
    assert parts.shape == (6 * 64, 4)
    assert FrameFrechetReward(parts)(frames(alike)) > FrameFrechetReward(parts)(frames(other))
    assert FrechetReward(whole)(encoder(alike)) > FrechetReward(whole)(encoder(other))
    by_image = PerSampleFrechetReward(encoder, parts)
    prompts = [Prompt("")] * 6
    assert bool((by_image(alike, prompts) > by_image(other, prompts)).all())


def test_wrong_models_and_samples_are_refused(tiny_folder: Path, audio_folder: Path, tmp_path: Path) -> None:
    image, clip = torch.rand(1, 3, 32, 32), torch.zeros(1, 2, 320)
    with pytest.raises(ValueError, match="has no vae/config\\.json: give a diffusers folder"):
        VaeFeatures(str(tmp_path))(image)
    with pytest.raises(ValueError, match="takes no images of 3 channels: name another model"):
        VaeFeatures(str(audio_folder), sample_rate=4000)(image)
    with pytest.raises(ValueError, match="cannot read waveforms as it is: set sample_rate"):
        VaeFeatures(str(audio_folder))(clip)
    with pytest.raises(ValueError, match="cannot read waveforms as it is: name a model of audio"):
        VaeFeatures(str(tiny_folder), sample_rate=4000)(clip)
    with pytest.raises(ValueError, match="has 0 parts of patch 40 in the latents of"):
        VaeFeatures(str(audio_folder), sample_rate=4000, patch=40)(clip)
    with pytest.raises(ValueError, match="patch must be at least 1"):
        VaeFeatures(str(tiny_folder), patch=0)
    AutoencoderTiny().save_pretrained(tmp_path / "other" / "vae")
    with pytest.raises(ValueError, match="is of class AutoencoderTiny: features need an AutoencoderKL or -Oobleck"):
        VaeFeatures(str(tmp_path / "other"))(image)
