"""``genalign evaluate geneval`` and ``genalign evaluate geneval-original``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genalign import config
from genalign.checkpoints import write_json
from genalign.commands.parts import Checkpoint, Outside
from genalign.evaluation import Evaluation, Protocol, load_evaluation, suite_hash
from genalign.geneval.comparing import Paired, compared
from genalign.geneval.files import read_prompts, read_results
from genalign.geneval.judging import Judge
from genalign.geneval.original import rescored
from genalign.geneval.running import GenEvalFolder, Share, Subject, Work, adapter_hash, manifest, verifier
from genalign.report import write_geneval
from genalign.sampling import Sampling
from genalign.types import PromptSet


@dataclass(frozen=True)
class EvaluateGenEval:
    """An evaluation on a GenEval prompt file, each prompt with ``seeds`` noises in batches of ``batch_size``.

    ``per_task`` takes that many prompts of every task in place of all. ``judge`` says what is in an image, by default
    Mask2Former and CLIP. ``against`` is the output of another model's evaluation to compare with. Several processes,
    as torchrun or accelerate start them, share the prompts; started again, it goes on where it stopped.
    """

    output: str
    prompts: str
    model: config.Model = field(default_factory=config.Model)
    lora: str | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(40, guidance=4.5))
    seeds: int = 4
    batch_size: int = 4
    per_task: int | None = None
    judge: Judge | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("seeds", self.seeds), ("batch_size", self.batch_size), ("per_task", self.per_task)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class GenEvalOriginal:
    """A finished evaluation, ``output``, by the results that GenEval's own evaluate_images.py made of its images/."""

    output: str
    results: str
    against: str | None = None


def geneval_command(outside: Outside, arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval``."""
    settings, plain = config.parse(EvaluateGenEval, arguments, "evaluate geneval")
    share = Share.from_environment(os.environ)
    _take_own_device(os.environ)
    prompts = some(read_prompts(Path(settings.prompts)), settings.per_task)
    work, subject = _prepared(outside, settings, plain["model"], prompts)
    work.folder.begin(manifest(work.protocol, subject))
    for index in work.do(share):
        print(f"{index + 1}/{len(prompts)}  {prompts.prompts[index].text}", flush=True)
    if left := work.left():
        print(f"{left} of {len(prompts)} prompts are left to other processes; if there are none, start it again")
        return 0
    with work.folder.alone():
        work.folder.finish(work.protocol, len(prompts))
        _conclude(work.folder.path, settings.against)
    return 0


def some(prompts: PromptSet, per_task: int | None) -> PromptSet:
    """The distinct prompts of a set; of every task the ``per_task`` with the lowest hash, in the order of the set."""
    distinct = {prompt.text: prompt for prompt in prompts.prompts}
    chosen: set[str] = set()
    for group in PromptSet(prompts.name, tuple(distinct.values())).by_task().values():
        texts = [prompt.text for prompt in group]
        chosen.update(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:per_task])
    return PromptSet(prompts.name, tuple(prompt for text, prompt in distinct.items() if text in chosen))


def _take_own_device(variables: Mapping[str, str]) -> None:
    """Let "cuda" mean this process's own GPU, where a launcher has numbered the processes of a machine."""
    if "LOCAL_RANK" in variables and torch.cuda.is_available():
        torch.cuda.set_device(int(variables["LOCAL_RANK"]))


def _prepared(
    outside: Outside, settings: EvaluateGenEval, model: Mapping[str, Any], prompts: PromptSet
) -> tuple[Work, Subject]:
    pipeline = outside.load(settings.model)
    lora = Path(settings.lora) if settings.lora else None
    if lora is not None:
        pipeline.load_lora(lora)
    judge = settings.judge or outside.geneval
    folder = GenEvalFolder(Path(settings.output))
    grid = settings.sampling.grid(pipeline)
    protocol = _protocol(pipeline, settings, prompts, judge)
    subject = Subject(
        {name: value for name, value in model.items() if name != "device"},
        pipeline.fingerprint,
        str(lora) if lora else None,
        adapter_hash(lora) if lora else None,
    )
    return Work(pipeline, prompts, judge, protocol, grid, folder), subject


def _protocol(pipeline: Checkpoint, settings: EvaluateGenEval, prompts: PromptSet, judge: Judge) -> Protocol:
    return Protocol(
        suite=prompts.name,
        suite_hash=suite_hash(prompts),
        guidance=settings.sampling.guidance,
        sigmas=tuple(settings.sampling.grid(pipeline).sigma.tolist()),
        kernel="ODE()",
        dtype=settings.model.autocast or settings.model.dtype,
        batch_size=settings.batch_size,
        resolution=pipeline.resolution,
        seeds=settings.seeds,
        images_per_task=settings.seeds * max(len(group) for group in prompts.by_task().values()),
        verifier=verifier(judge),
    )


def original_command(arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval-original``."""
    settings, _ = config.parse(GenEvalOriginal, arguments, "evaluate geneval-original")
    made = rescored(Path(settings.output), read_results(Path(settings.results)))
    _conclude(made, settings.against)
    return 0


def _conclude(folder: Path, against: str | None) -> None:
    """Print the summary, compare, and write the report of a finished evaluation."""
    print((folder / "summary.txt").read_text(encoding="utf-8"))
    evaluation = load_evaluation(folder)
    other = Path(against) if against else None
    for task, estimates in (evaluation.tasks | {"overall": evaluation.overall}).items():
        values = (f"{name} {value.mean:.3f} ({value.low:.3f} to {value.high:.3f})" for name, value in estimates.items())
        print(f"{task:14s}" + "  ".join(values))
    if other is not None:
        found = _compared(other, evaluation)
        write_json(folder / "comparison.json", {"against": str(other), **found.as_dict()})
        for name, gain in found.gain.items():
            rate = found.wins[name].rate
            print(
                f"{name} against {other.name}: {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), prompts won"
                f" {rate.mean:.1%} ({rate.low:.1%} to {rate.high:.1%}), ties {found.wins[name].ties:.1%} as half"
            )
    print(f"report: {write_geneval(folder, other)}")


def _compared(before: Path, after: Evaluation) -> Paired:
    if not (before / "summary.json").is_file():
        raise FileNotFoundError(f"{before} has no finished evaluation to compare with")
    return compared(load_evaluation(before), after)
