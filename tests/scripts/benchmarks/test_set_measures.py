"""Measures of a whole evaluation: nearness to images and words, the mean of a reward, shares of colors, and wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewards.shapes import recolored, worded
from scripts.benchmarks import set_measures
from scripts.benchmarks.planted_ratings import warmth
from scripts.benchmarks.set_measures import is_cold, mean_of, patch_nearness, share, text_nearness, wins_row

SIDES = {"before": "yellow", "after": "purple"}


def test_images_like_the_references_are_nearer_by_their_patches() -> None:
    measure = patch_nearness(recolored(["purple"], count=24, seed=1))
    alike, other = (recolored([color], count=24).load(range(24)) for color in ("purple", "yellow"))
    assert measure(other) < measure(alike) <= 0


def test_colors_are_seen() -> None:
    cold = recolored(["blue", "purple"], count=12).load(range(12))
    assert share(is_cold)(cold) == 1 and mean_of(warmth)(cold) == pytest.approx(float(warmth(cold).mean()))
    assert mean_of(warmth)(torch.cat([cold, recolored(["orange"], count=12).load(range(12))])) > mean_of(warmth)(cold)


def test_sets_win_by_what_they_are_measured_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yellow scenes before and purple ones after, of two seeds: four parts of 8 each."""
    scenes = {name: recolored([color], count=16).load(range(16)) for name, color in SIDES.items()}
    monkeypatch.setattr(set_measures, "evaluation_images", lambda folder: (scenes[folder.name], []))
    monkeypatch.setattr(set_measures, "PART", 8)
    looks = {"cold": share(is_cold), "warm": mean_of(warmth)}
    row = wins_row("frechet", "cold", {1: Path("a"), 2: Path("b")}, looks)
    assert (row["wins"]["wins"], row["wins"]["losses"], row["wins"]["rate"]) == (4, 0, 1.0)
    assert row["target"] == "cold" and row["rewards"]["cold"] == {"before": 0.0, "after": 1.0}
    assert row["rewards"]["warm"]["before"] > row["rewards"]["warm"]["after"]
    assert wins_row("frechet", "warm", {1: Path("a")}, looks)["wins"]["losses"] == 2


def test_images_are_nearer_to_the_words_of_their_colors() -> None:
    measure = text_nearness(worded(["purple", "blue"], "shapes-clip"))
    alike, other = (recolored([color], count=24).load(range(24)) for color in ("purple", "yellow"))
    assert measure(other) < measure(alike) <= 0
