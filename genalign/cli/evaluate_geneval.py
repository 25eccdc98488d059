"""``genalign evaluate geneval`` and its relatives ``geneval-images``, ``geneval-original`` and ``geneval-compare``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from genalign.cli import config
from genalign.cli.context import Checkpoint, CommandContext, opened, own_share, print_estimates
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import Evaluation, Protocol, suite_hash
from genalign.evaluation.folder import Subject, content_hash, manifest
from genalign.evaluation.geneval.compare_models import compared, finished
from genalign.evaluation.geneval.image_sources import Existing, Generated
from genalign.evaluation.geneval.judge import Judge
from genalign.evaluation.geneval.result_files import Sample, read_prompts, read_results, read_samples
from genalign.evaluation.geneval.run_evaluation import GenEvalFolder, Work, verifier
from genalign.evaluation.geneval.upstream_results import rescored
from genalign.evaluation.paired import check_protocols
from genalign.evaluation.report import write_geneval
from genalign.runtime.distributed import RankShare
from genalign.runtime.files import write_json
from genalign.types import Prompt, PromptSet


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
class GenEvalImages:
    """An evaluation of ``images``, a folder in GenEval's layout that another program filled; they are judged on
    ``device``. The rest is as in ``genalign evaluate geneval``, resuming and sharing too.
    """

    output: str
    images: str
    device: str = "cpu"
    judge: Judge | None = None
    against: str | None = None


@dataclass(frozen=True)
class GenEvalOriginal:
    """A finished evaluation, ``output``, by the results that GenEval's own evaluate_images.py made of its images."""

    output: str
    results: str
    against: str | None = None


@dataclass(frozen=True)
class GenEvalCompare:
    """Two finished evaluations by one protocol: ``output``, whose report is written anew, after minus ``against``."""

    output: str
    against: str


def geneval_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval``."""
    settings, plain = config.parse(EvaluateGenEval, arguments, "evaluate geneval")
    prompts = some(read_prompts(Path(settings.prompts)), settings.per_task)
    judge = settings.judge or context.geneval
    judge.check(prompts.prompts)
    share = own_share(os.environ)
    pipeline, subject = opened(context, settings.model, settings.lora, plain["model"])
    sampling, folder = settings.sampling, GenEvalFolder(Path(settings.output))
    grid = sampling.grid(pipeline)
    source = Generated(pipeline, grid, sampling.guidance, settings.seeds, settings.batch_size, folder.path)
    protocol = _protocol(pipeline, settings, tuple(grid.sigma.tolist()), prompts, judge)
    return _carried_out(Work(source, prompts, judge, folder), share, protocol, subject, settings.against)


def images_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval-images``."""
    settings, _ = config.parse(GenEvalImages, arguments, "evaluate geneval-images")
    root, folder = Path(settings.images), GenEvalFolder(Path(settings.output))
    groups = _by_prompt(read_samples(root))
    prompts = PromptSet("images", tuple(Prompt(group[0].metadata["prompt"], group[0].metadata) for group in groups))
    judge = settings.judge or context.geneval
    judge.check(prompts.prompts)
    share = own_share(os.environ)
    files = [sample.path for group in groups for sample in group]
    subject = Subject({"images": settings.images}, content_hash(root, files))
    work = Work(Existing(groups, folder.path, settings.device), prompts, judge, folder)
    protocol = Protocol.elsewhere(prompts, [len(group) for group in groups], verifier(judge))
    return _carried_out(work, share, protocol, subject, settings.against)


def original_command(arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval-original``."""
    settings, _ = config.parse(GenEvalOriginal, arguments, "evaluate geneval-original")
    made = rescored(Path(settings.output), read_results(Path(settings.results)))
    _conclude(made, settings.against)
    return 0


def compare_geneval_command(arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval-compare``."""
    settings, _ = config.parse(GenEvalCompare, arguments, "evaluate geneval-compare")
    _conclude(Path(settings.output), settings.against)
    return 0


def some(prompts: PromptSet, per_task: int | None) -> PromptSet:
    """The distinct prompts of a set; of every task the ``per_task`` with the lowest hash, in the order of the set."""
    distinct = {prompt.text: prompt for prompt in prompts.prompts}
    chosen: set[str] = set()
    for group in PromptSet(prompts.name, tuple(distinct.values())).by_task().values():
        texts = [prompt.text for prompt in group]
        chosen.update(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:per_task])
    return PromptSet(prompts.name, tuple(prompt for text, prompt in distinct.items() if text in chosen))


def _by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each prompt. Raises ValueError for a prompt that has two folders."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.index, []).append(sample)
    seen: dict[str, Sample] = {}
    for first, *_ in groups.values():
        if (other := seen.setdefault(first.metadata["prompt"], first)) is not first:
            raise ValueError(
                f"{other.path.parent} and {first.path.parent} are of the same prompt: put its images into one folder"
            )
    return list(groups.values())


def _protocol(
    pipeline: Checkpoint, settings: EvaluateGenEval, sigmas: tuple[float, ...], prompts: PromptSet, judge: Judge
) -> Protocol:
    return Protocol(
        suite=prompts.name,
        suite_hash=suite_hash(prompts),
        guidance=settings.sampling.guidance,
        sigmas=sigmas,
        kernel="ODE()",
        dtype=settings.model.autocast or settings.model.dtype,
        batch_size=settings.batch_size,
        resolution=pipeline.resolution,
        seeds=settings.seeds,
        samples_per_task=settings.seeds * max(len(group) for group in prompts.by_task().values()),
        verifier=verifier(judge),
    )


def _carried_out(work: Work, share: RankShare, protocol: Protocol, subject: Subject, against: str | None) -> int:
    """Do this process's ``share``, and conclude if nothing is left of any."""
    if against:
        check_protocols(finished(Path(against)).protocol, protocol)
    count = len(work.prompts)
    work.folder.begin(manifest(protocol, subject))
    for index in work.do(share):
        print(f"{index + 1}/{count}  {work.prompts.prompts[index].text}", flush=True)
    if left := work.left():
        print(f"{left} of {count} prompts are left to other processes; if there are none, start it again")
        return 0
    with work.folder.claims.exclusive():
        work.folder.finish(protocol, count)
        _conclude(work.folder.path, against)
    return 0


def _conclude(folder: Path, against: str | None) -> None:
    """Print the summary, compare, and write the report of a finished evaluation."""
    evaluation = finished(folder)
    print((folder / "summary.txt").read_text(encoding="utf-8"))
    print_estimates(evaluation)
    other = Path(against) if against else None
    if other is not None:
        _compare(folder, evaluation, other)
    print(f"report: {write_geneval(folder, other)}")


def _compare(folder: Path, after: Evaluation, other: Path) -> None:
    """Print gains and win rates, and write them to comparison.json."""
    found = compared(finished(other), after)
    write_json(folder / "comparison.json", {"against": str(other), **found.as_dict()})
    for name, gain in found.gain.items():
        rate = found.wins[name].rate
        print(
            f"{name} against {other.name}: {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), prompts won"
            f" {rate.mean:.1%} ({rate.low:.1%} to {rate.high:.1%}), ties {found.wins[name].ties:.1%} as half"
        )
