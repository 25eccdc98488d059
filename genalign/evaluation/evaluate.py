"""Evaluations: the protocol, the planned samples, their records, and the estimates that are computed from them.

Samples are made by ``genalign.evaluation.sources`` and scored by ``genalign.evaluation.engine``; two evaluations are
compared by ``genalign.evaluation.paired``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from genalign.metrics.intervals import Estimate, Kind, mean_over_tasks
from genalign.runtime.files import write_json, write_text
from genalign.types import Prompt, PromptSet

EXTERNAL = "made elsewhere"
"""The kernel and dtype in the protocol of samples that another program generated."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """The settings of an evaluation except the model: scores are comparable if their protocols are equal.

    ``sigmas`` are the grid's T + 1 noise levels with the final 0; ``resolution`` is (height, width) in pixels, or
    the length (L,) of audio in samples; ``seeds`` is the least number of initial noises per prompt; a
    ``negative_prompt`` of "" is the default of the model's family, and is left out of the hash.
    """

    suite: str
    suite_hash: str
    guidance: float
    sigmas: tuple[float, ...]
    kernel: str
    dtype: str
    batch_size: int
    resolution: tuple[int, ...]
    seeds: int
    samples_per_task: int
    verifier: str
    negative_prompt: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with sigmas rounded to nine decimals, so every machine gets the same hash."""
        canonical: dict[str, Any] = {
            "guidance": float(self.guidance),
            "sigmas": [round(float(sigma), 9) for sigma in self.sigmas],
            "resolution": list(self.resolution),
        }
        fields = asdict(self) | canonical
        if not self.negative_prompt:
            del fields["negative_prompt"]
        return fields

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> EvaluationProtocol:
        """Restore a protocol from ``as_dict``; an unknown field is an error."""
        return cls(**{**value, "sigmas": tuple(value["sigmas"]), "resolution": tuple(value["resolution"])})

    @classmethod
    def for_external_samples(cls, prompts: PromptSet, counts: Sequence[int], verifier: str) -> EvaluationProtocol:
        """Describe samples from another program, whose settings are unknown; ``counts`` are samples per prompt."""
        tasks: dict[str, int] = {}
        for prompt, count in zip(prompts.prompts, counts, strict=True):
            tasks[prompt.task] = tasks.get(prompt.task, 0) + count
        return cls(
            suite=prompts.name,
            suite_hash=suite_hash(prompts),
            guidance=0.0,
            sigmas=(),
            kernel=EXTERNAL,
            dtype=EXTERNAL,
            batch_size=0,
            resolution=(),
            seeds=min(counts),
            samples_per_task=max(tasks.values()),
            verifier=verifier,
        )

    @property
    def hash(self) -> str:
        """16 hexadecimal characters over every field."""
        return _json_hash(self.as_dict())


@dataclass(frozen=True)
class SampleSpec:
    """One sample: a prompt and the index ``sample`` of its initial noise.

    For a sample of another program, whose noise is unknown, the index is its number among the samples of its prompt.
    """

    prompt: Prompt
    sample: int
    external: bool = False

    @property
    def seed(self) -> int:
        """The seed of the noise, or the number of a sample of another program."""
        return self.sample if self.external else noise_seed(self.prompt.text, self.sample)


@dataclass(frozen=True)
class SampleRecord:
    """One sample with its scores. ``image`` is its file relative to the evaluation's folder; a failed score is NaN.

    ``details`` are those of ``ExplainedScores``, by the name of the scorer that gave it.
    """

    prompt: str
    task: str
    sample: int
    seed: int
    image: str | None
    scores: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, int]:
        """The same for the sample of this prompt and noise in every evaluation."""
        return self.task, self.prompt, self.sample, self.seed


@dataclass(frozen=True)
class SetValue:
    """A score of the whole set of ``n`` samples, such as minus a Frechet distance; one set has no interval."""

    value: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """The records of all samples under one protocol, from which estimates are computed; ``sets`` score whole sets."""

    protocol: EvaluationProtocol
    records: tuple[SampleRecord, ...]
    sets: Mapping[str, SetValue] = field(default_factory=dict)

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(self.records[0].scores) if self.records else ()

    @property
    def overall(self) -> dict[str, Estimate]:
        """The mean over tasks of each score."""
        return {name: self._estimate(self.records, name) for name in self.score_names}

    @property
    def tasks(self) -> dict[str, dict[str, Estimate]]:
        """The mean of each score in each task, tasks in order of first appearance."""
        tasks: dict[str, list[SampleRecord]] = {}
        for record in self.records:
            tasks.setdefault(record.task, []).append(record)
        return {task: {name: self._estimate(rows, name) for name in self.score_names} for task, rows in tasks.items()}

    @property
    def failed(self) -> int:
        """The number of samples that at least one scorer could not score."""
        return sum(not all(map(math.isfinite, record.scores.values())) for record in self.records)

    def summary(self) -> dict[str, Any]:
        """Return protocol, estimates and the number of failures as JSON types; ``n`` counts prompts with a score.

        Raises:
            ValueError: a score failed on every sample of a task.
        """
        summary = {
            "protocol": self.protocol.as_dict(),
            "protocol_hash": self.protocol.hash,
            "suite": self.protocol.suite,
            "overall": {name: value.as_dict() for name, value in self.overall.items()},
            "tasks": {task: {name: v.as_dict() for name, v in row.items()} for task, row in self.tasks.items()},
            "failed": self.failed,
        }
        return summary | ({"sets": {name: asdict(value) for name, value in self.sets.items()}} if self.sets else {})

    def save(self, directory: Path) -> None:
        """Write records.jsonl, then summary.json, beside the samples."""
        lines = [json.dumps(record_as_dict(record), allow_nan=False) for record in self.records]
        write_text(directory / "records.jsonl", "".join(f"{line}\n" for line in lines))
        write_json(directory / "summary.json", self.summary())

    def weighted_sum(self, weights: Mapping[str, float]) -> Estimate:
        """Estimate the mean over tasks of a weighted sum of scores, over the samples that have all of them."""
        name, records = " + ".join(weights), list[SampleRecord]()
        for record in self.records:
            total = sum(weight * record.scores[score] for score, weight in weights.items())
            records.append(replace(record, scores={name: total}))
        return self._estimate(records, name)

    def _estimate(self, records: Sequence[SampleRecord], name: str) -> Estimate:
        """Estimate the mean over tasks of the mean over prompts of a score; scores that are not finite are left out.

        A score that is 0 or 1 on every sample is a share.
        """
        finite: dict[str, dict[str, list[float]]] = {}
        for record in records:
            prompts = finite.setdefault(record.task, {})
            if math.isfinite(record.scores[name]):
                prompts.setdefault(record.prompt, []).append(record.scores[name])
        values = {value for prompts in finite.values() for scores in prompts.values() for value in scores}
        kind: Kind = "share" if values <= {0, 1} else "score"
        if empty := [task for task, prompts in finite.items() if not prompts]:
            samples = "samples" if len(empty) == len(finite) else f"samples of task {empty[0]!r}"
            raise ValueError(
                f"{name!r} scored none of the {samples}, so it has no mean: the reward raised, as a warning above"
                " says, or it returned NaN, or the samples are not finite"
            )
        means = {task: [math.fsum(v) / len(v) for v in prompts.values()] for task, prompts in finite.items()}
        return mean_over_tasks(means, kind)


def load_evaluation(directory: Path) -> Evaluation:
    """Read the files that ``Evaluation.save`` wrote. Raises FileNotFoundError for an unfinished evaluation."""
    path = directory / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no finished evaluation: run genalign evaluate on it to the end")
    summary = json.loads(path.read_text(encoding="utf-8"))
    lines = (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = tuple(record_from_dict(json.loads(line)) for line in lines)
    sets = {name: SetValue(**value) for name, value in summary.get("sets", {}).items()}
    return Evaluation(EvaluationProtocol.from_dict(summary["protocol"]), records, sets=sets)


def suite_hash(prompts: PromptSet) -> str:
    """16 hexadecimal characters over the texts and their metadata, in order."""
    return _json_hash([[prompt.text, prompt.metadata] for prompt in prompts.prompts])


def _json_hash(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def noise_seed(text: str, sample: int) -> int:
    """Derive the seed below 2**63 of a prompt's initial noise ``sample`` from both alone, whatever the batch."""
    return int.from_bytes(hashlib.sha256(f"{text}\0{sample}".encode()).digest()[:8]) >> 1


def plan_samples(prompts: PromptSet, samples_per_task: int | None, seeds: int) -> tuple[SampleSpec, ...]:
    """Select at least ``samples_per_task`` samples of every task, with about ``seeds`` noises per prompt.

    A task with few prompts gets more noises per prompt. None takes every prompt ``seeds`` times, in the order of the
    set.
    """
    if (samples_per_task is not None and samples_per_task < 1) or seeds < 1:
        raise ValueError(f"samples_per_task and seeds must be at least 1, got {samples_per_task} and {seeds}")
    if samples_per_task is None:
        distinct = {(prompt.task, prompt.text): prompt for prompt in prompts.prompts}.values()
        return tuple(SampleSpec(prompt, noise) for prompt in distinct for noise in range(seeds))
    specs: list[SampleSpec] = []
    for group in prompts.by_task().values():
        subset = select_prompts(group, math.ceil(samples_per_task / seeds))
        noises = range(math.ceil(samples_per_task / len(subset)))
        specs += [SampleSpec(prompt, noise) for prompt in subset for noise in noises]
    return tuple(specs)


def distinct_prompts(specs: Sequence[SampleSpec], name: str) -> PromptSet:
    """Collect the prompts of samples as a set, each once, in order."""
    prompts = {(spec.prompt.task, spec.prompt.text): spec.prompt for spec in specs}
    return PromptSet(name, tuple(prompts.values()))


def select_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Select at most ``count`` distinct prompts, those with the lowest hash of their text, in the order of the list."""
    distinct = {prompt.text: prompt for prompt in prompts}
    lowest = set(sorted(distinct, key=lambda text: hashlib.sha256(text.encode()).digest())[:count])
    return [prompt for text, prompt in distinct.items() if text in lowest]


def record_as_dict(record: SampleRecord) -> dict[str, Any]:
    """Convert a record to JSON types, with null for a failed score, and without details where there are none."""
    scores = {name: value if math.isfinite(value) else None for name, value in record.scores.items()}
    row = asdict(record) | {"scores": scores}
    return row if record.details else {name: value for name, value in row.items() if name != "details"}


def record_from_dict(value: Mapping[str, Any]) -> SampleRecord:
    """Restore a record from ``record_as_dict``."""
    scores = {name: math.nan if score is None else float(score) for name, score in value["scores"].items()}
    return SampleRecord(**{**value, "scores": scores})
