"""``genalign plan``: the geometry, calls and memory of a training run, and its errors, without loading weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from genalign.cli import parsing
from genalign.cli.checks import training_checks
from genalign.cli.context import CommandContext, named_rewards, print_table, require_rate
from genalign.cli.error_messages import error_line, print_errors
from genalign.cli.evaluate_settings import EvaluationSize
from genalign.cli.generation_settings import require_positive
from genalign.cli.run_prompts import RunPrompts
from genalign.cli.train_settings import Train
from genalign.diffusion.policy import Lora, Policy
from genalign.evaluation.evaluate import plan_samples
from genalign.runtime.distributed import ProcessGroup
from genalign.scoring.score import NamedReward, group_reward
from genalign.training.dry_run import DryRun, ToyPipeline, dry_run
from genalign.training.memory_estimate import CONTEXT, MemoryEstimate, estimate_memory
from genalign.training.meta_round import GeneratedSamples
from genalign.training.outline import Outline
from genalign.training.settings import FittedSettings
from genalign.training.students import rollout_guidance
from genalign.types import Prompt, PromptSet


@dataclass(frozen=True, kw_only=True)
class Plan(Train):
    """A training run whose size, calls and memory are printed.

    Args:
        processes: Number of processes of the run, each on its own GPU.
    """

    processes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "processes")


def plan_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign plan``: exit status 2 if training would fail, with every reason on standard error."""
    checks = list(training_checks(context))
    settings, _ = parsing.parse(Plan, arguments, "plan", checks=checks)
    training, sampling, processes = settings.training, settings.sampling, ProcessGroup(0, settings.processes)
    reasons = dict.fromkeys(parsing.failed(checks, settings))

    @contextlib.contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except parsing.INPUT_ERRORS as error:
            reasons[error_line(error)] = None

    # Count the calls; without the checkpoint or the prompts, on placeholders
    count = training.prompts_per_round or FittedSettings.prompts_per_round
    prompts = PromptSet("prompts", tuple(Prompt(str(number)) for number in range(count)))
    sources: RunPrompts | None = None
    with collecting():
        sources = RunPrompts.read(settings)
        sources.warn()
        prompts = sources.training
    outline: Outline | None = None
    guidance = 1.0 if sampling.guidance is None else sampling.guidance
    with collecting():
        outline = context.outline(settings.model)
        require_rate(settings, outline.pipeline.sample_rate)
        guidance = rollout_guidance(outline.pipeline, sampling, settings.recipe.objective)
    with collecting():
        toy = ToyPipeline.like(outline.pipeline, sampling) if outline else ToyPipeline.flow(sampling.num_steps)
        rewards = named_rewards(settings.rewards)
        unit, grouped = settings.recipe.objective.unit, group_reward(settings.rewards)
        fitted = training.fit(prompts, unit, processes, group_reward=grouped)
        result = dry_run(toy, rewards, prompts, settings.recipe, fitted, guidance, sampling.kernel)
        _print_calls(settings, fitted, outline, result)
        if outline is not None:
            try:
                _print_memory(_memory(settings, fitted, outline, sources, rewards, result.windows))
            except RuntimeError as error:  # of an operation whose result's size depends on values
                print(f"The memory of this model cannot be counted without its values: {error_line(error)}")

    print_errors(list(reasons))
    return 2 if reasons else 0


def _print_calls(settings: Plan, training: FittedSettings, outline: Outline | None, result: DryRun) -> None:
    """Print the sizes of a round and of the run, and the calls of single samples."""
    windows, samples = result.windows, training.prompts_per_round * training.group_size
    batches = training.batch_sizes(settings.recipe.objective.unit, settings.processes)
    limit = f", or as many as end within {settings.max_seconds:g} s" if settings.max_seconds else ""
    window_sizes = "/".join(str(size) for size in sorted({len(window) for window in windows}))
    fits = settings.training.rounds is None and settings.time_budget.is_set
    total = training.rounds
    rows = {
        "shape of a sample": " x ".join(map(str, outline.pipeline.sample_shape)) if outline else "no checkpoint",
        "shape of its latents": " x ".join(map(str, outline.pipeline.latent_shape)) if outline else "no checkpoint",
        "samples per round": f"{training.prompts_per_round} prompts x {training.group_size} = {samples}",
        "batches per round": f"{len(batches)} of {max(batches)}",
        "optimizer steps per round": f"{training.updates_per_round}",
        "trained steps per round": f"{window_sizes} of {settings.sampling.num_steps}",
        "different sets of trained steps": f"{len(windows)}",
        "rounds": (f"as many as fit time_budget, counted as {result.rounds}" if fits else f"{result.rounds} of {total}")
        + limit,
        "samples": f"{result.rounds * samples:,}",
        "optimizer steps": f"{result.rounds * training.updates_per_round:,}",
    }
    print_table(("geometry", ""), rows.items())
    counts = result.total.counts
    rows = {
        call: f"{result.first.counts[call]:,} in the first round, {counts[call]:,} in all" for call in sorted(counts)
    }
    print_table(("calls of single samples", "without evaluations"), rows.items())


def _memory(
    settings: Plan,
    training: FittedSettings,
    outline: Outline,
    prompts: RunPrompts | None,
    rewards: Sequence[NamedReward],
    windows: Sequence[tuple[int, ...]],
) -> Mapping[str, MemoryEstimate]:
    """Print the sizes of the networks, and count the memory of the ranks.

    Args:
        settings: The settings of the run.
        training: Those of the training, with all sizes.
        outline: The checkpoint.
        prompts: The prompts of the run; None if they cannot be read.
        rewards: The rewards, which are not called.
        windows: The sets of trained steps, of which the largest counts.
    """
    lora = settings.lora or (Lora() if settings.init_lora else None)  # init_lora may have another rank
    policy = Policy(outline.pipeline.denoiser, lora, settings.ema_decay)
    parameters = {network.name: network.parameters for network in outline.networks}
    parameters["trained"] = sum(parameter.numel() for parameter in policy.parameters)
    rows = {name: f"{count / 1e6:,.3f}" for name, count in parameters.items()}
    print_table(("network", "million parameters"), rows.items())
    recipe = replace(settings.recipe, schedule=lambda *_: max(windows, key=len))
    between = _generations(settings, prompts, training.batch_size)
    sampling, processes = settings.sampling, settings.processes
    return estimate_memory(outline, policy, recipe, training, sampling, rewards, between, processes)


def _generations(settings: Plan, prompts: RunPrompts | None, batch_size: int) -> list[GeneratedSamples]:
    """List the samples generated between rounds; without ``prompts`` an evaluation counts as one batch."""
    sampling, parts = settings.evaluation or settings.sampling, list[GeneratedSamples]()
    for name in settings.evaluation_prompts():
        size: EvaluationSize = getattr(settings, name)
        count = size.batch_size or batch_size
        if prompts is not None:
            count = len(plan_samples(prompts.evaluations[name], size.samples_per_task, size.seeds))
        parts.append(
            GeneratedSamples(name, sampling, size.batch_size or batch_size, count, joined=name == "reward_hacking")
        )
    if settings.sample_grid.every:
        parts.append(
            GeneratedSamples("sample_grid", sampling, batch_size, settings.sample_grid.count, joined=True, on_main=True)
        )
    return parts


def _print_memory(estimates: Mapping[str, MemoryEstimate]) -> None:
    """Print the memory of each phase for the ranks that differ, and name the phase with the peak."""
    for ranks, memory in estimates.items():
        sizes = {f"always: {name}": size for name, size in memory.always.items()}
        for phase, extra in memory.phases.items():
            sizes |= {f"{phase}: {name}": size for name, size in extra.items()}
            sizes[f"sum while {phase}"] = memory.peaks[phase]
        rows = {name: f"{size / 2**30:,.3f}" for name, size in sizes.items() if size}
        print_table((f"memory of the GPU, {ranks}", "GiB"), rows.items())
    for ranks, memory in estimates.items():
        phase, size = memory.peak
        print(f"peak of {ranks}: {size / 2**30:.1f} GiB, while {phase}")
    texts = [memory.phases["encoding texts"] for memory in estimates.values()]
    encoders = "" if all("activations" in sizes for sizes in texts) else "; activations of this model's text encoders"
    print(
        f"CUDA takes about {CONTEXT / 2**30:.0f} GiB more. Not counted: networks of rewards and features, and their"
        f" activations; FSDP, which shards weights{encoders}"
    )
