"""Steering of a diffusers pipeline of the user's own, without a change of its code.

N samples in a call, K of each of P prompts side by side, as ``num_images_per_prompt=K`` makes them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AceStepPipeline, DiffusionPipeline
from torch import Tensor

from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.runtime.media import Writer
from genalign.scoring.budget import DECODE, NFE, Ledger, reward_call
from genalign.search.engine import TOP
from genalign.search.fk_steering import require_stochastic as require_stochastic_kernel
from genalign.search.lineage import Lineage
from genalign.search.ranking import best_per_prompt
from genalign.search.results import PlainSample, PromptResult, SearchResult
from genalign.search.stepwise import Stepwise, StepwiseCall, StepwiseStrategy
from genalign.types import Prompt
from pipelines.steering.batches import bounded_batches
from pipelines.steering.latent_scores import Decode, PipelineScorer, Rewards
from pipelines.steering.plain_call import Arguments, copied_generators, plain_arguments, wrapped_call
from pipelines.steering.scheduler_hooks import (
    Move,
    gather_history,
    is_start,
    kernel_grid,
    kernel_move,
    patched_step,
    require_stochastic,
)

logger = logging.getLogger(__name__)


@contextmanager
def steer(
    pipe: DiffusionPipeline,
    reward: Rewards,
    strategy: StepwiseStrategy,
    prompts: str | Sequence[str] | None = None,
    decode: Decode | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    plain: bool = True,
) -> Iterator[Steering]:
    """Steer every call of ``pipe`` within the context.

    A call samples ``num_images_per_prompt`` particles of each prompt. At the steps that the strategy names, their
    previews are decoded and scored, or scored by the strategy's own scorer, such as a noise-aware reward; then the
    strategy selects which continue. The sample that it chooses for a prompt becomes the prompt's first.

    Args:
        pipe: The pipeline; it and its scheduler are as before after the context.
        reward: One reward, or several by name.
        strategy: Any strategy with a ``stepwise`` method (``genalign.search.stepwise``), such as FKSteering. Its kernel
            replaces the scheduler's moves, from the same predictions and at the same timesteps.
        prompts: The prompts of the call, for a call that is made with embeddings.
        decode: From latents to samples, in place of ``pipelines.steering.latent_scores.decode_latents``.
        seed: Seed of the kernel's noise and of the strategy's draws.
        batch_size: The largest number of samples in one call of the denoiser (where guidance makes two of each), the
            autoencoder and the rewards; None for all of them.
        plain: Whether to sample the first particle of each prompt without steering too, unless it is among the
            particles, to report the gain; its cost is counted apart.

    Raises:
        TypeError: The strategy has no ``stepwise`` method.
        ValueError: Settings of the strategy, a scheduler or a pipeline that do not suit each other, a call with another
            number of particles than the strategy's, or a call without prompts.
        RewardError: A reward raises on all samples, or scores none of the finished ones.
    """
    if not isinstance(strategy, StepwiseStrategy):
        raise TypeError(
            f"{type(strategy).__name__} cannot steer a pipeline of your own, since it has no stepwise method:"
            " FKSteering and BestOfN can, and Prune by pipelines.prune; for the others load the checkpoint by"
            " pipelines.load, and call genalign.search.search"
        )
    plan = strategy.stepwise()
    if plan.scoring_steps is not None:
        _require_resampling(pipe, plan)
    steering = Steering(pipe, reward, decode, plan, prompts, seed, batch_size, plain)
    with ExitStack() as stack:
        stack.enter_context(bounded_batches(pipe, batch_size))
        stack.enter_context(steering.observing())
        stack.enter_context(wrapped_call(pipe, steering._call))
        stack.enter_context(patched_step(pipe.scheduler, steering._on_step))
        yield steering


def _require_resampling(pipe: DiffusionPipeline, plan: Stepwise) -> None:
    """Raise ValueError if the pipeline or its scheduler does not suit copies of particles."""
    if getattr(getattr(pipe, "transformer", None), "is_cache_enabled", False):
        raise ValueError(
            "the transformer caches residuals of its samples, which resampling would mix up: call"
            " pipe.transformer.disable_cache() first"
        )
    if isinstance(pipe, AceStepPipeline) and not pipe.is_turbo:
        raise ValueError(
            "AceStepPipeline guides with a momentum of its samples, which resampling would mix up: use BestOfN here, a"
            " turbo checkpoint, or genalign steer, whose guidance has no momentum"
        )
    if plan.kernel is None:
        require_stochastic(pipe.scheduler)


class Steering(PipelineScorer):
    """The calls of a pipeline within one ``steer``; ``print`` shows rewards, gains over plain sampling and costs.

    ``scores`` (N, K rewards) of the samples in their order, ``lineage`` and ``result`` are of the last call; the first
    sample of every prompt is the one that the strategy chose. ``ledger`` counts the cost of all calls, without that of
    plain samples that were made for the comparison.
    """

    scores: Tensor | None = None
    nodes: tuple[int, ...] = ()

    def __init__(
        self,
        pipe: DiffusionPipeline,
        reward: Rewards,
        decode: Decode | None,
        plan: Stepwise,
        prompts: str | Sequence[str] | None,
        seed: int,
        batch_size: int | None,
        plain: bool,
    ) -> None:
        super().__init__(pipe, reward, decode, batch_size)
        self.scheduler, self.plan, self.seed, self.plain = pipe.scheduler, plan, seed, plain
        self._given = None if prompts is None else _prompts(prompts)
        self.prompts: list[Prompt] = []
        self._finished: tuple[Tensor, Tensor, Tensor] | None = (
            None  # samples and scores by place, and the chosen places
        )
        self._watch: Callable[[Move], None] | None = None  # of the steps of a plain call, which are not steered
        self._last: SearchResult | None = None

    @property
    def result(self) -> SearchResult:
        """The result of the last call. Raises ValueError before a call is complete."""
        if self._last is None:
            raise ValueError("no call of the pipeline is complete: call it within the with block, then ask for results")
        return self._last

    def __str__(self) -> str:
        return str(self._last) if self._last else "no call of the pipeline is complete yet"

    __repr__ = __str__

    @property
    def pil(self) -> list[Any]:
        """The best sample of each prompt of the last call, as ``SearchResult.pil``."""
        return self.result.pil

    def grid(self) -> Any:
        """Tile the images of the last call, as ``SearchResult.grid``."""
        return self.result.grid()

    def save(self, directory: str | Path, write: Writer | None = None) -> Path:
        """Write the samples of the last call with their scores, as ``SearchResult.save``."""
        return self.result.save(directory, write)

    def _call(self, call: Callable[..., Any], arguments: Arguments) -> Any:
        """Make a steered call of the pipeline, then the plain one to compare it with."""
        self.prompts = _prompts(arguments.get("prompt")) if self._given is None else self._given
        self.scores = self._finished = self._last = None
        generators, before, started = copied_generators(arguments), self.ledger.copy(), time.perf_counter()
        # Lists are copied, since ZImagePipeline changes some of those that it is called with
        output = call(**{name: list(value) if isinstance(value, list) else value for name, value in arguments.items()})
        seconds = time.perf_counter() - started
        if self._finished is not None:
            spent = self.ledger.since(before)
            plain = self._plain_samples(call, arguments, generators, spent)
            self._last = self._result(spent, seconds, plain)
        return output

    def _on_step(self, move: Move) -> Tensor | None:
        """Return the next latents (N, ...) after a step of the scheduler."""
        if self._watch is not None:
            self._watch(move)
            return None
        total, done, kernel = len(self.scheduler.timesteps), move.index + 1, self.plan.kernel
        if move.index == 0:
            self._begin(move.x, total)
        x = move.x_next
        if kernel is not None:
            seeds = [derived_seed(self.seed, "move", move.index, place) for place in range(len(x))]
            x = kernel_move(self.scheduler, kernel, move, seeded_noise(seeds, x))

        if done == total:
            return self._finish(x, done)

        # A step at which the strategy selects: each place continues from the particle that it names
        if move.index not in self.scoring_steps:
            return x
        scores = self.score_previews(self.plan.scorer, move.x0, self._prompt_of_each, move.index)
        self.lineage.record_scores(self.nodes, done, scores.tolist())
        sources = self.selection.select(move.index, scores)
        if sources is None:
            return x
        if sources.shape != self.prompt.shape or not torch.equal(self.prompt[sources], self.prompt):
            raise ValueError(
                f"{type(self.selection).__name__}.select must return one particle of the same prompt for each of the"
                f" {len(x)} places, not {sources.tolist()}: a call of a pipeline keeps its batch"
            )
        gather_history(self.scheduler, sources)
        parents = [self.nodes[i] for i in sources.tolist()]
        self.lineage.close(self.nodes, done)
        self.nodes = self.lineage.add(self.prompt.tolist(), parents, done)
        self._in_place &= sources == torch.arange(len(sources))
        return x[sources.to(x.device, non_blocking=True)]

    def _begin(self, x: Tensor, total: int) -> None:
        """Lay out a new call, of particles with the initial latents ``x`` (N, ...) and ``total`` steps."""
        samples = len(x)
        if not self.prompts:
            raise ValueError("the call has no prompt to score by: give steer prompts=, one for each prompt of the call")
        count, rest = divmod(samples, len(self.prompts))
        if rest or count != (self.plan.particles or count):
            raise ValueError(
                f"the call makes {samples} samples of {len(self.prompts)} prompts, and the strategy needs"
                f" {self.plan.particles or 'equally many'} of each: call the pipeline with num_images_per_prompt"
                + (f"={self.plan.particles}" if self.plan.particles else "")
            )
        self.scoring_steps: Sequence[int] = ()
        if self.plan.scoring_steps is not None:
            self.scoring_steps = self.plan.scoring_steps(total)
            if self.plan.kernel is not None:
                require_stochastic_kernel(self.plan.kernel, kernel_grid(self.scheduler))
        self.prompt = torch.arange(len(self.prompts)).repeat_interleave(count)
        weights = tuple(reward.weight for reward in self.rewards)
        self.selection = self.plan.selection(StepwiseCall(self.prompt, total, self.seed, weights))
        self.lineage = Lineage()
        self.nodes = self.lineage.add(self.prompt.tolist(), [None] * samples, 0)
        self._firsts = torch.arange(0, samples, count)
        self._initial = x[self._firsts.to(x.device, non_blocking=True)]
        self._in_place = torch.full((samples,), self.plan.kernel is None)  # moved by the scheduler, and never replaced

    @property
    def _prompt_of_each(self) -> list[Prompt]:
        return [self.prompts[p] for p in self.prompt.tolist()]

    def _finish(self, x: Tensor, done: int) -> Tensor:
        """Score the final latents (N, ...) after ``done`` steps, and put each prompt's choice first among its own."""
        scores, samples = self.decode_and_score(x, self._prompt_of_each)
        self.lineage.record_scores(self.nodes, done, scores.tolist())
        self.failures.require_scores(self.rewards, scores, f"the {len(x)} samples of the call")
        self.lineage.close(self.nodes, done)
        choice = self.selection.choose(scores)
        self._finished = samples, scores, choice
        order = torch.argsort(2 * self.prompt + ~torch.isin(torch.arange(len(x)), choice), stable=True)
        self.scores = scores[order]
        return x[order.to(x.device, non_blocking=True)]

    def _plain_samples(
        self,
        call: Callable[..., Any],
        arguments: Arguments,
        generators: Sequence[torch.Generator] | None,
        spent: Ledger,
    ) -> list[PlainSample] | None:
        """Return the plain sample of each prompt: its first particle if that was never moved otherwise, else a new one.

        None if they are not wanted, or the call cannot be made for the first particles alone.
        """
        assert self._finished is not None, "the call is complete"
        samples, scores, _ = self._finished
        if bool(self._in_place[self._firsts].all()):
            one = {
                NFE: spent.nfe // len(samples),
                DECODE: 1,
                **{reward_call(reward.name): 1 for reward in self.rewards},
            }
            return [
                PlainSample(samples[i], scores[i], Ledger(Counter(one)), extra=False) for i in self._firsts.tolist()
            ]
        if not self.plain:
            return None
        moves: list[Move] = []
        before, self._watch = self.ledger.copy(), lambda move: moves.append(move)
        try:
            firsts = self._firsts.tolist()
            call(**plain_arguments(self.pipe, arguments, firsts, len(samples), self._initial, generators))
            if not is_start(moves[0], self._initial):
                raise ValueError("the pipeline does not start from the latents that it is called with")
            plain_scores, plain = self.decode_and_score(moves[-1].x_next, self.prompts)
            cost = _share(self.ledger.since(before), len(firsts))
            return [PlainSample(*pair, cost, extra=True) for pair in zip(plain, plain_scores, strict=True)]
        except Exception as error:  # the steered samples are complete, whatever happens here
            logger.warning(
                "no gain over plain sampling is known: the plain call failed (%s); plain=False skips it", error
            )
            return None
        finally:
            self.ledger.counts, self._watch = before.counts, None

    def _result(self, spent: Ledger, seconds: float, plain: list[PlainSample] | None) -> SearchResult:
        """Put the samples of the call in order: of each prompt the chosen one, then the others by their scores."""
        assert self._finished is not None, "the call is complete"
        samples, scores, choice = self._finished
        results, winners = [], []
        weights = tuple(reward.weight for reward in self.rewards)
        ranked = best_per_prompt(scores, self.prompt, len(samples), weights)
        cost, names = _share(spent, len(self.prompts)), tuple(reward.name for reward in self.rewards)
        for place, prompt in enumerate(self.prompts):
            first = choice[self.prompt[choice] == place]
            others = ranked[(self.prompt[ranked] == place) & (ranked != first)]
            top = torch.cat([first, others[: TOP - 1]])
            own = plain[place] if plain else None
            share = seconds / len(self.prompts)
            results.append(PromptResult(prompt, names, samples[top], scores[top], own, cost, share))
            winners.append(self.nodes[int(first)])
        return SearchResult(tuple(results), self.lineage.as_list(0, 0), tuple(winners), None, self.sample_rate)


def _prompts(texts: str | Sequence[str] | None) -> list[Prompt]:
    """Return the prompts of a call: one, several, or none for a call with embeddings."""
    return [Prompt(text) for text in ([texts] if isinstance(texts, str) else texts or [])]


def _share(ledger: Ledger, prompts: int) -> Ledger:
    """Return the calls for one of several prompts that were sampled alike."""
    return Ledger(Counter({call: count // prompts for call, count in ledger.counts.items() if count}))
