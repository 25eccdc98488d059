"""Steering of a diffusers pipeline of the user's own, without a change of its code.

N samples in a call, K of each of P prompts side by side, as ``num_images_per_prompt=K`` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import AceStepPipeline, DiffusionPipeline
from torch import Tensor

from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.search.fk_steering import require_stochastic as require_stochastic_kernel
from genalign.search.lineage import Lineage
from genalign.search.stepwise import Stepwise, StepwiseCall, StepwiseStrategy
from genalign.types import Prompt
from pipelines.steering.latent_scores import Decode, PipelineScorer, Rewards, observed
from pipelines.steering.scheduler_hooks import (
    Move,
    gather_history,
    grid_of,
    kernel_move,
    patched_step,
    require_stochastic,
)


@contextmanager
def steer(
    pipe: DiffusionPipeline,
    reward: Rewards,
    strategy: StepwiseStrategy,
    prompts: Sequence[str] | None = None,
    decode: Decode | None = None,
    seed: int = 0,
) -> Iterator[Steering]:
    """Steer every call of ``pipe`` within the context.

    A call samples ``num_images_per_prompt`` particles of each prompt. At the steps that the strategy names, their
    previews are decoded and scored, and the strategy selects which continue. The sample that it chooses for a prompt
    becomes the prompt's first.

    Args:
        pipe: The pipeline; it and its scheduler are as before after the context.
        reward: One reward, or several by name.
        strategy: Any strategy with a ``stepwise`` method (``genalign.search.stepwise``), such as FKSteering. Its kernel
            replaces the scheduler's moves, from the same predictions and at the same timesteps.
        prompts: The prompts of the call, for a call that is made with embeddings.
        decode: From latents to samples, in place of ``pipelines.steering.latent_scores.decode_latents``.
        seed: Seed of the kernel's noise and of the strategy's draws.

    Raises:
        TypeError: The strategy has no ``stepwise`` method.
        ValueError: Settings of the strategy, a scheduler or a pipeline that do not suit each other, a call with another
            number of particles than the strategy's, or a call without prompts.
    """
    if not isinstance(strategy, StepwiseStrategy):
        raise TypeError(
            f"{type(strategy).__name__} cannot steer a pipeline of your own, since it has no stepwise method: take"
            " FKSteering or BestOfN (Prune with pipelines.prune), or search on a genalign pipeline by"
            " genalign.search.search"
        )
    plan = strategy.stepwise()
    if plan.scoring_steps is not None:
        _require_resampling(pipe, plan)
    steering = Steering(pipe, reward, decode, plan, prompts or (), seed)
    with ExitStack() as stack:
        if prompts is None:
            for method in ("check_inputs", "encode_prompt"):
                if hasattr(pipe, method):
                    stack.enter_context(observed(pipe, method, steering._note_prompt(method)))
        stack.enter_context(steering.observing())
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
    """The calls of a pipeline within one ``steer``.

    ``scores`` (N, K rewards) of the samples in their order, and ``lineage``, are of the last call; the first sample of
    every prompt is the one that the strategy chose. ``ledger`` counts the cost of all calls.
    """

    scores: Tensor | None = None
    nodes: tuple[int, ...] = ()

    def __init__(
        self,
        pipe: DiffusionPipeline,
        reward: Rewards,
        decode: Decode | None,
        plan: Stepwise,
        prompts: Sequence[str],
        seed: int,
    ) -> None:
        super().__init__(pipe, reward, decode)
        self.scheduler, self.plan, self.seed = pipe.scheduler, plan, seed
        self.prompts = [Prompt(prompt) for prompt in prompts]
        self._has_begun = False

    def _note_prompt(self, method: str) -> Callable[[Mapping[str, Any]], None]:
        """Return what takes the prompts of a call from the arguments of a method that begins it.

        A call begins with ``check_inputs`` or, in a pipeline without it, with the first ``encode_prompt`` after a step
        of the scheduler: a later one is of negative prompts. A call with embeddings alone has no prompts.
        """

        def note(arguments: Mapping[str, Any]) -> None:
            if method == "encode_prompt" and self._has_begun:
                return
            prompt = arguments.get("prompt")
            texts = [prompt] if isinstance(prompt, str) else prompt or []
            self.prompts, self._has_begun = [Prompt(text) for text in texts], True

        return note

    def _on_step(self, move: Move) -> Tensor:
        """Return the next latents (N, ...) after a step of the scheduler."""
        total, done, kernel = len(self.scheduler.timesteps), move.index + 1, self.plan.kernel
        self._has_begun = False
        if move.index == 0:
            self._begin(len(move.x), total)
        x = move.x_next
        if kernel is not None:
            seeds = [derived_seed(self.seed, "move", move.index, place) for place in range(len(x))]
            x = kernel_move(self.scheduler, kernel, move, seeded_noise(seeds, x))

        # The last step: each prompt's choice becomes its first sample
        if done == total:
            scores = self._score(x, done)
            self.lineage.close(self.nodes, done)
            is_first = torch.isin(torch.arange(len(x)), self.selection.choose(scores))
            order = torch.argsort(2 * self.prompt + ~is_first, stable=True)
            self.scores = scores[order]
            return x[order.to(x.device)]

        # A step at which the strategy selects: each place continues from the particle that it names
        if move.index not in self.scoring_steps:
            return x
        sources = self.selection.select(move.index, self._score(move.x0, done))
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
        return x[sources.to(x.device)]

    def _begin(self, samples: int, total: int) -> None:
        """Lay out a new call, of ``samples`` particles and ``total`` steps."""
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
                require_stochastic_kernel(self.plan.kernel, grid_of(self.scheduler))
        self.prompt = torch.arange(len(self.prompts)).repeat_interleave(count)
        weights = tuple(reward.weight for reward in self.rewards)
        self.selection = self.plan.selection(StepwiseCall(self.prompt, total, self.seed, weights))
        self.lineage = Lineage()
        self.nodes = self.lineage.add(self.prompt.tolist(), [None] * samples, 0)

    def _score(self, latents: Tensor, done: int) -> Tensor:
        """Score latents (N, ...) after ``done`` steps: (N, K)."""
        return self.decode_and_score(latents, [self.prompts[p] for p in self.prompt.tolist()], self.nodes, done)[0]
