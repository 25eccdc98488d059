"""Pruning of an unmodified diffusers pipeline, by running it in parts.

Many samples begin, and a selection of them continues. The pipeline sees only a part of its timesteps and runs through
it as always. So no run is broken off, and any family works whose pipeline steps a scheduler. N samples.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.scoring.budget import DECODE, NFE, Ledger, reward_call
from genalign.search.pruning import Prune
from genalign.search.ranking import best_per_prompt
from genalign.search.results import PlainSample, PromptResult, SearchResult
from genalign.search.strategy import standalone
from genalign.types import Prompt
from pipelines.steering.batches import bounded_batches
from pipelines.steering.latent_scores import Decode, PipelineScorer, Rewards
from pipelines.steering.plain_call import call_latents
from pipelines.steering.scheduler_hooks import (
    Move,
    is_start,
    patched_step,
    replaced,
    scheduler_state,
    select_rows,
)

_DEPENDENT_ON_STEP = ("skip_guidance_layers", "control_guidance_start", "control_guidance_end")


def prune(
    pipe: DiffusionPipeline,
    prompt: str,
    reward: Rewards,
    strategy: Prune,
    decode: Decode | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    **call: Any,
) -> SearchResult:
    """Sample ``strategy.candidates`` times with ``pipe(prompt, **call)``, and drop most candidates on their way.

    Args:
        pipe: The pipeline; it is called once for the steps between two prunings, with one row for each candidate.
        prompt: The prompt of all candidates.
        reward: One reward, or several by name.
        strategy: The pruning steps and fractions, with a number of candidates, and a scorer of previews if the rewards
            of decoded ones shall not decide, such as a noise-aware reward.
        decode: From latents to samples, in place of ``pipelines.steering.latent_scores.decode_latents``.
        seed: Seed of the candidates' generators.
        batch_size: The largest number of samples in one call of a network, as in ``pipelines.steer``.
        **call: Further arguments of the pipeline, for one sample: texts, such as a negative prompt, and tensors, such
            as embeddings in place of the prompt, are repeated for each candidate.

    Returns:
        The survivors, best first. Their plain sample is the first candidate, which is finished apart if it is dropped.

    Raises:
        ValueError: No number of candidates, a scorer that needs more than previews or was trained for another reward,
            or a call that ``run_part`` cannot divide into parts.
        RewardError: A reward raises on all samples, or scores none of the survivors.
    """
    if strategy.candidates is None:
        raise ValueError("a pipeline of your own has no budget that could decide: give Prune(candidates=...)")
    scorer, text = PipelineScorer(pipe, reward, decode, batch_size), Prompt(prompt)
    preview_scorer = standalone(strategy.scorer)
    count, started, weights = strategy.candidates, time.perf_counter(), [reward.weight for reward in scorer.rewards]
    generators = [torch.Generator().manual_seed(derived_seed(seed, j)) for j in range(count)]
    nodes = list(scorer.lineage.add([0] * count, [None] * count, 0))
    part: PartialRun | None = None
    with scorer.observing(), bounded_batches(pipe, batch_size):
        for step, alive in zip(strategy.steps, strategy.counts(count)[1:], strict=True):
            # All candidates that are left do the steps until the next pruning
            part = run_part(pipe, part, step + 1, **_repeated(call, text, generators))

            # The candidates with the best previews continue
            scores = scorer.score_previews(preview_scorer, part.x0, [text] * len(nodes), step)
            scorer.lineage.record_scores(nodes, step + 1, scores.tolist())
            rows = best_per_prompt(
                scores, torch.zeros(len(nodes), dtype=torch.long), alive, None if preview_scorer else weights
            )
            survivors = [nodes[i] for i in rows.tolist()]
            scorer.lineage.close([node for node in nodes if node not in survivors], step + 1)
            part, nodes, generators = part.rows(rows), survivors, [generators[i] for i in rows.tolist()]

        # The survivors finish
        output = run_rest(pipe, part, **_latents_of(_repeated(call, text, generators)))
        total = len(pipe.scheduler.timesteps)
        scores, samples = scorer.decode_and_score(output[0], [text] * len(nodes))
        scorer.failures.require_scores(scorer.rewards, scores, f"the {len(nodes)} samples that were left")
        scorer.lineage.record_scores(nodes, total, scores.tolist())
        scorer.lineage.close(nodes, total)
        spent, seconds = scorer.ledger.copy(), time.perf_counter() - started

        if 0 in nodes:
            sample, own = samples[nodes.index(0)], scores[nodes.index(0)]
            plain = PlainSample(sample, own, _cost_of_one(scorer, spent, strategy, total), extra=False)
        else:  # the first candidate was dropped: it is finished apart
            first = [torch.Generator().manual_seed(derived_seed(seed, 0))]
            output = run_rest(pipe, None, **_latents_of(_repeated(call, text, first)))
            own_scores, own_samples = scorer.decode_and_score(output[0], [text])
            plain = PlainSample(own_samples[0], own_scores[0], scorer.ledger.since(spent), extra=True)

    order = best_per_prompt(scores, torch.zeros(len(nodes), dtype=torch.long), len(nodes), weights)
    names = tuple(reward.name for reward in scorer.rewards)
    result = PromptResult(text, names, samples[order], scores[order], plain, spent, seconds)
    return SearchResult((result,), scorer.lineage.as_list(0, 0), (nodes[int(order[0])],), None, scorer.sample_rate)


def _cost_of_one(scorer: PipelineScorer, spent: Ledger, strategy: Prune, total: int) -> Ledger:
    """Return what one unpruned candidate of ``total`` steps costs, by the rows that a sample had in the network."""
    assert strategy.candidates is not None, "checked before"
    ends = [*(step + 1 for step in strategy.steps), total]
    moves = zip(strategy.counts(strategy.candidates), pairwise([0, *ends]), strict=True)
    rows = spent.nfe // sum(alive * (end - begin) for alive, (begin, end) in moves)
    calls = {NFE: total * rows, DECODE: 1, **{reward_call(reward.name): 1 for reward in scorer.rewards}}
    return Ledger(Counter(calls))


def _latents_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that ends with its latents."""
    return {**call, "output_type": "latent", "return_dict": False}


def _repeated(call: dict[str, Any], prompt: Prompt, generators: list[torch.Generator]) -> dict[str, Any]:
    """Repeat the arguments of a call for one sample for a batch with these generators."""
    count = len(generators)
    batch: dict[str, Any] = {} if "prompt_embeds" in call else {"prompt": [prompt.text] * count}
    for name, value in call.items():
        if isinstance(value, str):
            batch[name] = [value] * count
        else:
            batch[name] = value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value
    return {**batch, "generator": list(generators)}


@dataclass(frozen=True)
class PartialRun:
    """N samples after ``done`` evaluations of the network for each.

    ``latents`` (N, ...) are in the scheduler's scale, ``x0`` (N, ...) are the clean latents predicted by the last
    evaluation, and ``state`` is the scheduler's by attribute, with its history of earlier steps.
    """

    done: int
    latents: Tensor
    x0: Tensor
    state: dict[str, Any]

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, rows: Tensor) -> PartialRun:
        """Select the samples ``rows`` (M,) long, in this order."""
        index = rows.to(self.latents.device, non_blocking=True)
        return replace(self, latents=self.latents[index], x0=self.x0[index], state=select_rows(self.state, rows))

    def restore(self, scheduler: SchedulerMixin) -> None:
        """Set the scheduler's state to copies of this one, since it adds to some tensors in place."""
        vars(scheduler).update(select_rows(self.state, torch.arange(len(self))))


def run_part(pipe: DiffusionPipeline, part: PartialRun | None, steps: int, **call: Any) -> PartialRun:
    """Run ``pipe(**call)`` from noise, or from the end of ``part``, for some of its evaluations of the network.

    Args:
        pipe: The pipeline.
        part: The N samples to continue, if any.
        steps: The total number of evaluations of the network after this part, less than the whole call has.
        **call: The arguments of the whole call, for these N samples: prompts or embeddings, and generators, in their
            order. The output type is always "latent".

    Raises:
        ValueError: Another number of steps, a call whose guidance depends on the number of the step, another schedule
            than ``part`` has, or a pipeline that does not start from the latents that it is called with.
    """
    done = 0 if part is None else part.done
    if steps <= done:
        raise ValueError(f"steps must be more than the {done} that are done, not {steps}")
    _, last = _run(pipe, part, steps, {**call, "output_type": "latent"})
    if last.index + 1 != steps:
        raise ValueError(
            f"the pipeline stopped after {last.index + 1} steps instead of {steps}: leave out the arguments that"
            " shorten its schedule, such as denoising_end"
        )
    return PartialRun(steps, last.x_next, last.x0, scheduler_state(pipe.scheduler))


def run_rest(pipe: DiffusionPipeline, part: PartialRun | None, **call: Any) -> Any:
    """Run ``pipe(**call)`` for the evaluations that are left to the samples of ``part``, and return its output.

    The output equals the unbroken run up to rounding, if noise comes from one generator for each sample; pass on the
    generators that ``run_part`` has used. Callbacks count the steps from 0 again. Raises as ``run_part`` does.
    """
    return _run(pipe, part, None, call)[0]


def _run(pipe: DiffusionPipeline, part: PartialRun | None, stop: int | None, call: dict[str, Any]) -> tuple[Any, Move]:
    """Call the pipeline for the steps from the end of ``part`` to ``stop``, and return its output and last step."""
    if refused := [name for name in _DEPENDENT_ON_STEP if call.get(name) is not None]:
        raise ValueError(
            f"{', '.join(refused)} depends on the number of the step, which a run in parts does not preserve: leave it"
            " out"
        )
    moves: list[Move] = []

    def note(move: Move) -> None:
        moves[:] = [move]
        if part is not None and move.index == part.done and not is_start(move, part.latents):
            raise ValueError(
                "the pipeline changes the latents that it is called with, so it cannot be run in parts: steer it by"
                " FKSteering or BestOfN"
            )

    if part is not None:
        part.restore(pipe.scheduler)
        scale = getattr(pipe.scheduler, "init_noise_sigma", 1.0)  # pipelines multiply by it; flow schedulers have none
        call = {**call, "latents": call_latents(pipe, part.latents / scale, call)}
    with _limited_timesteps(pipe.scheduler, part, stop), patched_step(pipe.scheduler, note):
        output = pipe(**call)
    return output, moves[-1]


@contextmanager
def _limited_timesteps(scheduler: SchedulerMixin, part: PartialRun | None, stop: int | None) -> Iterator[None]:
    """Show the pipeline only the timesteps from the end of ``part`` to ``stop``, right after the scheduler sets them.

    Whenever the scheduler steps it has all of them again, since solvers ask how many are left.
    """
    set_timesteps, step, timesteps = scheduler.set_timesteps, scheduler.step, scheduler.timesteps

    @functools.wraps(set_timesteps)
    def set_part(*args: Any, **kwargs: Any) -> None:
        nonlocal timesteps
        set_timesteps(*args, **kwargs)
        timesteps = scheduler.timesteps
        if stop is not None and not 1 <= stop < len(timesteps):
            raise ValueError(f"steps must be 1 to {len(timesteps) - 1} for a part of this call, not {stop}")
        if part is not None:
            if not torch.equal(timesteps, part.state["timesteps"]):
                raise ValueError(
                    "this call has another schedule than the part before: give it the same number of steps and size"
                )
            part.restore(scheduler)
        scheduler.timesteps = timesteps[part.done if part else 0 : stop]

    @functools.wraps(step)
    def step_of_all(*args: Any, **kwargs: Any) -> Any:
        scheduler.timesteps = timesteps
        return step(*args, **kwargs)

    with replaced(scheduler, "set_timesteps", set_part), replaced(scheduler, "step", step_of_all):
        yield
