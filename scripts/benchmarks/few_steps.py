"""Few-step students in the shapes world: the base in few steps, students of it, and rewards on a few-step grid.

What holds, fixed beforehand (seeds 41 to 43, held-out prompts of ``comp``, 96 images a task of 3 noises):

- ``few_steps``: the partial accuracy of a two-step student is at least 0.15 above that of the base in two steps by the
  same sampler and noise levels, and RG-LCD is above consistency distillation in the sum of its rewards, each with its
  interval. ``few_step_base`` measures the room beforehand, from which the 0.15 is to be set anew.
- ``few_step_rewards``: the reward rises. Reported beside it: the Frechet distance of CLIP features to renders of the
  evaluated prompts, which Reward-Instruct's paper says gets worse, and the variety; without ``weight_distance`` the
  variety falls below half of the base's, with it not. Distribution matching with a reward has one seed.

The plan, in minutes of two cores: few_step_base 3, few_steps 12 x 9 and 8 for the pool, few_step_rewards 10 x 8.7; that
is 3.5 hours.

    python scripts/benchmarks/proofs.py few_step_base few_steps few_step_rewards
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord, prompt_records
from genalign.types import Prompt
from genalign.worlds import shapes
from genalign.worlds.shapes.diversity import evaluation_images
from rewards.backbones.reference_images import ImageTensor
from rewards.backbones.world_verifier import require_metadata
from scripts.benchmarks.learned_proxies import write_proxies
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.set_measures import Measure, nearness, set_records, variety
from scripts.benchmarks.shapes_sampling import shapes_sampling
from scripts.benchmarks.trained_runs import (
    RESULTS,
    arm_gains,
    compared,
    differences,
    finished,
    head,
    run_genalign,
    run_record,
    stopped,
)

STEPS = (1, 2, 4, 8)
KERNELS = {"ode": "ODE", "cps": "CPS"}
POOL = Path("runs/proofs/few_steps_pool")  # which the comparisons name
SCORES = ("partial", "strict")
REWARDS = ("clip", "regressor")  # which RG-LCD follows, each of weight 1
_CLIP = ["--rewards.clip.function", "rewards.clip.ClipReward", "--rewards.clip.function.model", "shapes-clip"]


def evaluation_arguments(kernel: str, steps: int, output: Path, size: Sequence[str] = ()) -> list[str]:
    """The command that evaluates the base model in some steps by a kernel."""
    sampling = ["--sampling.num_steps", str(steps), "--sampling.sigmas", str(shapes_sampling(steps).sigmas)]
    own = ["--sampling.kernel", KERNELS[kernel], *(["--sampling.kernel.eta", "1.0"] if kernel == "cps" else [])]
    return ["evaluate", "shapes", "--output", str(output), *sampling, *own, *size]


def base_evaluations(work: Path, size: Sequence[str] = ()) -> dict[tuple[str, int], Path]:
    """The folders of the evaluations of the base model, by kernel and steps; missing ones are made."""
    folders = {(kernel, steps): work / f"{kernel}-{steps}" for kernel in KERNELS for steps in STEPS}
    for (kernel, steps), folder in folders.items():
        run_genalign(*evaluation_arguments(kernel, steps, folder, size))
    return folders


def base_records(folders: Mapping[tuple[str, int], Path]) -> list[PromptRecord]:
    """Each evaluation of the base, and beside that of the most steps of the ODE, from the same noises."""
    best, records = load_evaluation(folders["ode", max(STEPS)]), list[PromptRecord]()
    for (kernel, steps), folder in folders.items():
        own = replace(load_evaluation(folder), protocol=best.protocol)  # they differ in the sampler, which is compared
        for score in SCORES:
            rows = prompt_records(f"{kernel}_{steps}.{score}", score, 0, best, own)
            level = f"{kernel}_{steps}.{score}.level"
            records += [*rows, *(replace(row, name=level, metric=f"{score}, level", before=0.0) for row in rows)]
    return records


def few_step_base(work: Path) -> None:
    """What the base model loses in 1, 2, 4 and 8 steps, by the ODE and by the consistency sampler."""
    claim = "shapes-sd3 in few steps by the ODE and by CPS(1), and beside its 8 steps by the ODE (suite comp)"
    header = head(claim, "python scripts/benchmarks/proofs.py few_step_base")
    write_results(RESULTS, "few_step_base_shapes", header, base_records(base_evaluations(work / "few_step_base")))


def collect_pool(folder: Path = POOL, arguments: Sequence[str] = ()) -> None:
    """Collect samples of the teacher in 20 steps, or go on where it stopped."""
    own = ["--model.path", "shapes-sd3", "--prompts", "shapes:train", "--samples_per_prompt", "2", *_CLIP]
    own += ["--sampling.num_steps", "20", "--batch_size", "96"]
    run_genalign("collect", "--output", str(folder), *own, *arguments)


def few_steps(work: Path) -> None:
    """Students in two and four steps beside the base by the same sampler, and rewards on top beside none."""
    collect_pool()
    write_proxies()
    every = compared(work / "few_steps", "shapes_few_steps", allow_failed=True)
    runs = finished(every)
    records = [
        record
        for name, by_seed in runs.items()
        for score in (*SCORES, *REWARDS)
        for record in arm_gains(f"{name}.{score}", score, score, by_seed)
    ]
    for steps in (2, 4):
        records += reward_differences(f"rg_lcd_{steps}", f"consistency_{steps}", runs)
    claim = (
        "Students of shapes-sd3 in two and four steps, by consistency distillation from its 20-step samples and by"
        " RG-LCD, beside the base in as many steps by the same sampler, and by the sum of RG-LCD's rewards beside each"
        " other (suite comp)"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py few_steps")
    write_results(RESULTS, "few_steps_shapes", {**header, "failed": stopped(every)}, records)


def reward_differences(arm: str, other: str, runs: Mapping[str, Mapping[int, Path]]) -> list[PromptRecord]:
    """The sum of ``REWARDS`` after training in two arms, paired by seed, prompt and noise."""
    columns = [differences(f"{arm}.difference", score, score, runs[other], runs[arm]) for score in REWARDS]
    metric = f"{' + '.join(REWARDS)}, {arm} - {other}"
    return [
        replace(rows[0], metric=metric, before=sum(row.before for row in rows), after=sum(row.after for row in rows))
        for rows in zip(*columns, strict=True)
    ]


def few_step_rewards(work: Path) -> None:
    """Rewards alone, and distribution matching, on four steps: the reward, nearness to renders, and variety."""
    every = compared(work / "few_step_rewards", "shapes_few_step_rewards", allow_failed=True)
    records = list[PromptRecord]()
    near: Measure | None = None
    for name, by_seed in finished(every).items():
        for score in (*SCORES, "clip"):
            records += arm_gains(f"{name}.{score}", score, score, by_seed)
        for seed, run in by_seed.items():
            near = near or nearness(renders(evaluation_images(run / "before")[1]))  # all runs evaluate these prompts
            records += set_records(f"{name}.distance", "less distance", seed, run, near)
            (varied,) = set_records(f"{name}.variety", "Vendi score", seed, run, variety)
            kept = "Vendi score after training over that before"
            records += [varied, run_record(f"{name}.variety_kept", kept, seed, varied.after / varied.before)]
    claim = (
        "Reward-Instruct and distribution matching on four steps of shapes-sd3: the reward, the Frechet distance of"
        " CLIP features to renders of the same prompts, and variety (suite comp)"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py few_step_rewards")
    write_results(RESULTS, "few_step_rewards_shapes", {**header, "failed": stopped(every)}, records)


def renders(prompts: Sequence[Prompt], seed: int = 1) -> ImageTensor:
    """Render a scene of each prompt, so that images of these prompts have references of the same tasks."""
    return ImageTensor(shapes.render_metadata(list(map(require_metadata, prompts)), np.random.default_rng(seed)))
