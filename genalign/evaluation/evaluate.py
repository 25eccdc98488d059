"""Evaluation of a pipeline on a prompt set, recorded sample by sample.

Two evaluations are compared by ``genalign.evaluation.paired``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from typing import Protocol as TypingProtocol

import torch
from torch import Tensor

from genalign.diffusion.rollout import generate
from genalign.metrics.intervals import Estimate, bootstrap_mean
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.runtime.files import write_json, write_text
from genalign.runtime.media import Writer, write_samples
from genalign.types import Grid, Pipeline, Prompt, PromptSet, RewardFunction

ELSEWHERE = "made elsewhere"
"""The kernel in the protocol of samples whose making is not known."""

_BATCH = 32  # of samples that are read


@dataclass(frozen=True)
class Protocol:
    """How a number was made, without the model: equal protocols make numbers comparable.

    ``sigmas`` are the grid's T + 1 noise levels with the final 0; ``resolution`` is (height, width) in pixels, or
    the length (L,) of audio in samples; ``seeds`` is the least number of noises per prompt.
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

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them, sigmas to nine decimals, so that the hash is the same on every machine."""
        canonical = {
            "guidance": float(self.guidance),
            "sigmas": [round(float(sigma), 9) for sigma in self.sigmas],
            "resolution": list(self.resolution),
        }
        return asdict(self) | canonical

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Protocol:
        """The inverse of ``as_dict``; an unknown field is an error."""
        return cls(**{**value, "sigmas": tuple(value["sigmas"]), "resolution": tuple(value["resolution"])})

    @classmethod
    def elsewhere(cls, prompts: PromptSet, counts: Sequence[int], verifier: str) -> Protocol:
        """What is known of samples that another program made, so many of each of ``prompts``."""
        tasks: dict[str, int] = {}
        for prompt, count in zip(prompts.prompts, counts, strict=True):
            tasks[prompt.task] = tasks.get(prompt.task, 0) + count
        return cls(
            suite=prompts.name,
            suite_hash=suite_hash(prompts),
            guidance=0.0,
            sigmas=(),
            kernel=ELSEWHERE,
            dtype=ELSEWHERE,
            batch_size=0,
            resolution=(),
            seeds=min(counts),
            samples_per_task=max(tasks.values()),
            verifier=verifier,
        )

    @property
    def hash(self) -> str:
        """16 hexadecimal characters over every field."""
        return _fingerprint(self.as_dict())


@dataclass(frozen=True)
class Job:
    """One image to make: the noise number ``sample`` of a prompt."""

    prompt: Prompt
    sample: int

    @property
    def seed(self) -> int:
        return noise_seed(self.prompt.text, self.sample)


@dataclass(frozen=True)
class Record:
    """One image that was made and scored. ``image`` is relative to the evaluation's folder; a failed score is NaN."""

    prompt: str
    task: str
    sample: int
    seed: int
    image: str | None
    scores: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What the same image has in another evaluation."""
        return self.task, self.prompt, self.sample, self.seed


class Kept(TypingProtocol):
    """The finished batches of an evaluation."""

    def read(self, number: int) -> Sequence[Record] | None: ...

    def add(self, number: int, records: Sequence[Record]) -> None: ...


@dataclass(frozen=True)
class Value:
    """A number of one sample."""

    task: str
    prompt: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """Every image of an evaluation; the estimates are made from them."""

    protocol: Protocol
    records: tuple[Record, ...]

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(self.records[0].scores) if self.records else ()

    @property
    def overall(self) -> dict[str, Estimate]:
        """The mean over tasks of each score."""
        return {name: estimate(self._values(name)) for name in self.score_names}

    @property
    def tasks(self) -> dict[str, dict[str, Estimate]]:
        """The mean of each score in each task, tasks in order of first appearance."""
        return by_task({name: self._values(name) for name in self.score_names})

    @property
    def failed(self) -> int:
        """Images that at least one scorer could not score."""
        return sum(not all(map(math.isfinite, record.scores.values())) for record in self.records)

    def summary(self) -> dict[str, Any]:
        """Protocol, estimates and failures, ready for JSON; ``n`` counts the images that were scored.

        Raises:
            ValueError: a score failed on every image of a task.
        """
        return {
            "protocol": self.protocol.as_dict(),
            "protocol_hash": self.protocol.hash,
            "suite": self.protocol.suite,
            "overall": _as_dicts(self.overall),
            "tasks": {task: _as_dicts(estimates) for task, estimates in self.tasks.items()},
            "failed": self.failed,
        }

    def save(self, directory: Path) -> None:
        """Write records.jsonl, then summary.json; the images are there already."""
        lines = [json.dumps(record_as_dict(record), allow_nan=False) for record in self.records]
        write_text(directory / "records.jsonl", "".join(f"{line}\n" for line in lines))
        write_json(directory / "summary.json", self.summary())

    def _values(self, name: str) -> list[Value]:
        return [Value(record.task, record.prompt, record.scores[name]) for record in self.records]


def load_evaluation(directory: Path) -> Evaluation:
    """What ``Evaluation.save`` wrote."""
    protocol = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["protocol"]
    lines = (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return Evaluation(Protocol.from_dict(protocol), tuple(record_from_dict(json.loads(line)) for line in lines))


def suite_hash(prompts: PromptSet) -> str:
    """16 hexadecimal characters over the texts and their metadata, in order."""
    return _fingerprint([[prompt.text, prompt.metadata] for prompt in prompts.prompts])


def noise_seed(text: str, sample: int) -> int:
    """The seed below 2**63 of a prompt's noise number ``sample``, from its content alone: the same in every batch."""
    return int.from_bytes(hashlib.sha256(f"{text}\0{sample}".encode()).digest()[:8]) >> 1


def plan(prompts: PromptSet, samples_per_task: int, seeds: int) -> tuple[Job, ...]:
    """At least ``samples_per_task`` images of every task, from as many prompts as ``seeds`` noises of each allow.

    The prompts of a task are those with the lowest hash of their text, in the order of the set; a repeated text counts
    once. A task with few prompts gets more noises of each.
    """
    if samples_per_task < 1 or seeds < 1:
        raise ValueError(f"samples_per_task and seeds must be at least 1, got {samples_per_task} and {seeds}")
    return tuple(
        Job(prompt, sample)
        for group in prompts.by_task().values()
        for prompt, count in _chosen(group, samples_per_task, seeds)
        for sample in range(count)
    )


def _chosen(prompts: Sequence[Prompt], images: int, seeds: int) -> list[tuple[Prompt, int]]:
    """Some prompts of a task, and how many noises each of them gets."""
    distinct = {prompt.text: prompt for prompt in prompts}
    used = min(len(distinct), math.ceil(images / seeds))
    lowest = set(sorted(distinct, key=lambda text: hashlib.sha256(text.encode()).digest())[:used])
    return [(prompt, math.ceil(images / used)) for text, prompt in distinct.items() if text in lowest]


def evaluate(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    scorers: Mapping[str, RewardFunction],
    protocol: Protocol,
    output: Path | None = None,
    write: Writer = write_samples,
    processes: ProcessGroup = SINGLE_PROCESS,
    kept: Kept | None = None,
) -> Evaluation:
    """Make and score the images of ``jobs`` by the deterministic sampler, as ``protocol`` says.

    Args:
        scorers: named functions of samples (B, ...) and their prompts; the first one ranks first where pairs are
            compared.
        output: where given, samples go there as they are made, by ``write``, and at the end the evaluation is saved.
        processes: share the batches, and all get the whole; ``output`` is a folder that they all see.
        kept: batches that are finished, of the same model, jobs, scorers and protocol; each new one is added.

    Raises:
        ValueError: no job or scorer, a pipeline that samples on other noise levels than the protocol's, or a score that
            is not of shape (B,).
    """
    if not jobs or not scorers:
        raise ValueError("an evaluation needs at least one job and one scorer")
    texts, seeds = [job.prompt.text for job in jobs], [job.seed for job in jobs]
    grid, size = _grid(pipeline, protocol), protocol.batch_size
    numbers = processes.indices(math.ceil(len(jobs) / size))
    own = _finished(numbers, kept)
    todo = sorted(set(numbers) - own.keys())
    batches = generate(pipeline, texts, seeds, grid, protocol.guidance, size, processes, done=own.keys())
    for number, samples in zip(todo, batches, strict=True):
        batch = jobs[number * size : number * size + len(samples)]
        images = write(samples, output, number * size) if output else [None] * len(samples)
        own[number] = _records(batch, images, samples, scorers)
        if kept:
            kept.add(number, own[number])
    evaluation = Evaluation(protocol, _together(own, processes))
    if output and processes.is_main:
        evaluation.save(output)
    return evaluation


def _finished(numbers: Iterable[int], kept: Kept | None) -> dict[int, Sequence[Record]]:
    return {number: found for number in numbers if kept and (found := kept.read(number))}


def judge(
    files: Mapping[str, Prompt],
    read: Callable[[str], Tensor],
    scorers: Mapping[str, RewardFunction],
    suite: str,
    verifier: str,
) -> Evaluation:
    """Score samples that another program made: ``read`` gives that of each of ``files``, all of one shape.

    A sample's number among those of its prompt stands for its noise, which is unknown. Raises ValueError where there is
    no file.
    """
    if not files:
        raise ValueError("there is no sample to judge: list one or more")
    jobs, seen = [], dict[str, int]()
    for prompt in files.values():
        jobs.append(Job(prompt, seen.setdefault(prompt.text, 0)))
        seen[prompt.text] += 1
    prompts = PromptSet(suite, tuple({prompt.text: prompt for prompt in files.values()}.values()))
    records: list[Record] = []
    for start in range(0, len(jobs), _BATCH):
        names, part = list(files)[start : start + _BATCH], jobs[start : start + _BATCH]
        records += _records(part, names, torch.stack([read(name) for name in names]), scorers)
    return Evaluation(Protocol.elsewhere(prompts, list(seen.values()), verifier), tuple(records))


def _together(own: Mapping[int, Sequence[Record]], processes: ProcessGroup) -> tuple[Record, ...]:
    """The records of all processes in order."""
    told = processes.all_gather_object(
        [[number, [record_as_dict(record) for record in rows]] for number, rows in own.items()]
    )
    batches = sorted((batch for said in told for batch in said), key=lambda batch: batch[0])
    return tuple(record_from_dict(row) for _, rows in batches for row in rows)


def _grid(pipeline: Pipeline, protocol: Protocol) -> Grid:
    """The pipeline's grid on the protocol's sigmas; one that the pipeline shifted is refused."""
    grid = pipeline.grid(len(protocol.sigmas) - 1, protocol.sigmas[:-1])
    expected = torch.tensor(protocol.sigmas, dtype=torch.float64)
    if grid.sigma.shape != expected.shape or not torch.allclose(grid.sigma, expected, rtol=0, atol=1e-6):
        raise ValueError(
            f"the pipeline samples on sigmas {grid.sigma.tolist()}, the protocol says {list(protocol.sigmas)}: "
            "make the protocol from pipeline.grid(...).sigma, final 0 included"
        )
    return grid


@torch.no_grad()
def _scores(
    scorers: Mapping[str, RewardFunction], samples: Tensor, prompts: Sequence[Prompt]
) -> list[dict[str, float]]:
    """The scores of each sample; one that is not finite counts as failed."""
    columns: dict[str, list[float]] = {}
    for name, scorer in scorers.items():
        column = scorer(samples, prompts)
        if column.shape != (len(samples),):
            raise ValueError(f"scorer {name!r} must return shape ({len(samples)},), got {tuple(column.shape)}")
        columns[name] = [value if math.isfinite(value) else math.nan for value in column.tolist()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _records(
    jobs: Sequence[Job], images: Sequence[str | None], samples: Tensor, scorers: Mapping[str, RewardFunction]
) -> list[Record]:
    """The scored samples of a batch."""
    scores = _scores(scorers, samples, [job.prompt for job in jobs])
    return [
        Record(job.prompt.text, job.prompt.task, job.sample, job.seed, image, row)
        for job, image, row in zip(jobs, images, scores, strict=True)
    ]


def by_task(values: Mapping[str, Sequence[Value]]) -> dict[str, dict[str, Estimate]]:
    """Estimates of each score within each task."""
    tasks = dict.fromkeys(value.task for column in values.values() for value in column)
    return {
        task: {name: estimate(value for value in column if value.task == task) for name, column in values.items()}
        for task in tasks
    }


def estimate(values: Iterable[Value]) -> Estimate:
    """The mean over tasks of per-prompt means, failed values left out."""
    finite: dict[str, dict[str, list[float]]] = {}
    for item in values:
        prompts = finite.setdefault(item.task, {})
        if math.isfinite(item.value):
            prompts.setdefault(item.prompt, []).append(item.value)
    means = {task: [math.fsum(v) / len(v) for v in prompts.values()] for task, prompts in finite.items()}
    return bootstrap_mean(means, sum(len(v) for prompts in finite.values() for v in prompts.values()))


def _as_dicts(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: estimate.as_dict() for name, estimate in estimates.items()}


def record_as_dict(record: Record) -> dict[str, Any]:
    """Ready for JSON: null for a failed score."""
    scores = {name: value if math.isfinite(value) else None for name, value in record.scores.items()}
    return asdict(record) | {"scores": scores}


def record_from_dict(value: Mapping[str, Any]) -> Record:
    """The inverse."""
    scores = {name: math.nan if score is None else float(score) for name, score in value["scores"].items()}
    return Record(**{**value, "scores": scores})


def _fingerprint(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
