"""Scores of many items by rewards, in batches of equal shape, stored as they come so that nothing is scored twice."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.reward_learning.examples import Item
from genalign.reward_learning.perturbations import NUISANCES, Perturbation
from genalign.runtime.media import medium_of
from genalign.runtime.progress import Progress
from genalign.scoring.score import NamedReward, RewardError, described, score
from genalign.types import PairwiseReward, Prompt

Key = tuple[str, ...]
"""What a number is of: the reward, the perturbation or order, the prompt and the digests of the samples."""


class ScoreFile:
    """Numbers by key, in a file that lines are appended to; a line that was cut off is left out.

    ``path`` None stores nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.values = path, dict[Key, float]()
        content = path.read_text("utf-8") if path and path.is_file() else ""
        self._cut_off = bool(content) and not content.endswith("\n")
        for line in content.split("\n"):
            with contextlib.suppress(ValueError):  # of a line that was cut off
                *key, value = json.loads(line)
                self.values[tuple(key)] = float(value)

    def add(self, values: Mapping[Key, float]) -> None:
        """Add numbers; NaN is not stored, so another process computes it again."""
        self.values.update(values)
        scored = {key: value for key, value in values.items() if not math.isnan(value)}
        lines = [json.dumps([*key, value], ensure_ascii=False) for key, value in scored.items()]
        if self.path is not None and lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._cut_off + "\n".join(lines) + "\n")
            self._cut_off = False


@dataclass(frozen=True)
class ItemReader:
    """Reads the samples of items.

    Args:
        size: Side in pixels to which images are resized; None keeps their size.
        device: Torch device of the samples.
        sample_rate: Sample rate in Hz that every clip must have; None for images.
    """

    size: int | None = None
    device: str = "cpu"
    sample_rate: int | None = None

    def __call__(self, item: Item) -> Tensor:
        """Read a sample (3, H, W) or (C, L). Raises ValueError for a clip at another rate, or among images."""
        sample, rate = item.sample.read_with_rate()
        if rate != self.sample_rate:
            raise ValueError(
                f"{item.sample.content!s:.200} is at {rate or 'no'} Hz, but the first sample at"
                f" {self.sample_rate or 'no'}: give samples of one kind and one sample rate"
            )
        if self.size is not None and self.sample_rate is None:
            side = (self.size, self.size)
            sample = F.interpolate(sample[None], size=side, mode="bicubic", antialias=True)[0].clamp(0, 1)
        return sample.to(self.device)


@dataclass
class ItemScorer:
    """Scores items and pairs of items, in the order of their shapes.

    Args:
        reader: Reads samples.
        file: Where scores are stored.
        batch_size: Number of samples in a call.
        progress: Where the phases are shown.
        started: The names of rewards that scored a first batch.
    """

    reader: ItemReader
    file: ScoreFile
    batch_size: int = 16
    progress: Progress = field(default_factory=Progress)
    started: set[str] = field(default_factory=set)

    def statistics(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Compute the statistics (n,) of ``NUISANCES`` of items, of one medium."""
        columns = dict[str, Tensor]()

        def read(row: int) -> tuple[Tensor, Prompt]:
            return self.reader(items[row]), items[row].prompt

        with self.progress.phase("measuring samples", len(items)) as advance:
            for rows, samples, _ in batches_of_one_shape(range(len(items)), read, self.batch_size):
                for name, statistic in NUISANCES.get(medium_of(samples).name, {}).items():
                    column = columns.setdefault(name, torch.full((len(items),), torch.nan, dtype=torch.float64))
                    column[torch.tensor(rows)] = statistic(samples).double().cpu()
                advance(len(rows))
        return columns

    def scores(
        self, reward: NamedReward, items: Sequence[Item], change: tuple[str, Perturbation] | None = None, seed: int = 0
    ) -> Tensor:
        """Score items as (n,) float64; NaN where the reward fails.

        Args:
            reward: The reward.
            items: The items.
            change: The name of a perturbation and itself, to score perturbed samples.
            seed: Seed of the perturbations, each of its own with the item's digest.

        Raises:
            RewardError: The reward scores nothing of a first batch, or returns another shape.
        """
        name = change[0] if change else ""
        keys = [(reward.name, name, item.prompt.text, item.digest) for item in items]
        missing = [row for row, key in enumerate(keys) if key not in self.file.values]

        def read(row: int) -> tuple[Tensor, Prompt]:
            item, sample = items[row], self.reader(items[row])
            if change:
                sample = change[1](sample, derived_seed(seed, name, item.digest))
            return sample, item.prompt

        what = f"scoring by {reward.name}" + (f" after {name}" if name else "")
        if missing:
            with self.progress.phase(what, len(missing)) as advance:
                for rows, samples, prompts in batches_of_one_shape(missing, read, self.batch_size):
                    values = self._score(reward, samples, prompts)
                    self.file.add({keys[row]: value for row, value in zip(rows, values, strict=True)})
                    advance(len(rows))
        return torch.tensor([self.file.values[key] for key in keys], dtype=torch.float64)

    def preferences(
        self, judge: PairwiseReward, name: str, items: Sequence[Item], rows: Tensor, reverse: bool = False
    ) -> Tensor:
        """Ask a judge for its preference (N,) float64 for the sample that is shown first; NaN where it fails.

        Args:
            judge: The judge of two batches.
            name: Its name.
            items: The items.
            rows: The numbers (N, 2) of the items of each pair.
            reverse: Show the second item of a pair first.

        Raises:
            RewardError: The judge decides nothing of a first batch, or returns another shape.
            ValueError: The samples of a pair differ in shape.
        """
        sides = (rows.flip(1) if reverse else rows).tolist()
        keys = [(name, "pair", items[a].prompt.text, items[a].digest, items[b].digest) for a, b in sides]
        missing = [place for place, key in enumerate(keys) if key not in self.file.values]
        in_order = NamedReward(name, lambda two, texts: judge(two[:, 0], two[:, 1], texts), score_batch=self.batch_size)

        def pair(place: int) -> tuple[Tensor, Prompt]:
            first, second = (self.reader(items[row]) for row in sides[place])
            if first.shape != second.shape:
                shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
                raise ValueError(f"a judge compares samples of one shape, not {shapes}: give size, a side in pixels")
            return torch.stack([first, second]), items[sides[place][0]].prompt

        if missing:
            with self.progress.phase(f"comparing by {name}", len(missing)) as advance:
                for places, pairs, prompts in batches_of_one_shape(missing, pair, self.batch_size):
                    values = self._score(in_order, pairs, prompts)
                    self.file.add({keys[place]: value for place, value in zip(places, values, strict=True)})
                    advance(len(places))
        return torch.tensor([self.file.values[key] for key in keys], dtype=torch.float64)

    def _score(self, reward: NamedReward, samples: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        values = None if reward.name in self.started else _first_scores(reward, samples, prompts)
        values = score([reward], samples, prompts)[:, 0] if values is None else values
        if reward.name not in self.started and bool(values.isnan().all()):
            raise RewardError(f"{reward.name} scored none of the first {len(values)} samples: all are NaN")
        self.started.add(reward.name)
        listed: list[float] = values.tolist()
        return listed


@torch.no_grad()
def _first_scores(reward: NamedReward, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor | None:
    """Score a first batch (B,), NaN where a score is not finite; None where the reward raises on some of it.

    Raises RewardError where it also raises on the first and on the last sample alone.
    """
    for place in (slice(None), slice(0, 1), slice(len(samples) - 1, None)):
        try:
            scores = reward(samples[place], prompts[place]).float().cpu()
        except RewardError:
            raise
        except Exception as error:
            failure = described(error)
        else:
            return scores.masked_fill(~scores.isfinite(), torch.nan) if place == slice(None) else None
    raise RewardError(f"{reward.name} failed on a first batch: {failure}")


def batches_of_one_shape(
    rows: Sequence[int], read: Callable[[int], tuple[Tensor, Prompt]], size: int
) -> Iterator[tuple[list[int], Tensor, list[Prompt]]]:
    """Yield batches of at most ``size`` rows whose samples have one shape, with the samples and prompts."""
    waiting = dict[tuple[int, ...], list[tuple[int, Tensor, Prompt]]]()
    for row in rows:
        sample, prompt = read(row)
        batch = waiting.setdefault(tuple(sample.shape), [])
        batch.append((row, sample, prompt))
        if len(batch) == size:
            yield _stacked(waiting.pop(tuple(sample.shape)))
    for batch in waiting.values():
        yield _stacked(batch)


def _stacked(batch: Sequence[tuple[int, Tensor, Prompt]]) -> tuple[list[int], Tensor, list[Prompt]]:
    rows, samples, prompts = zip(*batch, strict=True)
    return list(rows), torch.stack(samples), list(prompts)
