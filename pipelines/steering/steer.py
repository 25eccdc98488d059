"""Steering a diffusers pipeline of the user's own, whose code stays as it is.

N samples in a call, K of each of P prompts side by side, as ``num_images_per_prompt=K`` makes them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AceStepPipeline, DiffusionPipeline
from torch import Tensor, nn

from genalign.diffusion.noise import derived_seed, seeded_noise
from genalign.diffusion.transitions import ODE
from genalign.scoring.budget import DECODE, FORWARD, Ledger, metered_rewards
from genalign.scoring.combine import combine
from genalign.scoring.score import NamedReward, named, score
from genalign.search.best_of_n import BestOfN
from genalign.search.fk_steering import FKSteering
from genalign.search.lineage import Lineage
from genalign.search.ranking import top
from genalign.search.smc import FKState
from genalign.search.smc import require_stochastic as require_noise
from genalign.types import Prompt, RewardFunction
from pipelines.steering.decode import Decode, decode_latents
from pipelines.steering.scheduler_hooks import (
    Move,
    gather_history,
    grid_of,
    kernel_move,
    patched_step,
    replaced,
    require_stochastic,
)


@dataclass
class Steering:
    """What happened in the last call: the final ``scores`` (N, K rewards) in the order of the samples, of which the
    first of every prompt is the chosen one, and the ``lineage``; the ``ledger`` is of all calls.
    """

    scores: Tensor | None = None
    lineage: Lineage = field(default_factory=Lineage)
    ledger: Ledger = field(default_factory=Ledger)


@contextmanager
def steer(
    pipe: DiffusionPipeline,
    reward: RewardFunction | Mapping[str, RewardFunction] | Sequence[NamedReward],
    strategy: FKSteering | BestOfN,
    prompts: Sequence[str | Prompt] | None = None,
    decode: Decode | None = None,
    seed: int = 0,
) -> Iterator[Steering]:
    """While it is open, a call of ``pipe`` makes ``num_images_per_prompt`` particles of each prompt, weighs and
    resamples them, and returns them with each prompt's chosen one first.

    ``strategy.kernel`` replaces the scheduler's moves, from the same predictions and at the same timesteps; None keeps
    those of a stochastic scheduler. Prompts are those of the call; give ``prompts`` where it is made with embeddings.
    ``decode`` takes the place of the family's own.

    Raises:
        ValueError: a scheduler whose samples could not differ after resampling, a cache of the transformer that holds
            residuals of samples, guidance with a momentum of samples, another number of particles than the strategy's,
            or no prompt.
    """
    _require_no_cache(pipe)
    _require_usable(pipe, strategy)
    steering = Steering()
    rewards = metered_rewards(named(reward), steering.ledger)
    if isinstance(strategy, FKSteering) and strategy.kernel is None:
        require_stochastic(pipe.scheduler)
    call = _Call(pipe, rewards, strategy, _prompts(prompts), decode, seed, steering)
    with ExitStack() as stack:
        if hasattr(pipe, "encode_prompt"):
            stack.enter_context(replaced(pipe, "encode_prompt", _noting(pipe.encode_prompt, call.see_prompt)))
        call.sizes = stack.enter_context(sizes_seen(pipe))
        stack.enter_context(billed(network_of(pipe), steering.ledger))
        stack.enter_context(patched_step(pipe.scheduler, call.on_step))
        yield steering


class _Call:
    """The calls of one ``steer``, step by step."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        rewards: Sequence[NamedReward],
        strategy: FKSteering | BestOfN,
        prompts: list[Prompt] | None,
        decode: Decode | None,
        seed: int,
        steering: Steering,
    ) -> None:
        self.pipe, self.rewards, self.strategy, self.seed = pipe, rewards, strategy, seed
        self.prompts, self._given, self._decode, self.steering = prompts, prompts is not None, decode, steering
        self.sizes: list[tuple[int, int]] = []
        self.group, self.names = torch.zeros(0, dtype=torch.long), tuple[int, ...]()
        self.state: FKState | None = None

    def see_prompt(self, arguments: Mapping[str, Any]) -> None:
        """Take the call's prompts, where none were given."""
        prompt = arguments.get("prompt")
        if prompt is not None and not self._given:
            self.prompts = _prompts([prompt] if isinstance(prompt, str) else prompt)

    def on_step(self, move: Move) -> Tensor | None:
        """The next latents, where they are not the scheduler's."""
        total = len(self.pipe.scheduler.timesteps)
        if move.index == 0:
            self._begin(len(move.x), total)
        x = self._moved(move)
        if move.index == total - 1:
            return self._end(x, total)
        if self.state is None or move.index not in self.state.settings.scoring_steps(total):
            return x
        return self._resampled(self.state, move, x)

    def _begin(self, samples: int, total: int) -> None:
        if not self.prompts:
            raise ValueError("the call has no prompt to score by: give steer prompts=, one for each prompt of the call")
        particles, rest = divmod(samples, len(self.prompts))
        wanted = self.strategy.particles if isinstance(self.strategy, FKSteering) else self.strategy.candidates
        if rest or particles != (wanted or particles):
            raise ValueError(
                f"the call makes {samples} samples of {len(self.prompts)} prompts, and the strategy has {wanted} of"
                f" each: call the pipeline with num_images_per_prompt={wanted}"
            )
        if isinstance(self.strategy, FKSteering) and self.strategy.kernel is not None:
            require_noise(self.strategy.kernel, grid_of(self.pipe.scheduler))
        self.group = torch.arange(len(self.prompts)).repeat_interleave(particles)
        self.steering.lineage = Lineage()
        self.names = self.steering.lineage.add(self.group.tolist(), [None] * samples, 0)
        self.state = (
            FKState(self.strategy, self.group, total, self.seed) if isinstance(self.strategy, FKSteering) else None
        )

    def _moved(self, move: Move) -> Tensor:
        kernel = self.strategy.kernel if isinstance(self.strategy, FKSteering) else None
        if kernel is None:
            return move.x_next
        seeds = [derived_seed(self.seed, "move", move.index, place) for place in range(len(move.x))]
        return kernel_move(self.pipe.scheduler, kernel, move, seeded_noise(seeds, move.x_next))

    def _resampled(self, state: FKState, move: Move, x: Tensor) -> Tensor:
        scores = self._scored(move.x0, move.index + 1)
        state.weigh(self._combined(scores), move.index)
        ancestors = state.resample()
        if ancestors is None:
            return x
        gather_history(self.pipe.scheduler, ancestors)
        lineage, parents = self.steering.lineage, [self.names[i] for i in ancestors.tolist()]
        lineage.close(self.names, move.index + 1)
        self.names = lineage.add(self.group.tolist(), parents, move.index + 1)
        return x[ancestors.to(x.device)]

    def _end(self, x: Tensor, total: int) -> Tensor:
        scores = self._scored(x, total)
        self.steering.lineage.close(self.names, total)
        if self.state is None:
            chosen = top(scores, self.group, 1)
        else:
            self.state.weigh(self._combined(scores), total - 1)
            chosen = self.state.choose()
        order = torch.cat([_first(chosen[p], (self.group == p).nonzero()[:, 0]) for p in range(len(chosen))])
        self.steering.scores = scores[order]
        return x[order.to(x.device)]

    def _combined(self, scores: Tensor) -> Tensor:
        return combine(scores, [reward.weight for reward in self.rewards])

    def _scored(self, latents: Tensor, done: int) -> Tensor:
        self.steering.ledger.bill(DECODE, len(latents))
        size = self.sizes[-1] if self.sizes else None
        samples = self._decode(latents) if self._decode else decode_latents(self.pipe, latents, size)
        assert self.prompts is not None, "a call begins with its prompts"
        scores = score(self.rewards, samples, [self.prompts[p] for p in self.group.tolist()])
        self.steering.lineage.record_scores(self.names, done, scores.tolist())
        return scores


def _prompts(prompts: Sequence[str | Prompt] | None) -> list[Prompt] | None:
    return None if prompts is None else [Prompt(p) if isinstance(p, str) else p for p in prompts]


def _first(row: Tensor, rows: Tensor) -> Tensor:
    """``rows`` (K,) with ``row`` before the others."""
    return torch.cat([row[None], rows[rows != row]])


def _noting(method: Callable[..., Any], note: Callable[[Mapping[str, Any]], None]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        note(signature.bind(*args, **kwargs).arguments)
        return method(*args, **kwargs)

    return noted


@contextmanager
def sizes_seen(pipe: DiffusionPipeline) -> Iterator[list[tuple[int, int]]]:
    """The (height, width) in pixels of the images that ``pipe`` prepares latents for, call by call."""
    sizes: list[tuple[int, int]] = []

    def note(arguments: Mapping[str, Any]) -> None:
        if "height" in arguments and "width" in arguments:
            sizes.append((int(arguments["height"]), int(arguments["width"])))

    with replaced(pipe, "prepare_latents", _noting(pipe.prepare_latents, note)):
        yield sizes


def network_of(pipe: DiffusionPipeline) -> nn.Module:
    """The denoiser. Raises ValueError for a pipeline without one that is known here."""
    network: nn.Module | None = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if network is None:
        raise ValueError(f"{type(pipe).__name__} has neither a transformer nor a unet: it cannot be steered")
    return network


def _require_usable(pipe: DiffusionPipeline, strategy: FKSteering | BestOfN) -> None:
    """What only a search on our own pipelines can do is refused, not ignored."""
    if isinstance(strategy, FKSteering) and isinstance(pipe, AceStepPipeline) and not pipe.is_turbo:
        raise ValueError(
            "AceStepPipeline guides with a momentum of its samples, which resampling would mix up: use best-of-N here,"
            " a turbo checkpoint, or genalign steer, whose guidance has no momentum"
        )
    if isinstance(strategy, BestOfN) and strategy.kernel != ODE():
        raise ValueError(
            "best-of-N keeps the scheduler's moves: give the pipeline another scheduler instead of a kernel"
        )
    if isinstance(strategy, FKSteering) and (strategy.scorer is not None or strategy.guide is not None):
        raise ValueError("steer scores decoded previews by the reward, without a guide: for those use genalign.search")


def _require_no_cache(pipe: DiffusionPipeline) -> None:
    if getattr(network_of(pipe), "is_cache_enabled", False):
        raise ValueError(
            "the transformer caches residuals of its samples, which resampling would mix up: disable_cache()"
        )


@contextmanager
def billed(network: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Every forward of ``network`` in the ledger, sample by sample."""

    def bill(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
        ledger.bill(FORWARD, len(x))

    handle = network.register_forward_pre_hook(bill, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
