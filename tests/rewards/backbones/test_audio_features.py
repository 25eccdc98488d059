"""Features of sound without weights, and FAD, KAD and Vendi on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from genalign.algorithms.preference_pairs import greedy_swap
from genalign.metrics.frechet import Gaussian
from genalign.types import Prompt, Reward
from genalign.worlds.tones.instruments import NOTES, PITCHED, tone
from genalign.worlds.tones.scenes import render, sample_clip
from rewards.backbones.audio_features import FrameFeatures, LogMelFeatures, extract_frame_features
from rewards.backbones.encoders import PatchFeatures
from rewards.backbones.image_features import extract_features
from rewards.backbones.reference_audio import AudioTensor
from rewards.set_rewards import FrameFrechetReward, FrechetReward, KADReward, PerSampleFrechetReward, VendiReward
from rewards.tones import revoiced

RATE = 8000
ENCODER = LogMelFeatures(RATE, mels=20)
PROMPTS = [Prompt("a clip")]


@pytest.fixture(scope="module")
def organs() -> torch.Tensor:
    return revoiced(["organ"], count=40, seed=1).load(range(40))


@pytest.fixture(scope="module")
def noises() -> torch.Tensor:
    return revoiced(["noise"], count=40, seed=2).load(range(40))


def by_scipy(x: torch.Tensor, y: torch.Tensor) -> float:
    """The Frechet distance of two sets, written out with scipy's matrix square root."""
    a, b = (np.cov(part.double().numpy(), rowvar=False) for part in (x, y))
    apart = (x.double().mean(0) - y.double().mean(0)).square().sum()
    return float(apart) + float(np.trace(a + b - 2 * sqrtm(a @ b).real))


def test_a_tone_lights_its_band() -> None:
    """The loudest band of a sine rises with its frequency, and its level is heard in dB."""
    waves = torch.stack([torch.from_numpy(tone(PITCHED["sine"], hz, 0.0, 8000))[None].float() for hz in NOTES.values()])
    result = LogMelFeatures(RATE).features(0.1 * waves)
    bands = result.patches[:, 20].argmax(1).tolist()
    assert bands == sorted(bands) and len(set(bands)) == len(NOTES)
    louder = LogMelFeatures(RATE).features(0.2 * waves).patches[:, 20].amax(1) - result.patches[:, 20].amax(1)
    torch.testing.assert_close(louder, torch.full((10,), 20 * math.log10(2)), rtol=0, atol=1e-3)


def test_clips_and_frames(organs: torch.Tensor) -> None:
    result = ENCODER.features(organs)
    assert isinstance(ENCODER, PatchFeatures)
    assert result.patches.shape == (40, 12000 // 128 + 1, 20)
    torch.testing.assert_close(result.global_[:, :20], result.patches.mean(1))
    torch.testing.assert_close(ENCODER(organs), result.global_)
    torch.testing.assert_close(ENCODER(organs.repeat(1, 2, 1)), result.global_)
    torch.testing.assert_close(FrameFeatures(ENCODER)(organs), result.patches.flatten(1))
    leaf = torch.zeros(1, 1, 4000).requires_grad_()
    ENCODER(leaf).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


def test_fad_agrees_with_scipy(organs: torch.Tensor, noises: torch.Tensor) -> None:
    hiss = 0.01 * torch.randn(organs.shape, generator=torch.Generator().manual_seed(0))  # silence has no full rank
    organs, noises = organs + hiss, noises + hiss.flip(2)
    reference = extract_frame_features(AudioTensor(noises), ENCODER)
    frames = ENCODER.features(organs).patches.flatten(0, 1)
    result = -FrameFrechetReward(reference)(FrameFeatures(ENCODER)(organs))
    assert result == pytest.approx(by_scipy(frames, reference), rel=1e-6)
    clips = LogMelFeatures(RATE, mels=6)
    whole = -FrechetReward(extract_features(AudioTensor(noises), clips))(clips(organs))
    assert whole == pytest.approx(by_scipy(clips(organs), clips(noises)), rel=1e-6)
    one = ENCODER.features(organs[:1]).patches[0]  # 94 frames of 20 bands
    per_clip = PerSampleFrechetReward(ENCODER, reference)(organs[:1], PROMPTS)
    assert -float(per_clip) == pytest.approx(by_scipy(one, reference), rel=1e-5)


def test_the_nearer_set_scores_higher(organs: torch.Tensor, noises: torch.Tensor) -> None:
    other = revoiced(["organ"], count=40, seed=7)
    frames, clips = FrameFeatures(ENCODER), ENCODER
    for reward, features in (
        (FrameFrechetReward(extract_frame_features(other, ENCODER)), frames),
        (FrechetReward(extract_features(other, clips)), clips),
        (KADReward(extract_features(other, clips)), clips),
    ):
        assert reward(features(organs)) > reward(features(noises))
    per_clip: Reward = PerSampleFrechetReward(ENCODER, extract_frame_features(other, ENCODER))
    assert isinstance(per_clip, Reward)
    assert per_clip(organs, PROMPTS * 40).median() > per_clip(noises, PROMPTS * 40).max()
    both = torch.cat([organs[:20], noises[:20]])
    assert VendiReward()(clips(both)) > VendiReward()(clips(organs[:1].repeat(40, 1, 1))) == pytest.approx(1, abs=1e-3)


def test_with_a_floor_levels_count_from_there(organs: torch.Tensor, noises: torch.Tensor) -> None:
    floored, plain = LogMelFeatures(RATE, floor=-50.0), LogMelFeatures(RATE)
    frames = floored.features(organs).patches
    torch.testing.assert_close(frames, (plain.features(organs).patches + 50).clamp(min=0))
    hissing = organs + 1e-4 * torch.randn(organs.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(floored(hissing), floored(organs), rtol=0.05, atol=0.5)
    both = torch.cat([organs[:20], noises[:20]])
    assert VendiReward()(plain(both)) < VendiReward()(floored(both))  # not all point to silence


def test_rank_deficient_sets(organs: torch.Tensor, noises: torch.Tensor) -> None:
    """Fewer frames than bands, and silence, whose frames are all the same: exact, where a square root of a singular
    product is not."""
    fine = LogMelFeatures(RATE, mels=64)
    reference = extract_frame_features(AudioTensor(noises), fine)
    short = organs[:2, :, :1500]
    assert fine.features(short).patches.shape[1] < 64
    scores = PerSampleFrechetReward(fine, reference)(torch.cat([short, torch.zeros(1, 1, 1500)]), PROMPTS * 3)
    assert scores.isfinite().all()
    flat = Gaussian.fit(reference)
    silence = (-100 - flat.mean).square().sum() + flat.factor.square().sum()
    assert -float(scores[2]) == pytest.approx(float(silence), rel=1e-6)
    itself = extract_frame_features(AudioTensor(short[:1]), fine)
    assert float(PerSampleFrechetReward(fine, itself)(short[:1], PROMPTS)) == pytest.approx(0, abs=1e-3)


def test_one_frame_has_no_distance_and_two_clips_of_one_have(organs: torch.Tensor) -> None:
    single = LogMelFeatures(RATE, mels=8, window=0.064, hop=0.2)
    short, reference = organs[:3, :, 4000:5000], torch.randn(30, 8)
    assert single.features(short).patches.shape == (3, 1, 8)
    with pytest.raises(ValueError, match=r"got 1: one frame has no covariance\. Give longer clips"):
        PerSampleFrechetReward(single, reference)(short, PROMPTS * 3)
    reward, frames = FrameFrechetReward(reference), FrameFeatures(single)(short)
    assert math.isfinite(reward(frames))
    with pytest.raises(ValueError, match="one clip of one frame has no covariance: score more clips, or longer ones"):
        reward(frames[:1])
    with pytest.raises(ValueError, match="no whole number of frames of width 8"):
        reward(torch.zeros(3, 12))
    with pytest.raises(ValueError, match="1 frame in all, which has no covariance"):
        extract_frame_features(AudioTensor(short[:1]), single)


def test_demonstrations_move_towards_the_exemplars(organs: torch.Tensor, noises: torch.Tensor) -> None:
    """DRAGON's exchange with the whole set's FAD: D+ takes the organs out of two mixed sets."""
    reward = FrameFrechetReward(extract_frame_features(AudioTensor(organs[20:]), ENCODER))
    first, second = organs[:8].clone(), noises[:8].clone()
    first[::2], second[::2] = noises[8:12], organs[8:12]
    one, other = FrameFeatures(ENCODER)(first), FrameFeatures(ENCODER)(second)
    swapped = greedy_swap(one, other, reward)
    assert swapped.tolist() == [True, False] * 4
    plus, minus = torch.where(swapped[:, None], other, one), torch.where(swapped[:, None], one, other)
    assert reward(plus) > max(reward(one), reward(other)) > reward(minus)


def test_failed_clips_are_nan_and_no_others(organs: torch.Tensor) -> None:
    waves = organs[:3].clone()
    waves[1, 0, 500] = math.nan
    reward = PerSampleFrechetReward(ENCODER, extract_frame_features(AudioTensor(organs[20:]), ENCODER))
    assert reward(waves, PROMPTS * 3).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="features must be finite: leave failed samples out"):
        VendiReward()(ENCODER(waves))


def test_bad_references_and_encoders_are_refused(organs: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="most of the reference set is the same sample over again"):
        KADReward(torch.ones(5, 3))
    with pytest.raises(ValueError, match="shorter than a window of 512: give longer clips"):
        ENCODER(organs[..., :400])
    with pytest.raises(ValueError, match="function gives no patches or frames: take an encoder with a method features"):
        FrameFeatures(lambda samples: samples)(organs)
    with pytest.raises(ValueError, match="gives no patches or frames"):
        PerSampleFrechetReward(lambda samples: samples, torch.zeros(3, 2))


def test_kad_is_a_hundred_times_the_mmd() -> None:
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64) + 1
    bandwidth = float(torch.pdist(y).median())  # of an odd number of distances, so that it is one of them
    distances = torch.pdist(x), torch.pdist(y), torch.cdist(x, y)
    of_x, of_y, across = ((-d.square() / (2 * bandwidth**2)).exp().mean() for d in distances)
    expected = 100 * float(of_x + of_y - 2 * across)
    assert KADReward(y)(x) == pytest.approx(-expected, rel=1e-6)


def test_exemplars_have_the_given_timbre_and_level() -> None:
    quiet = revoiced(["organ"], level=(-40.0, -38.0), count=12)
    loud = revoiced(["organ"], level=(-14.0, -12.0), count=12)
    level = [ENCODER.features(clips.load(range(12))).patches.amax((1, 2)) for clips in (quiet, loud)]
    assert bool((level[1] > level[0].max() + 10).all())
    with pytest.raises(ValueError, match="no timbre flute in this world: choose from sine, square"):
        revoiced(["flute"])
    rendered = render([sample_clip({"events": [{"class": "organ", "count": 1}]}, np.random.default_rng(0))])
    assert quiet.load([0]).shape == rendered.shape
