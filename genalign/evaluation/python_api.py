"""Evaluation in one call, offered as ``genalign.evaluate``; ``genalign.gain`` compares two of them in pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from genalign.diffusion.sampling import Sampling
from genalign.evaluation.engine import evaluate as run_evaluation
from genalign.evaluation.engine import numbered_files
from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, plan_samples, suite_hash
from genalign.evaluation.scorers import RewardScorer
from genalign.evaluation.sources import PipelineSource
from genalign.runtime.progress import Progress
from genalign.scoring.score import NamedReward, named
from genalign.types import Pipeline, PromptSet, RewardFunction


class SizedPipeline(Pipeline, Protocol):
    """A pipeline that knows the size of its samples, as all in ``pipelines`` do."""

    @property
    def resolution(self) -> tuple[int, ...]:
        """Height and width of the images in pixels, or the length of the audio in samples."""

    @property
    def sample_rate(self) -> int | None:
        """Audio samples per second; None for images."""

    @property
    def negative_prompt(self) -> str:
        """The text that guidance leads away from; "" for the default of the model's family."""


def evaluate(
    pipeline: SizedPipeline,
    prompts: PromptSet | str | Sequence[str],
    rewards: RewardFunction | NamedReward | Mapping[str, RewardFunction] | Sequence[NamedReward],
    sampling: Sampling = Sampling(40),
    seeds: int = 4,
    batch_size: int = 4,
    output: str | Path | None = None,
) -> Evaluation:
    """Sample every prompt from ``seeds`` noises, and score the samples.

    The noise follows from the prompt and the number of the sample, so two models are compared from the same noise:
    ``genalign.gain(evaluate(base, ...), evaluate(tuned, ...))``.

    Args:
        pipeline: The model as it is now.
        prompts: The prompts, as a set or a list of texts.
        rewards: A reward function, functions by name, or rewards.
        sampling: Steps, guidance and kernel.
        seeds: The number of samples of each prompt.
        batch_size: The number of samples that are generated and scored at once.
        output: A folder for the samples and the evaluation; None saves nothing.

    Returns:
        The scores of every sample; ``overall`` and ``tasks`` are means with their 95 % intervals.

    Raises:
        ValueError: There is no prompt or reward, or a reward scored no sample.
        RewardError: A reward cannot be used.
    """
    prompts = PromptSet.of(prompts)
    specs = plan_samples(prompts, None, seeds)
    if not specs:
        raise ValueError("there is no prompt to evaluate")
    scorer = RewardScorer({reward.name: reward for reward in named(rewards)})
    grid = sampling.grid(pipeline)
    kernel = sampling.kernel_on(grid)
    protocol = EvaluationProtocol(
        suite=prompts.name,
        suite_hash=suite_hash(prompts),
        guidance=sampling.guidance_scale(pipeline),
        sigmas=tuple(grid.sigma.tolist()),
        kernel=repr(kernel),
        dtype=str(next(pipeline.denoiser.parameters()).dtype).removeprefix("torch."),
        batch_size=batch_size,
        resolution=pipeline.resolution,
        seeds=seeds,
        samples_per_task=max(Counter(spec.prompt.task for spec in specs).values()),
        verifier=", ".join(scorer.score_names),
        negative_prompt=pipeline.negative_prompt,
    )
    source, folder = PipelineSource(pipeline, specs, protocol, kernel), Path(output) if output is not None else None
    return run_evaluation(source, scorer, protocol, folder, numbered_files(pipeline.sample_rate), progress=Progress())
