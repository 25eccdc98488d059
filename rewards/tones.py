"""The tones world for training: its exact verifier as a reward, and rendered clips as references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from genalign.types import Prompt
from genalign.worlds.tones.instruments import NOISE, NOTES, SAMPLE_RATE, TIMBRES
from genalign.worlds.tones.prompts import prompts
from genalign.worlds.tones.scenes import Clip, render, sample_clip
from genalign.worlds.tones.verifier import verify
from rewards.backbones.audio_features import extract_text_features
from rewards.backbones.reference_audio import AudioTensor
from rewards.backbones.world_verifier import Score, require_metadata, sample_metadata_by_task, scores

TonesScore = Score | Literal["count", "kind", "note", "relation", "loudness"]


@dataclass(frozen=True)
class TonesReward:
    """The score of a clip by the exact verifier of the tones world, in [0, 1].

    Several of these rewards verify a batch once.

    Args:
        score: "partial" credit; "strict" or "relaxed", 1.0 for a clip that is right by this rule and else 0.0; or the
            single criterion "count", "kind", "note", "relation" or "loudness", 1.0 for a prompt without it.
    """

    score: TonesScore = "partial"

    @property
    def sample_rate(self) -> int:
        """The sample rate of the verifier, in Hz."""
        return SAMPLE_RATE

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score waveforms (B, 1, 12000) at 8 kHz as (B,), float32 on the CPU; NaN for one with NaN."""
        return scores(verify, self.score, samples, prompts)


def revoiced(
    timbres: Sequence[str] = TIMBRES,
    level: tuple[float, float] | None = None,
    count: int = 256,
    suite: str = "train",
    seed: int = 0,
) -> AudioTensor:
    """Render clips whose events all have one of these timbres: a sound to transfer, such as quiet organ tones.

    Args:
        timbres: of this world.
        level: the range of an event's level in dB of full scale; None leaves it.
        count: how many clips, drawn by task and then by prompt.
        suite: the split of the prompts.
        seed: of all draws.

    Raises:
        ValueError: a timbre is not of this world.
    """
    _require_timbres(timbres)
    rng = np.random.default_rng(seed)
    clips = [sample_clip(metadata, rng) for metadata in sample_metadata_by_task(prompts(suite), count, rng)]
    voiced = []
    for clip in clips:
        events = []
        for event in clip.events:
            timbre = timbres[int(rng.integers(len(timbres)))]
            note = None if timbre == NOISE else event.note or list(NOTES)[rng.integers(len(NOTES))]
            loudness = event.level if level is None else float(rng.uniform(*level))
            events.append(replace(event, timbre=timbre, note=note, level=loudness))
        voiced.append(Clip(tuple(events)))
    return AudioTensor(render(voiced))


def worded(timbres: Sequence[str], model: str, suite: str = "train") -> Tensor:
    """Embed, by CLAP, the texts of a split's prompts that name no other than these timbres, (m, d).

    They are exemplars in words, for ``rewards.backbones.audio_features.ClapFeatures(model, ...)``. Raises ValueError
    for a timbre that is not of this world, or timbres that fewer than 2 prompts name.
    """
    _require_timbres(timbres)
    texts = [
        prompt.text
        for prompt in prompts(suite).prompts
        if {event["class"] for event in require_metadata(prompt)["events"]} <= set(timbres)
    ]
    return extract_text_features(texts, model)


def _require_timbres(timbres: Sequence[str]) -> None:
    if unknown := set(timbres) - set(TIMBRES):
        raise ValueError(f"no timbre {', '.join(sorted(unknown))} in this world: choose from {', '.join(TIMBRES)}")
