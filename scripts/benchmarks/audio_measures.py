"""What the audio proof measures of a run's clips before and after: rewards of clips and of sets, and who wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from genalign.evaluation.evaluate import SampleRecord, load_evaluation
from genalign.evaluation.records import PromptRecord
from genalign.metrics.intervals import win_test
from genalign.metrics.set_tests import compare_parts
from genalign.runtime.media import inside
from genalign.types import FeatureFunction, RewardFunction, SetReward
from genalign.worlds.registry import WORLDS
from genalign.worlds.tones import SAMPLE_RATE
from rewards.backbones.audio_features import ClapFeatures, FrameFeatures, LogMelFeatures, extract_frame_features
from rewards.backbones.image_features import extract_features
from rewards.backbones.vae_features import VaeFeatures
from rewards.clap import ClapReward
from rewards.ratings import RatingReward
from rewards.set_rewards import FrameFrechetReward, FrechetReward, PerSampleFrechetReward, VendiReward
from rewards.tones import revoiced, worded
from scripts.benchmarks.planted_ratings import depth, rated_clips

PART = 32  # clips of a trial of a set reward
BATCH = 64  # clips that are heard at once


@dataclass(frozen=True)
class Heard:
    """An evaluation: its records (N), and their clips (N, 1, L)."""

    records: tuple[SampleRecord, ...]
    clips: Tensor

    @classmethod
    def of(cls, folder: Path) -> Heard:
        """A finished evaluation of the tones world, with its clips kept."""
        records = load_evaluation(folder).records
        read = WORLDS["tones"].read
        return cls(records, torch.stack([read(inside(folder, str(record.image))) for record in records]))


@dataclass(frozen=True)
class TrainedRun:
    """A training by ``seed``: the same prompts and noises before and after."""

    seed: int
    before: Heard
    after: Heard

    @classmethod
    def of(cls, folder: Path, seed: int) -> TrainedRun:
        """A finished one. Raises ValueError where the two evaluations are not of the same prompts and noises."""
        run = cls(seed, Heard.of(folder / "before"), Heard.of(folder / "after"))
        if [record.key for record in run.before.records] != [record.key for record in run.after.records]:
            raise ValueError(f"{folder} was evaluated on other prompts or noises after training than before")
        return run


class Measure(Protocol):
    """What is read off the clips of a run: ``records`` are what is claimed, ``trials`` are independent pairs."""

    @property
    def metric(self) -> str: ...

    def records(self, name: str, run: TrainedRun) -> list[PromptRecord]: ...

    def trials(self, run: TrainedRun) -> list[tuple[float, float]]: ...


@dataclass(frozen=True)
class RecordedMeasure:
    """A score that the evaluations hold; a prompt's mean is a trial."""

    metric: str

    def records(self, name: str, run: TrainedRun) -> list[PromptRecord]:
        before, after = ([record.scores[self.metric] for record in side.records] for side in (run.before, run.after))
        return by_prompt(name, self.metric, run, before, after)

    def trials(self, run: TrainedRun) -> list[tuple[float, float]]:
        return [(record.before, record.after) for record in self.records("", run)]


@dataclass(frozen=True)
class OfClips:
    """A ``reward`` of single clips; a prompt's mean is a trial."""

    metric: str
    reward: RewardFunction

    def records(self, name: str, run: TrainedRun) -> list[PromptRecord]:
        return by_prompt(name, self.metric, run, self._scores(run.before), self._scores(run.after))

    def trials(self, run: TrainedRun) -> list[tuple[float, float]]:
        return [(record.before, record.after) for record in self.records("", run)]

    def _scores(self, heard: Heard) -> list[float]:
        prompts = [WORLDS["tones"].prompt(record.prompt) for record in heard.records]
        starts = range(0, len(prompts), BATCH)
        parts = [self.reward(heard.clips[i : i + BATCH], prompts[i : i + BATCH]) for i in starts]
        return torch.cat(parts).tolist()


@dataclass(frozen=True)
class OfSets:
    """A ``reward`` of sets of ``features``; a random part of ``PART`` clips is a trial."""

    metric: str
    features: FeatureFunction
    reward: SetReward

    def records(self, name: str, run: TrainedRun) -> list[PromptRecord]:
        before, after = (self.reward(self._described(heard)) for heard in (run.before, run.after))
        count = len(run.before.records)
        return [PromptRecord(name, self.metric, run.seed, "all", "the whole set", before, after, count)]

    def trials(self, run: TrainedRun) -> list[tuple[float, float]]:
        return compare_parts(self.reward, self._described(run.before), self._described(run.after), PART)

    def _described(self, heard: Heard) -> Tensor:
        return torch.cat([self.features(part) for part in heard.clips.split(BATCH)])


def by_prompt(
    name: str, metric: str, run: TrainedRun, before: Sequence[float], after: Sequence[float]
) -> list[PromptRecord]:
    """The scores of all clips as one record a prompt."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, record in enumerate(run.before.records):
        rows.setdefault((record.task, record.prompt), []).append(row)
    return [
        PromptRecord(
            name, metric, run.seed, *key, _mean([before[i] for i in at]), _mean([after[i] for i in at]), len(at)
        )
        for key, at in rows.items()
    ]


@torch.no_grad()
def measures(clap: str = "tones-clap") -> dict[str, Measure]:
    """The targets of the runs of compare/tones_methods.yaml, on other reference clips than those of training."""
    mel, embedding = LogMelFeatures(SAMPLE_RATE), ClapFeatures(clap, SAMPLE_RATE)
    frames = extract_frame_features(revoiced(["organ"], (-32.0, -26.0), seed=1), mel)
    return {
        "strict": RecordedMeasure("strict"),
        "partial": RecordedMeasure("partial"),
        "fad": OfSets("less FAD", FrameFeatures(mel), FrameFrechetReward(frames)),
        "clip_fad": OfClips("less FAD by clip", PerSampleFrechetReward(mel, frames)),
        "text": OfSets("less distance to words", embedding, FrechetReward(worded(["organ"], clap))),
        "vendi": OfSets("Vendi score", LogMelFeatures(SAMPLE_RATE, floor=-50.0), VendiReward()),
        "clap": OfClips("CLAP score", ClapReward(clap, SAMPLE_RATE)),
    }


@torch.no_grad()
def dragon_measures(clap: str = "tones-clap") -> dict[str, Measure]:
    """The targets of the runs of compare/tones_dragon.yaml, by other clips and raters, and what is reported beside."""
    vae, embedding = VaeFeatures("tones-audio", SAMPLE_RATE), ClapFeatures(clap, SAMPLE_RATE)
    clips = revoiced(count=128, seed=1)
    by_vae, by_clap = (extract_frame_features(clips, encoder) for encoder in (vae, embedding))
    return {
        "strict": RecordedMeasure("strict"),
        "partial": RecordedMeasure("partial"),
        "vae_fad": OfSets("less FAD by the VAE", FrameFeatures(vae), FrameFrechetReward(by_vae)),
        "vae_fad_clip": OfClips("less FAD by clip, by the VAE", PerSampleFrechetReward(vae, by_vae)),
        "clap_fad": OfSets("less FAD by CLAP", embedding, FrechetReward(extract_features(clips, embedding))),
        "clap_fad_clip": OfClips("less FAD by clip, by CLAP", PerSampleFrechetReward(embedding, by_clap)),
        "clap_score": OfClips("CLAP score", ClapReward(clap, SAMPLE_RATE)),
        "rating": OfClips("rating by other raters", RatingReward(embedding, rated_clips(seed=1))),
        "taste": OfClips("true rating", depth),
    }


@torch.no_grad()
def rewards_row(
    name: str, target: Measure, runs: Sequence[TrainedRun], metrics: Mapping[str, Measure]
) -> dict[str, Any]:
    """Measure a recipe for a row of a table like DRAGON's table 1.

    The row holds the win rate of the ``target`` over the trials of all seeds, and the means of every measure before and
    after training.
    """
    before, after = zip(*(trial for run in runs for trial in target.trials(run)), strict=True)
    means = {measure.metric: _means([measure.records("", run) for run in runs]) for measure in metrics.values()}
    return {"name": name, "target": target.metric, "wins": asdict(win_test(before, after)), "rewards": means}


def _means(by_run: Sequence[Sequence[PromptRecord]]) -> dict[str, float]:
    """The means over tasks, then over runs."""
    by_part: dict[str, list[float]] = {"before": [], "after": []}
    for records in by_run:
        tasks = {record.task for record in records}
        for part, values in by_part.items():
            values.append(_mean([_mean([getattr(r, part) for r in records if r.task == task]) for task in tasks]))
    return {part: _mean(values) for part, values in by_part.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
