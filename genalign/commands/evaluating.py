"""``genalign evaluate``, and the exams that training sits before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genalign import config
from genalign.commands.parts import load_model
from genalign.evaluation import Evaluation, Job, Protocol, evaluate, plan, suite_hash
from genalign.sampling import Sampling
from genalign.types import PromptSet, RewardFunction
from genalign.worlds import shapes
from pipelines import SD3
from rewards.shapes import ShapesReward


@dataclass(frozen=True)
class Exam:
    """What is to be made and scored, and how."""

    jobs: tuple[Job, ...]
    scorers: Mapping[str, RewardFunction]
    protocol: Protocol

    def take(self, pipeline: SD3, output: Path | None = None) -> Evaluation:
        """Evaluate the pipeline as it is now."""
        return evaluate(pipeline, self.jobs, self.scorers, self.protocol, output)


def exam(
    pipeline: SD3,
    model: config.Model,
    sampling: Sampling,
    amount: config.Amount,
    prompts: PromptSet,
    scorers: Mapping[str, RewardFunction],
) -> Exam:
    """``amount`` of images of ``prompts``; the shapes world's own scorers where the prompts are its own."""
    own = prompts.name in shapes.SUITES
    protocol = Protocol(
        suite=prompts.name,
        suite_hash=suite_hash(prompts),
        guidance=sampling.guidance,
        sigmas=tuple(sampling.grid(pipeline).sigma.tolist()),
        kernel="ODE()",
        dtype=model.autocast or model.dtype,
        batch_size=amount.batch_size,
        resolution=(pipeline.height * pipeline.pipe.vae_scale_factor, pipeline.width * pipeline.pipe.vae_scale_factor),
        seeds=amount.seeds,
        images_per_task=amount.images_per_task,
        verifier=shapes.VERIFIER_VERSION,
    )
    jobs = plan(prompts, amount.images_per_task, amount.seeds)
    return Exam(jobs, shapes_scorers() if own else scorers, protocol)


def shapes_scorers() -> dict[str, RewardFunction]:
    """Strict, partial and relaxed scores of the exact verifier."""
    return {"strict": ShapesReward("strict"), "partial": ShapesReward("partial"), "relaxed": ShapesReward("relaxed")}


def evaluate_command(arguments: Sequence[str]) -> int:
    """``genalign evaluate shapes``."""
    if not arguments or arguments[0] != "shapes":
        raise ValueError("name the world: genalign evaluate shapes --output DIR")
    settings, _ = config.parse(config.EvaluateShapes, arguments[1:], "evaluate shapes")
    pipeline = load_model(settings.model)
    if settings.lora:
        pipeline.load_lora(Path(settings.lora))
    asked = exam(pipeline, settings.model, settings.sampling, settings, shapes.prompts(settings.suite), {})
    made = asked.take(pipeline, Path(settings.output))
    for task, estimates in (made.tasks | {"overall": made.overall}).items():
        print(f"{task:14s}" + "  ".join(f"{name} {value.mean:.3f}" for name, value in estimates.items()))
    return 0
