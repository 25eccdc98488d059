"""Evaluation of a pipeline on a prompt set, recorded sample by sample.

Two evaluations are compared by ``genalign.evaluation.paired``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from genalign.diffusion.rollout import generate
from genalign.metrics.intervals import Estimate, Kind, mean_over_tasks
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.runtime.files import write_json, write_text
from genalign.runtime.media import Writer, write_samples
from genalign.types import Grid, Pipeline, Prompt, PromptSet

EXTERNAL = "made elsewhere"
"""The kernel and dtype in the protocol of samples that another program generated."""

_FILE_BATCH = 32  # samples read and scored at once by evaluate_files


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
    negative_prompt: str = ""
    kernel: str
    dtype: str
    batch_size: int
    resolution: tuple[int, ...]
    seeds: int
    samples_per_task: int
    verifier: str

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with sigmas rounded to nine decimals, so that every machine gets the same hash."""
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
    """One sample to generate: a prompt and the index ``sample`` of its initial noise."""

    prompt: Prompt
    sample: int

    @property
    def seed(self) -> int:
        return noise_seed(self.prompt.text, self.sample)


@dataclass(frozen=True)
class Judgment:
    """Scores (B,) of a batch, and for each sample what its score rests on, as JSON types, such as a judge's answers."""

    scores: Tensor
    details: Sequence[Any]


Scorer = Callable[[Tensor, Sequence[Prompt]], Tensor | Judgment]
"""A reward function, or one that also explains its scores."""


@dataclass(frozen=True)
class SampleRecord:
    """One sample with its scores. ``image`` is its file relative to the evaluation's folder; a failed score is NaN.

    ``details`` are those of a ``Judgment``, by the name of the scorer that gave it.
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


class BatchStore(Protocol):
    """Storage for the records of finished batches, so that an interrupted evaluation can resume."""

    def read(self, number: int) -> Sequence[SampleRecord] | None: ...

    def add(self, number: int, records: Sequence[SampleRecord]) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """The records of all samples under one protocol; estimates are computed from them.

    ``paired`` says that the scores are differences between two evaluations.
    """

    protocol: EvaluationProtocol
    records: tuple[SampleRecord, ...]
    paired: bool = False

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
        return {
            "protocol": self.protocol.as_dict(),
            "protocol_hash": self.protocol.hash,
            "suite": self.protocol.suite,
            "overall": {name: value.as_dict() for name, value in self.overall.items()},
            "tasks": {task: {name: v.as_dict() for name, v in row.items()} for task, row in self.tasks.items()},
            "failed": self.failed,
        }

    def save(self, directory: Path) -> None:
        """Write records.jsonl, then summary.json, beside the samples."""
        lines = [json.dumps(record_as_dict(record), allow_nan=False) for record in self.records]
        write_text(directory / "records.jsonl", "".join(f"{line}\n" for line in lines))
        write_json(directory / "summary.json", self.summary())

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
        kind: Kind = "score"
        if values <= ({-1, 0, 1} if self.paired else {0, 1}):
            kind = "share difference" if self.paired else "share"
        means = {task: [math.fsum(v) / len(v) for v in prompts.values()] for task, prompts in finite.items()}
        return mean_over_tasks(means, kind)


def load_evaluation(directory: Path) -> Evaluation:
    """Read the files that ``Evaluation.save`` wrote."""
    protocol = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["protocol"]
    lines = (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = tuple(record_from_dict(json.loads(line)) for line in lines)
    return Evaluation(EvaluationProtocol.from_dict(protocol), records)


def suite_hash(prompts: PromptSet) -> str:
    """16 hexadecimal characters over the texts and their metadata, in order."""
    return _json_hash([[prompt.text, prompt.metadata] for prompt in prompts.prompts])


def _json_hash(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def noise_seed(text: str, sample: int) -> int:
    """Derive the seed below 2**63 of a prompt's initial noise ``sample`` from both alone, whatever the batch."""
    return int.from_bytes(hashlib.sha256(f"{text}\0{sample}".encode()).digest()[:8]) >> 1


def plan_samples(prompts: PromptSet, samples_per_task: int, seeds: int) -> tuple[SampleSpec, ...]:
    """Select at least ``samples_per_task`` samples of every task, with about ``seeds`` noises per prompt.

    A task with few prompts gets more noises per prompt.
    """
    if samples_per_task < 1 or seeds < 1:
        raise ValueError(f"samples_per_task and seeds must be at least 1, got {samples_per_task} and {seeds}")
    specs: list[SampleSpec] = []
    for group in prompts.by_task().values():
        subset = select_prompts(group, math.ceil(samples_per_task / seeds))
        noises = range(math.ceil(samples_per_task / len(subset)))
        specs += [SampleSpec(prompt, noise) for prompt in subset for noise in noises]
    return tuple(specs)


def select_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Select at most ``count`` distinct prompts, those with the lowest hash of their text, in the order of the list."""
    distinct = {prompt.text: prompt for prompt in prompts}
    lowest = set(sorted(distinct, key=lambda text: hashlib.sha256(text.encode()).digest())[:count])
    return [prompt for text, prompt in distinct.items() if text in lowest]


def evaluate(
    pipeline: Pipeline,
    specs: Sequence[SampleSpec],
    scorers: Mapping[str, Scorer],
    protocol: EvaluationProtocol,
    output: Path | None = None,
    write: Writer = write_samples,
    processes: ProcessGroup = SINGLE_PROCESS,
    batches: BatchStore | None = None,
) -> Evaluation:
    """Generate the samples of ``specs`` with the deterministic sampler and score them.

    Args:
        pipeline: The model in its present state.
        specs: Prompts and noise indices, as from ``plan_samples``.
        scorers: Functions of samples (B, ...) and their B prompts, by name; comparisons sort by the first one.
        protocol: Noise levels, guidance and batch size to sample with; it is saved with the results.
        output: A folder, visible to all ranks, for the samples and at the end the evaluation; None saves nothing.
        write: Writes a batch of samples into ``output``.
        processes: Ranks that share the batches; each returns the whole evaluation.
        batches: Store to resume from, for the same model, specs, scorers and protocol; new batches are added.

    Raises:
        ValueError: no sample or scorer, a pipeline that samples on other noise levels than the protocol's, or a score
            whose shape is not (B,).
    """
    if not specs or not scorers:
        raise ValueError("an evaluation needs at least one sample and one scorer")
    grid, size = _protocol_grid(pipeline, protocol), protocol.batch_size
    texts, seeds = [spec.prompt.text for spec in specs], [spec.seed for spec in specs]

    # Resume with the batches that this rank has finished before, and generate the others.
    numbers = processes.indices(math.ceil(len(specs) / size))
    records = {number: rows for number in numbers if batches and (rows := batches.read(number))}
    remaining = sorted(set(numbers) - records.keys())
    samples_in_batches = generate(pipeline, texts, seeds, grid, protocol.guidance, size, processes, done=set(records))
    for number, samples in zip(remaining, samples_in_batches, strict=True):
        start = number * size
        images = write(samples, output, start) if output else [None] * len(samples)
        records[number] = _score_batch(specs[start : start + len(samples)], images, samples, scorers)
        if batches:
            batches.add(number, records[number])

    # Gather the batches of all ranks, and join them in order.
    own = [[number, [record_as_dict(record) for record in rows]] for number, rows in records.items()]
    gathered = sorted(
        (batch for rank in processes.all_gather_object(own) for batch in rank), key=lambda batch: batch[0]
    )
    evaluation = Evaluation(protocol, tuple(record_from_dict(row) for _, rows in gathered for row in rows))
    if output and processes.is_main:
        evaluation.save(output)
    return evaluation


def evaluate_files(
    files: Mapping[str, Prompt],
    read: Callable[[str], Tensor],
    scorers: Mapping[str, Scorer],
    suite: str,
    verifier: str,
) -> Evaluation:
    """Score samples that another program generated.

    The noises are unknown, so a sample's position among the samples of its prompt stands for its noise index.

    Args:
        files: Prompts by file name.
        read: Returns the sample of a file name; all have one shape.
        scorers: Functions of samples (B, ...) and their B prompts, by name.
        suite: Name of the prompt set in the protocol.
        verifier: Name of the verifier in the protocol.

    Raises:
        ValueError: there is no file.
    """
    if not files:
        raise ValueError("there is no sample to evaluate: list one or more")
    specs, counts = [], dict[str, int]()
    for prompt in files.values():
        specs.append(SampleSpec(prompt, counts.setdefault(prompt.text, 0)))
        counts[prompt.text] += 1
    records: list[SampleRecord] = []
    for start in range(0, len(specs), _FILE_BATCH):
        part, names = specs[start : start + _FILE_BATCH], list(files)[start : start + _FILE_BATCH]
        records += _score_batch(part, names, torch.stack([read(name) for name in names]), scorers)
    prompts = PromptSet(suite, tuple({prompt.text: prompt for prompt in files.values()}.values()))
    protocol = EvaluationProtocol.for_external_samples(prompts, list(counts.values()), verifier)
    return Evaluation(protocol, tuple(records))


def _protocol_grid(pipeline: Pipeline, protocol: EvaluationProtocol) -> Grid:
    """Return the pipeline's grid on the protocol's sigmas; raise ValueError if the pipeline shifts them again."""
    grid = pipeline.grid(len(protocol.sigmas) - 1, protocol.sigmas[:-1])
    expected = torch.tensor(protocol.sigmas, dtype=torch.float64)
    if grid.sigma.shape != expected.shape or not torch.allclose(grid.sigma, expected, rtol=0, atol=1e-6):
        raise ValueError(
            f"the pipeline samples on sigmas {grid.sigma.tolist()}, the protocol says {list(protocol.sigmas)}: "
            "make the protocol from pipeline.grid(...).sigma, final 0 included"
        )
    return grid


@torch.no_grad()
def _score_batch(
    specs: Sequence[SampleSpec],
    images: Sequence[str | None],
    samples: Tensor,
    scorers: Mapping[str, Scorer],
) -> list[SampleRecord]:
    """Score samples (B, ...) of ``specs``, saved as the files ``images``; scores that are not finite become NaN."""
    columns: dict[str, list[float]] = {}
    details: dict[str, Sequence[Any]] = {}
    for name, scorer in scorers.items():
        column = scorer(samples, [spec.prompt for spec in specs])
        if isinstance(column, Judgment):
            column, details[name] = column.scores, column.details
        if column.shape != (len(samples),):
            raise ValueError(f"scorer {name!r} must return shape ({len(samples)},), got {tuple(column.shape)}")
        columns[name] = [value if math.isfinite(value) else math.nan for value in column.tolist()]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    explained = [dict(zip(details, row, strict=True)) for row in zip(*details.values(), strict=True)] or [{}] * len(
        rows
    )
    return [
        SampleRecord(spec.prompt.text, spec.prompt.task, spec.sample, spec.seed, image, row, detail)
        for spec, image, row, detail in zip(specs, images, rows, explained, strict=True)
    ]


def record_as_dict(record: SampleRecord) -> dict[str, Any]:
    """Convert a record to JSON types, with null for a failed score, and without details where there are none."""
    scores = {name: value if math.isfinite(value) else None for name, value in record.scores.items()}
    row = asdict(record) | {"scores": scores}
    return row if record.details else {name: value for name, value in row.items() if name != "details"}


def record_from_dict(value: Mapping[str, Any]) -> SampleRecord:
    """Restore a record from ``record_as_dict``."""
    scores = {name: math.nan if score is None else float(score) for name, score in value["scores"].items()}
    return SampleRecord(**{**value, "scores": scores})
