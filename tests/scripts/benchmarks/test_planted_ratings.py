"""Simulated raters: their taste is what it says, and a reward that is fitted to their ratings follows it."""

from __future__ import annotations

import pytest
import torch

from genalign.worlds.shapes.scenes import Scene, Shape
from genalign.worlds.shapes.scenes import render as draw
from genalign.worlds.tones.scenes import Clip, Event
from genalign.worlds.tones.scenes import render as play
from rewards.ratings import RatingReward
from scripts.benchmarks.planted_ratings import depth, rated_clips, rated_scenes, warmth


def _scene(*colors: tuple[str, tuple[float, float, float]]) -> Scene:
    places = zip(colors, (16.0, 48.0), strict=False)
    return Scene(tuple(Shape("circle", color, x, 32.0, 9.0, rgb) for (color, rgb), x in places))


def test_warm_colors_are_rated_high() -> None:
    yellow, orange, blue = (245.0, 225.0, 50.0), (245.0, 140.0, 30.0), (45.0, 85.0, 220.0)
    scenes = [
        _scene(("orange", orange)),
        _scene(("orange", orange), ("blue", blue)),
        _scene(("blue", blue)),
        _scene(("yellow", yellow)),
        Scene(()),
    ]
    rating = warmth(draw(scenes)).tolist()
    assert rating[:3] == [5, pytest.approx(3), 1] and 4 < rating[3] < 5 and rating[4] == 1


def _event(timbre: str, note: str | None, onset: float) -> Event:
    return Event(timbre, note, onset, 0.4, -15.0, 0.0, 0)


def test_low_notes_are_rated_high() -> None:
    low, high, noise = _event("sine", "C4", 0.1), _event("sine", "A5", 0.8), _event("noise", None, 0.1)
    clips = play([Clip((low,)), Clip((low, high)), Clip((high,)), Clip((noise,)), Clip(())])
    assert depth(clips).tolist() == [5, 3, 1, 3, 1]


def test_people_rate_in_whole_numbers_and_disagree() -> None:
    rated = rated_scenes(40, seed=1)
    taste = warmth(rated.samples.load(range(40)))
    assert set(rated.ratings) <= {1.0, 2.0, 3.0, 4.0, 5.0} and len(set(rated.ratings)) >= 4
    assert 0.3 < float((torch.tensor(rated.ratings) - taste).square().mean().sqrt()) < 0.9
    assert rated_clips(6).ratings == rated_clips(6).ratings


def test_a_reward_that_is_fitted_to_ratings_follows_the_taste() -> None:
    def mean_colors(samples: torch.Tensor) -> torch.Tensor:
        return samples.flatten(2).mean(2)

    reward, new = RatingReward(mean_colors, rated_scenes(120)), rated_scenes(60, seed=1).samples.load(range(60))
    assert torch.corrcoef(torch.stack([reward(new, []), warmth(new)]))[0, 1] > 0.6
