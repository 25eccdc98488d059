"""Simulated people who rate images and clips of the embedded worlds by a taste, for the comparisons of DRAGON.

The taste is a function of what the verifiers' eyes see, so that it can be measured exactly, apart from the reward that
is fitted to ratings. It is free of the prompts: people like warm colors, and low notes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genalign.types import Prompt
from genalign.worlds.shapes.detection import detect as detect_shapes
from genalign.worlds.shapes.geometry import PALETTE
from genalign.worlds.shapes.prompts import prompts as shapes
from genalign.worlds.shapes.scenes import render as draw
from genalign.worlds.shapes.scenes import sample_scene
from genalign.worlds.tones.detection import detect as detect_tones
from genalign.worlds.tones.instruments import NOTES
from genalign.worlds.tones.prompts import prompts as tones
from genalign.worlds.tones.scenes import render as play
from genalign.worlds.tones.scenes import sample_clip
from rewards.backbones.reference_audio import AudioTensor
from rewards.backbones.reference_images import ImageTensor
from rewards.backbones.world_verifier import sample_metadata_by_task
from rewards.ratings import RatedSamples

LOWEST, HIGHEST = 1.0, 5.0
DISAGREEMENT = 0.5  # standard deviation of a person's rating
_REDS = {color: red - blue for color, (red, _, blue) in PALETTE.items()}
_NOTES = tuple(NOTES)  # the lowest first


def warmth(images: Tensor, prompts: Sequence[Prompt] = ()) -> Tensor:
    """Rate images (B, 3, 64, 64) from 1 to 5 by the mean warmth of their shapes' colors; (B,), 1 without shapes."""
    return torch.tensor([_warm([item.color for item in items]) for items in detect_shapes(images)])


def depth(clips: Tensor, prompts: Sequence[Prompt] = ()) -> Tensor:
    """Rate clips (B, 1, 12000) from 1 to 5 by how low their notes are, noise in between; (B,), 1 without events."""
    return torch.tensor([_deep([event.sound.note for event in events]) for events in detect_tones(clips)])


def rated_scenes(count: int = 600, seed: int = 0) -> RatedSamples:
    """Render scenes of the training prompts that one person each has rated by the warmth of their colors."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(metadata, rng) for metadata in sample_metadata_by_task(shapes("train"), count, rng)]
    ratings = [_rating(_warm([item.color for item in scene.items]), rng) for scene in scenes]
    return RatedSamples(ImageTensor(draw(scenes)), ratings)


def rated_clips(count: int = 600, seed: int = 0) -> RatedSamples:
    """Render clips of the training prompts that one person each has rated by the depth of their notes."""
    rng = np.random.default_rng(seed)
    clips = [sample_clip(metadata, rng) for metadata in sample_metadata_by_task(tones("train"), count, rng)]
    ratings = [_rating(_deep([event.note for event in clip.events]), rng) for clip in clips]
    return RatedSamples(AudioTensor(play(clips)), ratings)


def _warm(colors: Sequence[str]) -> float:
    low, high = min(_REDS.values()), max(_REDS.values())
    return _on_the_scale([(_REDS[color] - low) / (high - low) for color in colors])


def _deep(notes: Sequence[str | None]) -> float:
    return _on_the_scale([0.5 if note is None else 1 - _NOTES.index(note) / (len(_NOTES) - 1) for note in notes])


def _on_the_scale(parts: Sequence[float]) -> float:
    """Bring the mean of numbers in [0, 1] to the scale; the lowest without any."""
    return LOWEST + (HIGHEST - LOWEST) * (sum(parts) / len(parts) if parts else 0.0)


def _rating(taste: float, rng: np.random.Generator) -> float:
    """Draw the whole number by which a person rates a sample of this taste."""
    return float(np.clip(np.rint(taste + DISAGREEMENT * rng.standard_normal()), LOWEST, HIGHEST))
