"""CLAP as a reward and as features, against transformers' own preparation."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import ClapModel, ClapProcessor, CLIPVisionConfig

from genalign.runtime.waveforms import resample, warn_once
from genalign.scoring.reward_check import Expected, Probe, check
from genalign.types import Prompt, Reward
from genalign.worlds.tones.prompts import attribution, counting, pitch, single_tone
from rewards.backbones.audio_features import ClapFeatures, extract_frame_features, extract_text_features
from rewards.backbones.clap_encoder import load_clap
from rewards.backbones.encoders import PatchFeatures
from rewards.backbones.image_features import extract_features
from rewards.backbones.reference_audio import AudioTensor
from rewards.clap import ClapReward
from rewards.set_rewards import FrechetReward, VendiReward
from scripts.pretrain.tones_clap import assemble_clap, build_clap
from tests.rewards.low_precision import require_alike
from tests.rewards.tiny_clap import RATE, WINDOW, write_clap

PROMPTS = [single_tone("sine"), counting("square", "two"), pitch("organ", "C5")]
PROMPTS += [attribution("sine", "C4", "square", "A5")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clap(tmp_path_factory.mktemp("clap"))


def noise(length: int, count: int = 4, channels: int = 1) -> torch.Tensor:
    return 0.3 * torch.randn(count, channels, length, generator=torch.Generator().manual_seed(length))


def theirs(folder: Path, waves: torch.Tensor) -> torch.Tensor:
    """The embeddings of transformers' own processor and model, clip by clip."""
    processor, model = ClapProcessor.from_pretrained(folder), ClapModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        result = []
        for wave in waves[:, 0].numpy():
            inputs = processor(audio=wave, sampling_rate=RATE, return_tensors="pt")
            inputs["is_longer"] = torch.zeros_like(torch.as_tensor(inputs["is_longer"]), dtype=torch.bool)
            result.append(model.eval().get_audio_features(inputs["input_features"].float(), inputs["is_longer"]))
        return torch.cat([one.pooler_output for one in result])


@pytest.mark.parametrize("length", [WINDOW, 5000], ids=["whole", "short"])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_embeddings_agree_with_transformers(tmp_path: Path, length: int, padding: str, truncation: str) -> None:
    write_clap(tmp_path, padding=padding, truncation=truncation)
    with torch.no_grad():
        ours = load_clap(str(tmp_path))(noise(length), RATE)
    torch.testing.assert_close(ours, theirs(tmp_path, noise(length)), rtol=0, atol=3e-4)
    assert (ours[0] - ours[1]).abs().max() > 3e-3


def test_text_embeddings_agree_with_transformers(folder: Path) -> None:
    texts = [prompt.text for prompt in PROMPTS]
    processor, model = ClapProcessor.from_pretrained(folder), ClapModel.from_pretrained(folder, dtype=torch.float32)
    inputs = processor(text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval().get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(load_clap(str(folder)).text(texts), expected, rtol=0, atol=1e-5)
    long = " ".join(["sine"] * 100)
    assert load_clap(str(folder)).text([long]).isfinite().all()


def test_the_reward_is_the_cosine(folder: Path) -> None:
    reward: Reward = ClapReward(str(folder), RATE)
    scores = reward(noise(WINDOW), PROMPTS)
    encoder = load_clap(str(folder))
    expected = (encoder(noise(WINDOW), RATE) * encoder.text([prompt.text for prompt in PROMPTS])).sum(1)
    assert isinstance(reward, Reward) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one prompt per sample"):
        reward(noise(WINDOW), PROMPTS[:2])


def test_the_contract_of_rewards_holds(folder: Path) -> None:
    probe = Probe(noise(WINDOW), PROMPTS)
    checks = list(check(ClapReward(str(folder), RATE), probe, Expected(gradient=True)))
    assert [result for result in checks if result.passed is False] == []


def test_other_rates_and_channels_are_converted_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    stereo = noise(8000, channels=2)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        result = load_clap(str(folder))(stereo, 8000)
        expected = load_clap(str(folder))(resample(stereo.mean(1, keepdim=True), 8000, RATE), RATE)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert "hears one channel: the mean of 2 is taken" in caplog.text
    assert "waveforms at 8000 Hz are resampled, and nothing above 4000 Hz is heard" in caplog.text


def test_a_short_clip_is_padded_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        short = load_clap(str(folder)).features(noise(4000), RATE)
    assert "hears 1 s: shorter clips are filled up (repeatpad)" in caplog.text
    whole = load_clap(str(folder)).features(noise(WINDOW), RATE)
    assert short.patches.shape[1] == whole.patches.shape[1] // 4


def test_a_long_clip_is_heard_to_its_end(folder: Path) -> None:
    encoder, long = load_clap(str(folder)), noise(2 * WINDOW + 8000)
    result = encoder.features(long, RATE)
    starts = (0, (WINDOW + 8000) // 2, WINDOW + 8000)
    parts = [encoder.features(long[..., start : start + WINDOW], RATE) for start in starts]
    mean = torch.nn.functional.normalize(torch.stack([part.global_ for part in parts]).mean(0), dim=-1)
    torch.testing.assert_close(result.global_, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.patches, torch.cat([part.patches for part in parts], 1), rtol=0, atol=1e-5)


def test_frames_follow_time(folder: Path) -> None:
    """A change at the end of a clip changes its last frames most."""
    features, wave = ClapFeatures(str(folder), RATE), noise(WINDOW, count=1)
    changed = wave.clone()
    changed[..., -1500:] = 0
    moved = (features.features(changed).patches - features.features(wave).patches).norm(dim=2)[0]
    assert isinstance(features, PatchFeatures) and len(moved) == 16
    assert int(moved.argmax()) >= 13
    torch.testing.assert_close(features.features(wave).patches.norm(dim=2), torch.ones(1, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(features(wave), features.features(wave).global_)


def test_reference_sets_of_sounds_and_of_words(folder: Path) -> None:
    features = ClapFeatures(str(folder), RATE)
    sounds = extract_features(AudioTensor(noise(WINDOW, 6)), features, batch_size=4)
    words = extract_text_features([prompt.text for prompt in PROMPTS], str(folder))
    assert words.shape == (4, 12) and sounds.shape == (6, 12)
    torch.testing.assert_close(words.norm(dim=1), torch.ones(4), rtol=0, atol=1e-5)
    assert FrechetReward(words)(sounds) < 0 and FrechetReward(sounds)(sounds) == pytest.approx(0, abs=1e-6)
    assert 1 <= VendiReward()(sounds) <= 6
    assert extract_frame_features(AudioTensor(noise(WINDOW, 3)), features).shape == (48, 12)
    with pytest.raises(ValueError, match="in words needs 2 texts or more, got 1"):
        extract_text_features(["a sine tone"], str(folder))


def test_silence_is_scored_alike_wherever_it_comes_from(folder: Path) -> None:
    scores = ClapReward(str(folder), RATE)(torch.zeros(2, 1, WINDOW), [PROMPTS[0]] * 2)
    assert scores.isfinite().all() and scores[0] == scores[1]


def test_the_embedded_encoder_is_opened(tmp_path: Path) -> None:
    """The format that scripts/pretrain/tones_audio.py writes: half precision, windows of a clip's length."""
    torch.manual_seed(0)
    assemble_clap(build_clap(), tmp_path)
    encoder, clips = load_clap(str(tmp_path)), noise(12000)
    assert encoder.rate == 8000 and encoder.length == 12000
    assert next(encoder.parameters()).dtype == torch.float32
    scores = ClapReward(str(tmp_path), 8000)(clips, PROMPTS)
    assert scores.shape == (4,) and scores.isfinite().all()
    assert ClapFeatures(str(tmp_path), 8000).features(clips).patches.shape == (4, 16, 64)


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json: give the folder that save_pretrained of a CLAP model"):
        ClapReward(str(tmp_path), RATE)(noise(WINDOW), PROMPTS)
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not CLAP: give a CLAP folder or Hub id"):
        ClapReward(str(tmp_path), RATE)(noise(WINDOW), PROMPTS)


def test_samples_that_are_not_waveforms_are_refused(folder: Path) -> None:
    reward = ClapReward(str(folder), RATE)
    with pytest.raises(ValueError, match=r"waveforms must be \(B, C, L\)"):
        reward(noise(WINDOW)[:, 0], PROMPTS)
    with pytest.raises(TypeError, match=r"not torch\.int16"):
        reward(torch.zeros(2, 1, WINDOW, dtype=torch.int16), PROMPTS[:2])


def test_weights_in_bfloat16_score_alike(folder: Path) -> None:
    clips = torch.cat([level * noise(WINDOW) for level in (0.01, 0.03, 0.1, 0.3, 1.0)]).requires_grad_(True)
    prompts = [Prompt("a bell")] * len(clips)
    scores = ClapReward(str(folder), RATE, "bfloat16")(clips, prompts)
    require_alike(ClapReward(str(folder), RATE)(clips.detach(), prompts), scores.detach(), 0.01)
    norm = load_clap(str(folder), "bfloat16").model.audio_model.audio_encoder.batch_norm
    assert norm.weight.dtype == torch.float32  # levels in dB have more digits than bfloat16
    scores.sum().backward()
    assert clips.grad is not None and bool(clips.grad.isfinite().all()) and bool(clips.grad.abs().sum() > 0)
