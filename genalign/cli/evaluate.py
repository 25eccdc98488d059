"""``genalign evaluate``: scores the samples of a model or a folder on prompts, and writes a report page.

``evaluate prompts`` takes any prompts and scorers. The other commands are presets: they choose prompts and scorers, and
a ``Task`` says what else their benchmark writes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genalign.cli import parsing
from genalign.cli.compare_evaluations import report_evaluation
from genalign.cli.context import (
    Checkpoint,
    CommandContext,
    load_with_identity,
    model_protocol,
    named_rewards,
    prompt_set,
    rank_share,
    require_rate,
)
from genalign.cli.evaluate_settings import (
    Evaluate,
    EvaluateBenchmark,
    EvaluateGenEval,
    EvaluatePrompts,
    EvaluateShapes,
    EvaluateTones,
    EvaluationSize,
    GenEvalOriginal,
)
from genalign.cli.external_samples import external_samples
from genalign.cli.model_settings import Model
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.benchmarks import BENCHMARKS
from genalign.evaluation.engine import SampleWriter, evaluate, evaluate_share, numbered_files
from genalign.evaluation.evaluate import (
    Evaluation,
    EvaluationProtocol,
    SampleSpec,
    distinct_prompts,
    load_evaluation,
    plan_samples,
)
from genalign.evaluation.folder import EvaluationFolder, ModelIdentity, content_hash, manifest
from genalign.evaluation.geneval.evaluation_files import (
    GenEvalLayout,
    GenEvalScorer,
    verifier_description,
    write_geneval_files,
)
from genalign.evaluation.geneval.result_files import read_prompts, read_results
from genalign.evaluation.geneval.upstream_results import rescore
from genalign.evaluation.paired import check_protocols
from genalign.evaluation.scorers import JoinedScorer, RewardScorer, SampleScorer, Scorer
from genalign.evaluation.sources import FileSource, PipelineSource, SampleSource
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from genalign.runtime.files import without_infinities, write_json
from genalign.runtime.progress import SILENT, Progress
from genalign.scoring.budget import Ledger, Metered
from genalign.types import PromptSet
from genalign.worlds.registry import World, world_of


@dataclass(frozen=True)
class Task:
    """The prompts of an evaluation, and what its preset measures and writes.

    Args:
        prompts: The prompts of a model's samples; None takes those of a folder of samples.
        scorers: The preset's scorers.
        verifier: Their description in the protocol.
        world: The world of the prompts.
        check: Raises ValueError for prompts that cannot be scored, before anything is loaded.
        layout: Builds the writer of the samples; None numbers them.
        finish: Writes the benchmark's own files of a finished evaluation, and returns what to print.
    """

    prompts: PromptSet | None
    scorers: Sequence[SampleScorer] = ()
    verifier: str = ""
    world: World | None = None
    check: Callable[[PromptSet], None] = lambda prompts: None
    layout: Callable[[Sequence[SampleSpec]], SampleWriter] | None = None
    finish: Callable[[EvaluationFolder, Evaluation], str] = field(default=lambda folder, evaluation: "")


def prompts_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign evaluate prompts``."""
    settings, plain = parsing.parse(EvaluatePrompts, arguments, "evaluate prompts")
    return _run(context, settings, plain, _prompts_task(context, settings.prompts))


def shapes_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign evaluate shapes``."""
    settings, plain = parsing.parse(EvaluateShapes, arguments, "evaluate shapes")
    return _run(context, settings, plain, _prompts_task(context, settings.prompts))


def tones_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign evaluate tones``."""
    settings, plain = parsing.parse(EvaluateTones, arguments, "evaluate tones")
    return _run(context, settings, plain, _prompts_task(context, settings.prompts))


def _prompts_task(context: CommandContext, source: str | None) -> Task:
    """Take the prompts of a file or world; a world's verifier comes first."""
    world = world_of(source) if source else None
    if source is None or world is None:
        return Task(prompt_set(source) if source else None)
    return Task(prompt_set(source), [RewardScorer(context.scorers(world.name))], world.verifier, world)


def geneval_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign evaluate geneval``."""
    settings, plain = parsing.parse(EvaluateGenEval, arguments, "evaluate geneval")
    judge = settings.judge or context.geneval()
    task = Task(
        read_prompts(Path(settings.prompts)) if settings.prompts else None,
        [GenEvalScorer(judge)],
        verifier_description(judge),
        check=lambda prompts: judge.check(prompts.prompts),
        layout=GenEvalLayout,
        finish=write_geneval_files,
    )
    return _run(context, settings, plain, task)


def benchmark_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign evaluate benchmark NAME``."""
    settings, plain = parsing.parse(EvaluateBenchmark, arguments, "evaluate benchmark", first="name")
    if settings.name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {settings.name!r}: choose from {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[settings.name]
    files = [settings.prompts] if isinstance(settings.prompts, str) else settings.prompts
    prompts = benchmark.read([Path(path) for path in files])

    def finish(folder: EvaluationFolder, evaluation: Evaluation) -> str:
        numbers = {name: round(value, 4) for name, value in benchmark.aggregate(evaluation.records, prompts).items()}
        write_json(folder.path / "benchmark.json", without_infinities(numbers))
        lines = [f"{name:24s} {value:.6g}" for name, value in numbers.items()]
        if evaluation.protocol.seeds != benchmark.images:
            lines.append(
                f"published numbers are over {benchmark.images} images of each prompt: --seeds {benchmark.images}"
            )
        return "\n".join(lines)

    scorer, verifier = RewardScorer(benchmark.scorers(settings.judges)), benchmark.verifier(prompts, settings.judges)
    return _run(context, settings, plain, Task(prompts, [scorer], verifier, finish=finish))


def original_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign evaluate geneval-original``."""
    settings, _ = parsing.parse(GenEvalOriginal, arguments, "evaluate geneval-original")
    folder = rescore(Path(settings.output), read_results(Path(settings.results)))
    report_evaluation(folder, Path(settings.against) if settings.against else None)
    return 0


@dataclass(frozen=True)
class _Inputs:
    """The samples of an evaluation, how they are saved, and their description."""

    source: SampleSource
    write: SampleWriter
    protocol: EvaluationProtocol
    identity: ModelIdentity
    ledger: Ledger


def _run(context: CommandContext, settings: Evaluate, plain: Mapping[str, Any], task: Task) -> int:
    """Score this process's share of the samples; the process that finishes the last one writes the results."""
    rewards = {reward.name: reward for reward in named_rewards(settings.rewards)}
    scorers = [*task.scorers, *([RewardScorer(rewards)] if rewards else [])]
    if not scorers:
        raise ValueError(
            "rewards is empty: name at least one, as in --rewards.clip.function rewards.clip.ClipReward; only prompts"
            " of a world, as in --prompts shapes:comp, have a verifier that scores them"
        )
    scorer, share = JoinedScorer(scorers), rank_share()
    against = Path(settings.against) if settings.against else None
    earlier = load_evaluation(against) if against else None
    progress, folder = Progress(share.rank == 0), EvaluationFolder(Path(settings.output))
    verifier = _verifier(task, plain)
    inputs = (_files if settings.samples else _generated)(context, settings, plain, task, verifier, progress)
    if earlier:
        check_protocols(earlier.protocol, inputs.protocol)

    # Work on the batches, and finish if no other process has one
    source, count = inputs.source, len(inputs.source)
    folder.begin(manifest(inputs.protocol, inputs.identity), distinct_prompts(source.specs, inputs.protocol.suite))
    features = {name: choice.features for name, choice in settings.set_rewards.items()}
    evaluate_share(source, scorer, folder, inputs.write, features, share, inputs.ledger, progress)
    if left := folder.num_unfinished(count):
        print(f"{left} of {count} batches are left to other processes; if none is running, run this command again")
        return 0
    with folder.claims.exclusive():
        sets = {name: choice.reward for name, choice in settings.set_rewards.items()}
        with progress.phase("joining the batches"):
            evaluation = folder.finish(inputs.protocol, count, sets)
        if text := task.finish(folder, evaluation):
            print(text)
        report_evaluation(folder.path, against)
    return 0


def _verifier(task: Task, plain: Mapping[str, Any]) -> str:
    """Describe everything that scores the samples: the preset's scorers, then rewards and scores of the set."""
    rewards = {name: choice["function"] for name, choice in (plain["rewards"] or {}).items()}
    described = {"rewards": rewards, "set_rewards": plain["set_rewards"] or {}}
    own = json.dumps({key: value for key, value in described.items() if value}, sort_keys=True)
    return " | ".join(part for part in (task.verifier, own if own != "{}" else "") if part)


def _generated(
    context: CommandContext,
    settings: Evaluate,
    plain: Mapping[str, Any],
    task: Task,
    verifier: str,
    progress: Progress,
) -> _Inputs:
    """Load the model that makes the samples."""
    prompts, model = task.prompts, settings.model
    assert prompts is not None and model is not None, "the settings have a model and prompts"
    task.check(prompts)
    with progress.phase("loading the model"):
        pipeline, identity = load_with_identity(context, model, settings.lora, plain["model"])
    _require_medium(task.world, pipeline.sample_rate, prompts)
    pipeline.encode_ahead([prompt.text for prompt in prompts.prompts], rank_share(), progress=progress)
    require_rate({"rewards": settings.rewards, "set_rewards": settings.set_rewards}, pipeline.sample_rate)
    specs = plan_samples(prompts, settings.samples_per_task, settings.seeds)
    per_task = settings.samples_per_task or max(Counter(spec.prompt.task for spec in specs).values())
    size = EvaluationSize(per_task, settings.seeds, settings.batch_size)
    protocol = model_protocol(pipeline, model, settings.sampling, size, prompts, verifier)
    ledger = Ledger()
    write = task.layout(specs) if task.layout else numbered_files(pipeline.sample_rate)
    kernel = settings.sampling.kernel_on(settings.sampling.grid(pipeline))
    source = PipelineSource(Metered(pipeline, ledger), specs, protocol, kernel)
    return _Inputs(source, write, protocol, identity, ledger)


def _files(
    context: CommandContext,
    settings: Evaluate,
    plain: Mapping[str, Any],
    task: Task,
    verifier: str,
    progress: Progress,
) -> _Inputs:
    """List another program's samples."""
    root = Path(str(settings.samples))
    samples = external_samples(root, task.prompts, task.world)
    prompts = distinct_prompts(samples.specs, "samples")
    task.check(prompts)
    require_rate({"rewards": settings.rewards, "set_rewards": settings.set_rewards}, samples.sample_rate)
    with progress.phase("reading the samples", len(samples.files), "files"):
        identity = ModelIdentity({"samples": root.resolve().name}, content_hash(root, samples.files))
    counts: dict[tuple[str, str], int] = {}
    for spec in samples.specs:
        key = spec.prompt.task, spec.prompt.text
        counts[key] = counts.get(key, 0) + 1
    protocol = EvaluationProtocol.for_external_samples(prompts, list(counts.values()), verifier)
    source = FileSource(samples.specs, samples.files, samples.read, settings.batch_size, settings.device)
    return _Inputs(source, numbered_files(None), protocol, identity, Ledger())


def build_evaluator(
    pipeline: Checkpoint,
    model: Model,
    sampling: Sampling,
    size: EvaluationSize,
    prompts: PromptSet,
    scorers: Mapping[str, Scorer],
    world: World | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Callable[..., Evaluation]:
    """Bind an evaluation to a model and to prompts, noises, scorers and a protocol, as before and after training.

    Args:
        pipeline: The loaded model.
        model: Its settings.
        sampling: Steps, guidance and kernel.
        size: The number of samples per task and of noises per prompt, and the batch size.
        prompts: The prompts.
        scorers: Named functions that score the samples.
        world: The world of the prompts, whose verifier is among the scorers.
        processes: Ranks that share the samples.

    Returns:
        A function of an output folder, by default None, and a progress display, which evaluates the current model.

    Raises:
        ValueError: The prompts are of a world whose verifier expects a medium that this model does not generate.
    """
    _require_medium(world, pipeline.sample_rate, prompts)
    protocol = model_protocol(pipeline, model, sampling, size, prompts, world.verifier if world else "none")
    specs, scorer = plan_samples(prompts, size.samples_per_task, size.seeds), RewardScorer(scorers)
    write = numbered_files(pipeline.sample_rate)

    def run(output: Path | None = None, progress: Progress = SILENT) -> Evaluation:
        source = PipelineSource(pipeline, specs, protocol, sampling.kernel_on(sampling.grid(pipeline)))
        return evaluate(source, scorer, protocol, output, write, processes, progress)

    return run


def _require_medium(world: World | None, sample_rate: int | None, prompts: PromptSet) -> None:
    """Raise ValueError if a world's verifier expects another medium than a model at ``sample_rate`` generates."""
    if world and world.sample_rate != sample_rate:
        rates = world.sample_rate, sample_rate
        expected, actual = ("images" if rate is None else f"waveforms at {rate} Hz" for rate in rates)
        raise ValueError(
            f"the verifier of '{world.name}:{prompts.name}' expects {expected}, but this model generates {actual}:"
            " choose other prompts"
        )
