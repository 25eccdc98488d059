"""Samples of fixed prompts and noises that a run writes every few rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from genalign.runtime.media import AudioMedium, save_images
from genalign.training.reward_hacking import due


@dataclass(frozen=True)
class SampleGrid:
    """Settings: ``count`` samples every ``every`` rounds, and after the first and the last; 0 is off."""

    every: int = 0
    count: int = 8

    def __post_init__(self) -> None:
        if self.every < 0 or self.count < 1:
            raise ValueError(f"sample_grid needs every >= 0 and count >= 1, not {self.every} and {self.count}")


@dataclass(frozen=True)
class SampleGridWriter:
    """A writer of samples to RUN/samples: round-000012.png for images, round-000012-00.wav and so on for clips.

    Args:
        sample: Generate the samples (N, ...) with the current weights; None on ranks that do not write.
        sample_rate: The rate of waveforms in Hz; None for images.
        every: The number of rounds between two grids.
    """

    sample: Callable[[], Tensor | None]
    sample_rate: int | None
    every: int

    def after(self, rounds: int, last: bool, run: Path) -> list[str]:
        """Write a grid if one is due after ``rounds`` rounds; return its file names, relative to ``run``."""
        samples = self.sample() if due(rounds, self.every, last) else None
        if samples is None:
            return []
        (run / "samples").mkdir(exist_ok=True)
        stem = f"samples/round-{rounds:06d}"
        if self.sample_rate is None:
            save_images(tile(samples)[None], [run / f"{stem}.png"])
            return [f"{stem}.png"]
        names = [f"{stem}-{number:02d}.wav" for number in range(len(samples))]
        for name, waveform in zip(names, samples, strict=True):
            (run / name).write_bytes(AudioMedium(self.sample_rate).encode(waveform))
        return names


def tile(images: Tensor, margin: int = 2) -> Tensor:
    """Tile images (N, 3, H, W) into one (3, rows * (H + margin), columns * (W + margin)) on white."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    framed = F.pad(images.detach().float().cpu(), (0, margin, 0, margin), value=1.0)
    blank = torch.ones(rows * columns - len(images), *framed.shape[1:])
    height, width = framed.shape[2:]
    cells = torch.cat([framed, blank]).reshape(rows, columns, 3, height, width)
    return cells.permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)
