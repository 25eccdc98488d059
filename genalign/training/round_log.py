"""The log of a run's rounds: in the terminal, in log lines, in experiment trackers, and in samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from genalign.metrics.intervals import Estimate
from genalign.runtime.media import AudioMedium, save_images
from genalign.runtime.progress import Phase, format_rate
from genalign.scoring.budget import peak_memory
from genalign.training.reward_hacking import due
from genalign.training.round_result import RoundResult
from genalign.training.settings import TrainerSettings


@dataclass
class RoundDisplay:
    """The rounds of a run: beside the bar of the phase ``rounds`` in a terminal, elsewhere one log line per round."""

    settings: TrainerSettings
    rounds: Phase
    max_seconds: float | None = None
    held_out: str = ""

    def show(self, result: RoundResult, held_out: Mapping[str, Estimate]) -> None:
        """Show the metrics of a round, and the first score of the latest evaluation of held-out prompts."""
        if held_out:
            self.held_out = f"held-out {next(iter(held_out.values())).mean:.3f}"
        reward, rate = f"reward {result.reward:.3f}", format_rate(result.samples / result.seconds)
        rounds = self.rounds
        rounds.advance()
        rounds.note = "  ".join(filter(None, [reward, self.held_out, rate]))
        if self.settings.max_nfe or self.max_seconds:  # which may end the run earlier
            elapsed = result.seconds / self.max_seconds if self.max_seconds else 0.0
            complete = max(self.settings.progress(rounds.done, result.nfe), elapsed)
            rounds.total = math.ceil(rounds.done / complete - 1e-9)
        scores = ", ".join(f"{name} {score:.3f}" for name, score in result.rewards.items())
        parts = [
            f"{reward} ({scores})",
            self.held_out,
            f"KL {result.kl:.3g}",
            f"clip fraction {result.clip_fraction:.3f}" if not math.isnan(result.clip_fraction) else "",
            f"NFE {result.nfe}",
            rate,
            f"ETA {rounds.eta}",
            f"memory {peak_memory() / 2**30:.1f} GiB",
        ]
        rounds.progress.log_line(f"round {rounds.done}/{rounds.total}: {', '.join(filter(None, parts))}")


def flat_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Flatten the numbers of a row of metrics.jsonl, with names such as ``rewards/ocr``.

    An estimate is ``held_out/NAME``, its interval ``held_out/NAME/low`` and ``/high``; a signal of the reward-hacking
    report is the shift ``reward_hacking/NAME``.
    """
    shifts = {signal["name"]: signal["shift"] for signal in row.get("reward_hacking") or ()}
    numbers: dict[str, float] = {}

    def add(name: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                is_estimate = {"mean", "low", "high"} <= value.keys()
                add(name if is_estimate and key == "mean" else f"{name}/{key}", inner)
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers[name] = value

    for name, value in (dict(row) | {"reward_hacking": shifts}).items():
        add(name, value)
    return numbers


def log_round(trackers: Sequence[Any], step: int, row: Mapping[str, Any], folder: Path, samples: Sequence[str]) -> None:
    """Log a round in experiment trackers.

    Args:
        trackers: The trackers of accelerate.
        step: The index of the round.
        row: The round's row of metrics.jsonl, of which the numbers are logged.
        folder: The run's folder.
        samples: Files of a sample grid in that folder; trackers that take images log the PNG files.
    """
    paths = [folder / name for name in samples if name.endswith(".png")]
    for tracker in trackers:
        tracker.log(flat_numbers(row), step=step)
        if paths and hasattr(tracker, "log_images"):
            images = np.stack([np.asarray(Image.open(path, formats=["PNG"])) for path in paths])  # (N, H, W, 3)
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": images}, step=step, **layout)


@dataclass(frozen=True)
class SampleGrid:
    """Images or clips that the model generates during training.

    Args:
        every: Number of rounds between two grids, besides those after the first and the last round; 0 turns them off.
        count: Number of samples, of evenly spaced training prompts.
    """

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
