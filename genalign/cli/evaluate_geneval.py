"""``genalign evaluate geneval`` and its relatives ``geneval-images``, ``geneval-original`` and ``geneval-compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from genalign.cli import config, parsing
from genalign.cli.context import CommandContext, load_with_identity, model_protocol, print_estimates, rank_share
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.evaluate import EvaluationProtocol, select_prompts
from genalign.evaluation.folder import ModelIdentity, content_hash, manifest
from genalign.evaluation.geneval.image_sources import FolderImages, PipelineImages
from genalign.evaluation.geneval.judge import Judge
from genalign.evaluation.geneval.result_files import SampleFile, read_prompts, read_results, read_samples
from genalign.evaluation.geneval.run_evaluation import GenEvalFolder, GenEvalRun, load_finished, verifier_description
from genalign.evaluation.geneval.upstream_results import rescore
from genalign.evaluation.paired import check_protocols, compare_models
from genalign.evaluation.report import write_geneval
from genalign.runtime.distributed import RankShare
from genalign.runtime.files import without_infinities, write_json
from genalign.types import Prompt, PromptSet


@dataclass(frozen=True)
class EvaluateGenEval:
    """An evaluation of a model on a GenEval prompt file.

    Processes started by torchrun or accelerate share the prompts; run the command again to resume.

    Args:
        output: Folder of the evaluation.
        prompts: GenEval's evaluation_metadata.jsonl, or a file of the same format.
        model: The generator.
        lora: An adapter of the model: the lora/ folder of a run, a .safetensors file or a Hub id.
        sampling: Sampling settings.
        seeds: Initial noises of each prompt.
        batch_size: Images generated and judged at once.
        per_task: Number of prompts of every task; null takes all.
        judge: Decides what is in an image; null is Mask2Former with CLIP.
        against: Output of another model's evaluation to compare with.
    """

    output: str
    prompts: str
    model: config.Model
    lora: str | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(40, guidance=4.5))
    seeds: int = 4
    batch_size: int = 4
    per_task: int | None = None
    judge: Judge | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        config.require_positive(self, "seeds", "batch_size", "per_task")


@dataclass(frozen=True)
class GenEvalImages:
    """An evaluation of images from another program, with the same resuming and sharing as for a model.

    Args:
        output: Folder of the evaluation.
        images: Folder of the images in GenEval's layout.
        device: Torch device of the judge.
        judge: Decides what is in an image; null is Mask2Former with CLIP.
        against: Output of another evaluation to compare with.
    """

    output: str
    images: str
    device: str = "cpu"
    judge: Judge | None = None
    against: str | None = None


@dataclass(frozen=True)
class GenEvalOriginal:
    """The images of a finished evaluation, scored by the results of GenEval's own evaluate_images.py.

    Args:
        output: Folder of the finished evaluation.
        results: The results file that evaluate_images.py wrote for its images.
        against: Output of another evaluation to compare with.
    """

    output: str
    results: str
    against: str | None = None


@dataclass(frozen=True)
class GenEvalCompare:
    """A comparison of two finished evaluations with equal protocols.

    Args:
        output: Folder of the later model's evaluation, in which the report is written.
        against: Folder of the earlier model's evaluation.
    """

    output: str
    against: str


def geneval_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval``."""
    settings, plain = parsing.parse(EvaluateGenEval, arguments, "evaluate geneval")
    prompts = subset_per_task(read_prompts(Path(settings.prompts)), settings.per_task)
    judge = settings.judge or context.geneval
    judge.check(prompts.prompts)
    share = rank_share()
    pipeline, identity = load_with_identity(context, settings.model, settings.lora, plain["model"])
    sampling, folder = settings.sampling, GenEvalFolder(Path(settings.output))
    samples_per_task = settings.seeds * max(len(group) for group in prompts.by_task().values())
    size = config.EvaluationSize(samples_per_task, settings.seeds, settings.batch_size)
    protocol = model_protocol(pipeline, settings.model, sampling, size, prompts, verifier_description(judge))
    grid = sampling.grid(pipeline)
    source = PipelineImages(pipeline, grid, sampling.guidance, settings.seeds, settings.batch_size, folder.path)
    return _evaluate(GenEvalRun(source, prompts, judge, folder), share, protocol, identity, settings.against)


def images_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval-images``."""
    settings, _ = parsing.parse(GenEvalImages, arguments, "evaluate geneval-images")
    root, folder = Path(settings.images), GenEvalFolder(Path(settings.output))
    groups = _group_by_prompt(read_samples(root))
    prompts = PromptSet("images", tuple(Prompt(group[0].metadata["prompt"], group[0].metadata) for group in groups))
    judge = settings.judge or context.geneval
    judge.check(prompts.prompts)
    share = rank_share()
    files = [sample.path for group in groups for sample in group]
    identity = ModelIdentity({"images": settings.images}, content_hash(root, files))
    counts = [len(group) for group in groups]
    protocol = EvaluationProtocol.for_external_samples(prompts, counts, verifier_description(judge))
    source = FolderImages(groups, folder.path, settings.device)
    return _evaluate(GenEvalRun(source, prompts, judge, folder), share, protocol, identity, settings.against)


def original_command(arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval-original``."""
    settings, _ = parsing.parse(GenEvalOriginal, arguments, "evaluate geneval-original")
    _report(rescore(Path(settings.output), read_results(Path(settings.results))), settings.against)
    return 0


def compare_geneval_command(arguments: Sequence[str]) -> int:
    """``genalign evaluate geneval-compare``."""
    settings, _ = parsing.parse(GenEvalCompare, arguments, "evaluate geneval-compare")
    _report(Path(settings.output), settings.against)
    return 0


def subset_per_task(prompts: PromptSet, per_task: int | None) -> PromptSet:
    """Select ``per_task`` distinct prompts of every task, or all distinct prompts, in the order of the set."""
    distinct = PromptSet(prompts.name, tuple({prompt.text: prompt for prompt in prompts.prompts}.values()))
    count, groups = per_task or len(distinct), distinct.by_task().values()
    subset = {prompt.text for group in groups for prompt in select_prompts(group, count)}
    return PromptSet(prompts.name, tuple(prompt for prompt in distinct.prompts if prompt.text in subset))


def _group_by_prompt(samples: Sequence[SampleFile]) -> list[list[SampleFile]]:
    """Group samples by prompt. Raises ValueError for a prompt that has two folders."""
    groups: dict[str, list[SampleFile]] = {}
    for sample in samples:
        group = groups.setdefault(sample.metadata["prompt"], [])
        group.append(sample)
        if sample.index != group[0].index:
            one, other = group[0].path.parent, sample.path.parent
            raise ValueError(f"{one} and {other} are of the same prompt: put its images into one folder")
    return list(groups.values())


def _evaluate(
    run: GenEvalRun, share: RankShare, protocol: EvaluationProtocol, identity: ModelIdentity, against: str | None
) -> int:
    """Evaluate this process's ``share`` of the prompts; the process that finishes the last one writes the report."""
    if against:
        check_protocols(load_finished(Path(against)).protocol, protocol)
    count = len(run.prompts)
    run.folder.begin(manifest(protocol, identity))
    for index in run.run(share):
        print(f"{index + 1}/{count}  {run.prompts.prompts[index].text}", flush=True)
    if left := run.num_unfinished():
        print(f"{left} of {count} prompts are left to other processes; if none is running, start this command again")
        return 0
    with run.folder.claims.exclusive():
        run.folder.finish(protocol, count)
        _report(run.folder.path, against)
    return 0


def _report(folder: Path, against: str | None) -> None:
    """Print the summary of a finished evaluation and its gain over another one, and write comparison and report."""
    evaluation = load_finished(folder)
    print((folder / "summary.txt").read_text(encoding="utf-8"))
    print_estimates(evaluation)
    other = Path(against) if against else None
    if other is not None:
        comparison = compare_models(load_finished(other), evaluation)
        write_json(folder / "comparison.json", {"against": str(other), **without_infinities(asdict(comparison))})
        for name, gain in comparison.gain.items():
            wins = comparison.wins[name]
            print(
                f"{name} against {other.name}: {gain.text('+.3f')}, prompts won"
                f" {wins.rate.text('.1%')}, ties {wins.ties:.1%} as half"
            )
    print(f"report: {write_geneval(folder, other)}")
