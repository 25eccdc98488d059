"""Measures of a whole evaluation: the nearness of patches, the mean of a reward, and shares of colors."""

from __future__ import annotations

import pytest
import torch

from rewards.shapes import recolored
from scripts.benchmarks.planted_ratings import warmth
from scripts.benchmarks.set_measures import is_cold, mean_of, patch_nearness, share


def test_images_like_the_references_are_nearer_by_their_patches() -> None:
    measure = patch_nearness(recolored(["purple"], count=24, seed=1))
    alike, other = (recolored([color], count=24).load(range(24)) for color in ("purple", "yellow"))
    assert measure(other) < measure(alike) <= 0


def test_colors_are_seen() -> None:
    cold = recolored(["blue", "purple"], count=12).load(range(12))
    assert share(is_cold)(cold) == 1 and mean_of(warmth)(cold) == pytest.approx(float(warmth(cold).mean()))
    assert mean_of(warmth)(torch.cat([cold, recolored(["orange"], count=12).load(range(12))])) > mean_of(warmth)(cold)
