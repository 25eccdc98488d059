"""Few-step students in the shapes world: the base in few steps, students of it, and rewards on a few-step grid.

What holds, fixed beforehand (seeds 41 to 43, held-out prompts of ``comp``, 96 images a task of 3 noises):

- ``few_steps``: the partial accuracy of a two-step student is at least 0.15 above that of the base in two steps by the
  same sampler, and RG-LCD is above consistency distillation in its reward, each with its interval.
- ``few_step_rewards``: the reward rises. Reported beside it: the Frechet distance of CLIP features to renders, which
  Reward-Instruct's paper says gets worse, and the variety; without the leash the variety falls below half, with it not.

    python scripts/benchmarks/proofs.py few_step_base few_steps few_step_rewards
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.records import PromptRecord, prompt_records
from rewards.shapes import rendered
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.set_measures import nearness, set_records, variety
from scripts.benchmarks.shapes_sampling import shapes_sampling
from scripts.benchmarks.trained_runs import RESULTS, arm_gains, compared, head, run_genalign

STEPS = (1, 2, 4, 8)
KERNELS = {"ode": "ODE", "cps": "CPS"}
POOL = Path("runs/proofs/few_steps_pool")  # which the comparisons name
SCORES = ("partial", "strict")
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
    """Each evaluation of the base beside that of the most steps of the ODE, from the same noises."""
    best, records = load_evaluation(folders["ode", max(STEPS)]), list[PromptRecord]()
    for (kernel, steps), folder in folders.items():
        own = replace(load_evaluation(folder), protocol=best.protocol)  # they differ in the sampler, which is compared
        for score in SCORES:
            records += prompt_records(f"{kernel}_{steps}.{score}", score, 0, best, own)
    return records


def few_step_base(work: Path) -> None:
    """What the base model loses in 1, 2, 4 and 8 steps, by the ODE and by the consistency sampler."""
    claim = "shapes-sd3 in few steps by the ODE and by CPS(1), beside its 8 steps by the ODE (suite comp)"
    header = head(claim, "python scripts/benchmarks/proofs.py few_step_base")
    write_results(RESULTS, "few_step_base_shapes", header, base_records(base_evaluations(work / "few_step_base")))


def collect_pool(folder: Path = POOL, arguments: Sequence[str] = ()) -> None:
    """Collect samples of the teacher in 20 steps, or go on where it stopped."""
    own = ["--model.path", "shapes-sd3", "--prompts", "shapes:train", "--samples_per_prompt", "2", *_CLIP]
    own += ["--sampling.num_steps", "20", "--batch_size", "96"]
    run_genalign("collect", "--output", str(folder), *own, *arguments)


def few_steps(work: Path) -> None:
    """Students in two and four steps gain accuracy over the base by the same sampler; a reward on top raises itself."""
    collect_pool()
    runs = compared(work / "few_steps", "shapes_few_steps")
    records = [
        record
        for name, by_seed in runs.items()
        for score in (*SCORES, "clip")
        for record in arm_gains(f"{name}.{score}", score, score, by_seed)
    ]
    claim = (
        "Students of shapes-sd3 in two and four steps, by consistency distillation from its 20-step samples and by"
        " RG-LCD, beside the base in as many steps by the same sampler (suite comp)"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py few_steps")
    write_results(RESULTS, "few_steps_shapes", header, records)


def few_step_rewards(work: Path) -> None:
    """Rewards alone, and distribution matching, on four steps: the reward, nearness to renders, and variety."""
    runs, records = compared(work / "few_step_rewards", "shapes_few_step_rewards"), list[PromptRecord]()
    near = nearness(rendered("train", seed=1).images)
    for name, by_seed in runs.items():
        for score in (*SCORES, "clip"):
            records += arm_gains(f"{name}.{score}", score, score, by_seed)
        for seed, run in by_seed.items():
            records += set_records(f"{name}.distance", "less distance", seed, run, near)
            records += set_records(f"{name}.variety", "Vendi score", seed, run, variety)
    claim = (
        "Reward-Instruct and distribution matching on four steps of shapes-sd3: the reward, the Frechet distance of"
        " CLIP features to renders, and variety (suite comp)"
    )
    header = head(claim, "python scripts/benchmarks/proofs.py few_step_rewards")
    write_results(RESULTS, "few_step_rewards_shapes", header, records)
