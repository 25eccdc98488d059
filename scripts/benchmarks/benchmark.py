"""Speed and memory compared with the bare libraries: medians of repeated, interleaved runs in one process.

    python scripts/benchmarks/benchmark.py PART

rollout    images/s relative to the diffusers pipeline
train      one training pass relative to forward + backward of the same transformer
memory     peak memory for T and for 4 T steps
dense      DenseGRPO's completions relative to as many NFE of a rollout
overhead   cost of a search beyond NFE, decoding and rewards
round      GFLOP/s of a round of the demo and what takes its time, compared with an older commit (--against)
methods    every method's training pass relative to Flow-GRPO's, per NFE
scale      cost of a round by group size, steps, resolution, rewards (scale_benchmark.py)
search     searches at equal cost, or some of its parts (search_benchmark.py)
compare    time to a score compared with a plain loop, or some of its parts (speed_benchmark.py)

Each part writes docs/results/benchmark_PART.json, with the repeats in docs/results/raw/benchmark_PART.jsonl; search
writes docs/results/search_shapes.json. The last two save their parts in runs/ and resume from there.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from genalign import assets
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipes import awm, dense_grpo, dragon, flow_grpo, nft, prdp
from genalign.diffusion.completion import complete
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import ReplayBatch, Rollout, RolloutInputs, kernel_per_step, replay, rollout
from genalign.diffusion.transitions import ODE, FlowSDE, Kernel
from genalign.runtime.cpu import retain_freed_memory
from genalign.scoring.budget import Ledger, Metered
from genalign.scoring.score import NamedReward
from genalign.search import BestOfN, Prune
from genalign.search.engine import SearchRun
from genalign.search.strategy import Strategy
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.worlds import shapes
from pipelines import SD3
from rewards.shapes import ShapesReward
from scripts.benchmarks import round_benchmark, scale_benchmark, search_benchmark, speed_benchmark
from scripts.benchmarks.published_results import Measurement, ratios, write_results
from scripts.benchmarks.shapes_sampling import shapes_sampling
from scripts.benchmarks.trained_runs import head

BATCH, STEPS = 96, 10
SAMPLING = shapes_sampling(STEPS)
AUTOCAST = torch.bfloat16


def start(pipeline: SD3) -> RolloutInputs:
    """The rollout inputs of one batch of train prompts."""
    texts = [prompt.text for prompt in shapes.prompts("train").prompts[:BATCH]]
    seeds = tuple(range(BATCH))
    return RolloutInputs(pipeline.encode(texts), torch.arange(BATCH), seeds, seeds)


def interleaved(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each function, run in turn, after one unmeasured turn."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, column in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            function()
            if turn:
                column.append(time.perf_counter() - began)
    return seconds


def benchmark_rollout(repeats: int) -> list[Measurement]:
    """Images/s of the ODE and the SDE rollout over the diffusers pipeline's, same batch, steps and dtype."""
    pipeline = SD3.load(assets.resolve("shapes-sd3"), autocast=AUTOCAST)
    pipeline.pipe.set_progress_bar_config(disable=True)
    begin, grid = start(pipeline), SAMPLING.grid(pipeline)
    noise, context = pipeline.initial_noise(begin.noise_seeds), begin.conditioning.tensors

    def bare() -> object:
        with torch.autocast("cpu", AUTOCAST):
            return pipeline.pipe(
                prompt_embeds=context["context"],
                pooled_prompt_embeds=context["pooled"],
                latents=noise,
                sigmas=[1 - i / STEPS for i in range(STEPS)],  # which the scheduler shifts
                num_inference_steps=STEPS,
                guidance_scale=1.0,
                output_type="latent",
            )

    def ours(kernel: Kernel) -> Callable[[], Rollout]:
        steps = tuple(range(STEPS - 1)) if kernel != ODE() else ()
        return lambda: rollout(pipeline, begin, grid, kernel_per_step(kernel, steps, STEPS), 1.0, store=steps)

    base, ode, sde = interleaved([bare, ours(ODE()), ours(FlowSDE(0.7))], repeats)
    return [
        *ratios("ode_rollout", "speed relative to diffusers", base, ode),
        *ratios("sde_rollout", "speed relative to diffusers", base, sde),
        *(Measurement("ode_rollout.images", "images/s", BATCH / seconds) for seconds in ode),
    ]


def benchmark_train(repeats: int) -> list[Measurement]:
    """Seconds of one training pass over those of the bare transformer's forward and backward on the same pairs."""
    pipeline = SD3.load(assets.resolve("shapes-sd3"), autocast=AUTOCAST)
    policy = Policy(pipeline.denoiser, Lora(rank=16, alpha=32))
    settings = TrainerSettings(
        prompts_per_round=BATCH // 8, group_size=8, batch_size=BATCH, updates_per_round=1, learning_rate=1e-12
    )
    recipe = flow_grpo(FlowSDE(0.9), window=2)
    rewards = [NamedReward("red", lambda samples, prompts: samples[:, 0].flatten(1).mean(1))]
    sampling = SAMPLING
    trainer = Trainer(pipeline, policy, rewards, shapes.prompts("train"), recipe, settings, sampling)
    prompts = next(trainer.prompts.rounds())
    parts = trainer.sample(0, prompts)
    outcome = trainer.gather_scores(parts, prompts)
    sampled = parts[0].rollout
    inputs = [bare_inputs(trainer, sampled, stored) for stored in range(len(sampled.steps))]

    def bare() -> None:
        for values in inputs:
            with torch.autocast("cpu", AUTOCAST):
                velocity = pipeline.denoiser(**values, return_dict=False)[0]
            velocity.float().pow(2).mean().backward()
        for parameter in policy.parameters:
            parameter.grad = None

    def reference() -> None:
        with torch.no_grad(), policy.reference():
            replay(pipeline, sampled, trainer.grid, trainer.kernel, ReplayBatch.of_step(0, BATCH), 1.0)

    whole, base, apart = interleaved(
        [lambda: trainer.learner.learn(0, prompts, parts, outcome, trainer.kernel), bare, reference], repeats
    )
    passes = [a - b for a, b in zip(whole, apart, strict=True)]
    return [
        *ratios("training_pass", "time relative to bare forward + backward", passes, base),
        *(Measurement("training_pass.pairs", "(image, step) pairs/s", 2 * BATCH / seconds) for seconds in passes),
    ]


def bare_inputs(trainer: Trainer, sampled: Rollout, stored: int) -> dict[str, torch.Tensor]:
    """What the transformer is called with at a stored step."""
    rows = sampled.inputs.conditioning[sampled.inputs.prompt].tensors
    timestep = trainer.grid[sampled.steps[stored]].timestep.float().expand(BATCH)
    return {
        "hidden_states": sampled.x[:, stored].contiguous(),
        "timestep": timestep,
        "encoder_hidden_states": rows["context"],
        "pooled_projections": rows["pooled"],
    }


def benchmark_memory(repeats: int) -> list[Measurement]:
    """Peak memory of a process that rolls out and trains a window of two steps, for T and for 4 T."""
    peaks: dict[int, list[float]] = {STEPS: [], 4 * STEPS: []}
    for _ in range(min(repeats, 3)):
        for steps, column in peaks.items():
            command = [sys.executable, __file__, "one-round", "--steps", str(steps)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            column.append(float(json.loads(out.splitlines()[-1])["peak"]))
    few, many = peaks.values()
    return [
        *ratios("peak_memory", f"{4 * STEPS} steps relative to {STEPS}", many, few),
        *(Measurement("peak_memory.process", "GB", peak / 1e9) for peak in many),
    ]


def one_round(steps: int) -> None:
    """One round, then the process's peak memory on standard output."""
    pipeline = SD3.load(assets.resolve("shapes-sd3"), autocast=AUTOCAST)
    policy = Policy(pipeline.denoiser, Lora(rank=16, alpha=32))
    settings = TrainerSettings(rounds=1, prompts_per_round=24, group_size=8, batch_size=96, updates_per_round=2)
    rewards = [NamedReward("red", lambda samples, prompts: samples[:, 0].flatten(1).mean(1))]
    sampling = shapes_sampling(steps)
    recipe = flow_grpo(FlowSDE(0.9), window=2)
    list(Trainer(pipeline, policy, rewards, shapes.prompts("train"), recipe, settings, sampling).rounds())
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def benchmark_dense(repeats: int) -> list[Measurement]:
    """Seconds of the completions of all nine noisy steps over those of as many forwards in a plain rollout."""
    pipeline = Metered(SD3.load(assets.resolve("shapes-sd3"), autocast=AUTOCAST), Ledger())
    begin, grid = start(pipeline.pipeline), SAMPLING.grid(pipeline)
    noisy = tuple(range(STEPS - 1))
    sampled = rollout(pipeline, begin, grid, kernel_per_step(FlowSDE(0.7), noisy, STEPS), 1.0, store=noisy)

    def plain() -> None:
        for _ in range(4):  # about as long as the completions: a machine's speed drifts
            rollout(pipeline, begin, grid, [ODE()] * STEPS, 1.0)

    def completions() -> None:
        complete(pipeline, sampled, grid, 1.0)

    forwards = []
    for run in (plain, completions):
        before = pipeline.ledger.copy()
        run()
        forwards.append(pipeline.ledger.since(before).nfe)
    base, ours = interleaved([plain, completions], repeats)
    each = [[seconds / count for seconds in column] for column, count in zip((base, ours), forwards, strict=True)]
    return ratios("completions", "seconds a forward relative to a rollout", each[1], each[0])


METHODS: dict[str, Callable[[], Recipe]] = {
    "flow_grpo": lambda: flow_grpo(FlowSDE(0.9), window=2),
    "dense_grpo": lambda: dense_grpo(FlowSDE(0.9), window=2),
    "prdp": lambda: prdp(FlowSDE(0.9), window=2),
    "dragon": lambda: dragon(draws=2),
    "nft": lambda: nft(draws=2),
    "awm": lambda: awm(draws=2),
}


def benchmark_methods(repeats: int) -> list[Measurement]:
    """Seconds of a training pass for each forward that it makes, a backward counting as two, over Flow-GRPO's."""
    passes, work = [], []
    for make in METHODS.values():
        pipeline = SD3.load(assets.resolve("shapes-sd3"), autocast=AUTOCAST)
        policy = Policy(pipeline.denoiser, Lora(rank=16, alpha=32))
        settings = TrainerSettings(
            prompts_per_round=BATCH // 8, group_size=8, batch_size=BATCH, updates_per_round=1, learning_rate=1e-12
        )
        rewards = [NamedReward("red", lambda samples, prompts: samples[:, 0].flatten(1).mean(1))]
        prompts = shapes.prompts("train")
        trainer = Trainer(pipeline, policy, rewards, prompts, make(), settings, SAMPLING)
        prompts = next(trainer.prompts.rounds())
        parts = trainer.sample(0, prompts)
        run = functools.partial(
            trainer.learner.learn, 0, prompts, parts, trainer.gather_scores(parts, prompts), trainer.kernel
        )
        before = trainer.ledger.copy()
        run()
        spent = trainer.ledger.since(before).counts
        passes.append(run)
        work.append(spent["nfe"] + 2 * spent["nfe backward"])
    seconds = interleaved(passes, repeats)
    each = [[second / count for second in column] for column, count in zip(seconds, work, strict=True)]
    metric = "seconds a forward of the training pass, relative to flow_grpo"
    return [
        record
        for name, column in list(zip(METHODS, each, strict=True))[1:]
        for record in ratios(name, metric, column, each[0])
    ]


def benchmark_overhead(repeats: int) -> list[Measurement]:
    """The share of a search's wall-clock that is neither forward nor decode nor reward: best-of-32 and pruning."""
    spent = [0.0]

    def timed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: object, **kwargs: object) -> torch.Tensor:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[0] += time.perf_counter() - began
            return result

        return call

    pipeline = SD3.load(assets.resolve("shapes-sd3"), autocast=AUTOCAST)
    # a clock around two methods of this one instance
    pipeline.predict, pipeline.decode = timed(pipeline.predict), timed(pipeline.decode)
    reward, measured = timed(ShapesReward("partial")), []
    validation = shapes.prompts("val").prompts
    strategies: dict[str, Strategy] = {"best_of_32": BestOfN(32), "prune_32": Prune((3, 5, 8), (0.5, 0.5, 0.5), 32)}
    for name, strategy in strategies.items():
        for turn in range(repeats + 1):
            rewards = [NamedReward("partial", reward)]
            run = SearchRun(pipeline, [validation[turn]], rewards, SAMPLING.grid(pipeline), 1.0, 32, str(turn))
            spent[0], began = 0.0, time.perf_counter()
            strategy(run, None)
            whole = time.perf_counter() - began
            if turn:
                measured.append(Measurement(f"search.{name}", "overhead, a share of wall-clock", 1 - spent[0] / whole))
    return measured


PARTS = {
    "rollout": benchmark_rollout,
    "train": benchmark_train,
    "memory": benchmark_memory,
    "dense": benchmark_dense,
    "methods": benchmark_methods,
    "overhead": benchmark_overhead,
    "scale": scale_benchmark.benchmark_scale,
}


def main() -> None:
    """Run the parts of the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "round", "one-round", "search", "compare"])
    named = ", ".join([*search_benchmark.PARTS, *speed_benchmark.PARTS])
    parser.add_argument("some", nargs="*", metavar="PART", help=f"of search or compare: {named}")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--against", metavar="COMMIT", help="of round: an older commit to compare with")
    parser.add_argument("--work", type=Path, default=Path("runs/search"), help="of search: the folder of its parts")
    options = parser.parse_args()
    retain_freed_memory()  # as the command does on a CPU
    if options.part == "one-round":
        return one_round(options.steps)
    if options.part == "search":
        search_benchmark.run_parts(options.some or search_benchmark.PARTS, options.work)
        return None
    if options.part == "compare":
        for part in options.some or speed_benchmark.PARTS:
            speed_benchmark.PARTS[part](speed_benchmark.Workspace(Path("runs/compare_speed")))
        return None
    claim, command = f"Speed and memory: {options.part}", f"python scripts/benchmarks/benchmark.py {options.part}"
    if options.part == "round":
        measured = round_benchmark.benchmark_round(options.repeats, options.against)
        command += f" --against {options.against}" if options.against else ""
    else:
        measured = PARTS[options.part](options.repeats)
    for row in write_results(Path("docs/results"), f"benchmark_{options.part}", head(claim, command), measured):
        print(f"{row.name:22s}{row.metric:44s}{row.mean:10.3f}  ({row.low:.3f} to {row.high:.3f}, {row.n} repeats)")


if __name__ == "__main__":
    main()
