"""The loop: prompts -> rollouts -> rewards -> credit -> objective on replays -> optimiser step. One screen a stage.

B = P prompts x G samples, S trained steps, K rewards.
"""

from __future__ import annotations

import hashlib
import logging
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from genalign.advantages import combine, zero_std_share
from genalign.objectives import clip_fraction, clipped_surrogate, kl_penalty
from genalign.policy import Policy
from genalign.prompts import PromptSampler
from genalign.recipes import Recipe
from genalign.rollout import Replay, Rollout, Start, replay, rollout, windowed
from genalign.scoring import NamedReward, Watch, score
from genalign.types import Grid, Pipeline, Prompt, PromptSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How images are made: ``num_steps`` of the scheduler's grid, or exactly these ``sigmas``; guidance 1 is none."""

    num_steps: int = 10
    sigmas: Sequence[float] | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.sigmas is not None and len(self.sigmas) != self.num_steps:
            raise ValueError(
                f"sampling.sigmas has {len(self.sigmas)} values for {self.num_steps} steps: give one per step, without"
                " the final 0"
            )

    def grid(self, pipeline: Pipeline) -> Grid:
        """The grid of ``pipeline``."""
        return pipeline.grid(self.num_steps, self.sigmas)


@dataclass(frozen=True)
class Settings:
    """Geometry and optimisation. A round samples ``prompts_per_round`` x ``group_size`` images in batches of
    ``batch_size`` and makes ``updates_per_round`` optimiser steps on them. The learning rate stays, or falls linearly to
    zero at the end of the last round."""

    rounds: int = 100
    prompts_per_round: int = 16
    group_size: int = 12
    batch_size: int = 96
    updates_per_round: int = 2
    learning_rate: float = 3e-4
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}: a group needs at least 2 samples to be compared")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of group_size {self.group_size}, so that groups stay"
                f" whole: try {self.group_size * max(1, self.batch_size // self.group_size)}"
            )
        images = self.prompts_per_round * self.group_size
        if images % (self.batch_size * self.updates_per_round):
            raise ValueError(
                f"prompts_per_round {self.prompts_per_round} x group_size {self.group_size} = {images} images do not"
                f" divide into {self.updates_per_round} updates of batches of {self.batch_size}: change one of them"
            )


    def rate(self, round_index: int) -> float:
        """The learning rate of a round."""
        left = 1 - round_index / self.rounds if self.learning_rate_schedule == "linear" else 1.0
        return self.learning_rate * left


@dataclass(frozen=True)
class RoundResult:
    """What one round did. ``log_ratio_max`` is the largest |log-ratio| of the round's first update, 0 in exact
    arithmetic; ``forwards`` counts denoiser evaluations of single samples so far, ``images`` samples so far."""

    round: int
    reward: float
    reward_std: float
    rewards: dict[str, float]
    kl: float
    clip_fraction: float
    zero_std_share: float
    grad_norm: float
    loss: float
    log_ratio_max: float
    failed_rewards: int
    images: int
    forwards: int
    seconds: float

    def metrics(self) -> dict[str, object]:
        """The row of ``metrics.jsonl``; what is not finite is null, and readings of the machine stand apart."""
        row: dict[str, object] = {
            name: (value if not isinstance(value, float) or math.isfinite(value) else None)
            for name, value in vars(self).items()
            if name != "seconds"
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        speed = self.images / self.seconds if self.seconds else 0.0
        return row | {"machine": {"seconds": self.seconds, "images_per_second": speed, "peak_memory_bytes": peak}}


@dataclass
class _Tally:
    """Running sums over the micro-batches of one round."""

    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    log_ratio_max: float = 0.0
    forwards: int = 0


def derived_seed(*parts: int | str) -> int:
    """A seed below 2**63 from named parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8]) >> 1


class Trainer:
    """One run. ``rounds()`` yields after every round; between two of them the policy may be evaluated or saved."""

    def __init__(
        self,
        pipeline: Pipeline,
        policy: Policy,
        rewards: Sequence[NamedReward],
        prompts: PromptSet,
        recipe: Recipe,
        settings: Settings,
        sampling: Sampling,
    ) -> None:
        self.pipeline, self.policy, self.recipe = pipeline, policy, recipe
        self.rewards, self.settings, self.sampling = rewards, settings, sampling
        self.grid = sampling.grid(pipeline)
        recipe.steps(self.grid, 0, settings.seed)  # refuse an impossible recipe before any compute
        self.sampler = PromptSampler(prompts, settings.prompts_per_round, settings.seed)
        self.optimizer = torch.optim.AdamW(
            policy.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.watch = Watch()
        self.images = self.forwards = 0
        self.seconds = 0.0

    def rounds(self) -> Iterator[RoundResult]:
        """All rounds, one by one."""
        for index, prompts in zip(range(self.settings.rounds), self.sampler.rounds(), strict=False):
            began = time.perf_counter()
            for slots in self.optimizer.param_groups:
                slots["lr"] = self.settings.rate(index)
            rollouts, scores_BK = self._sample(index, prompts)
            scores = combine(scores_BK, [reward.weight for reward in self.rewards])
            group = torch.arange(len(prompts)).repeat_interleave(self.settings.group_size)
            advantages = self.recipe.credit(scores, group)
            silent = zero_std_share(scores, group)
            self.watch.see(scores_BK, silent == 1.0)
            tally = self._learn(rollouts, advantages)
            self.images += len(scores)
            self.forwards += tally.forwards + sum(part.forwards for part in rollouts)
            self.seconds += time.perf_counter() - began
            yield self._result(index, scores_BK, scores, silent, tally)

    def _sample(self, index: int, prompts: Sequence[Prompt]) -> tuple[list[Rollout], Tensor]:
        """Rollouts in batches, and their scores (B, K)."""
        steps = self.recipe.steps(self.grid, index, self.settings.seed)
        kernels = windowed(self.recipe.kernel, steps, len(self.grid))
        rollouts, columns = [], []
        for part in self._start(index, prompts).split(self.settings.batch_size):
            sampled = rollout(self.pipeline, part, self.grid, kernels, self.sampling.guidance, store=steps)
            with torch.no_grad():
                images = self.pipeline.decode(sampled.final)
            rollouts.append(sampled)
            columns.append(score(self.rewards, images, [prompts[row] for row in part.prompt.tolist()]))
        return rollouts, torch.cat(columns)

    def _start(self, index: int, prompts: Sequence[Prompt]) -> Start:
        size, seed = self.settings.group_size, self.settings.seed
        members = [(p, g) for p in range(len(prompts)) for g in range(size)]
        noise = [derived_seed(seed, index, p, "x", 0 if self.recipe.shared_noise else g) for p, g in members]
        steps = [derived_seed(seed, index, p, "w", g) for p, g in members]
        conditioning = self.pipeline.encode([prompt.text for prompt in prompts])
        return Start(conditioning, torch.tensor([p for p, _ in members]), tuple(noise), tuple(steps))

    def _learn(self, rollouts: Sequence[Rollout], advantages: Tensor) -> _Tally:
        """``updates_per_round`` optimiser steps, each on its share of the batches and on all their stored steps."""
        tally = _Tally()
        batches = list(zip(rollouts, torch.split(advantages, self.settings.batch_size), strict=True))
        share = len(batches) // self.settings.updates_per_round
        for update in range(self.settings.updates_per_round):
            part = batches[update * share : (update + 1) * share]
            live = sum(int((values != 0).sum()) for _, values in part)
            for sampled, values in part:
                for stored in range(len(sampled.steps)):
                    weight = 1 / (max(live, 1) * len(sampled.steps))
                    self._backward(sampled, stored, values, weight, tally, first=update == 0)
            self._step(tally)
        if tally.log_ratio_max > 0.02 * self.recipe.objective.clip_range:
            logger.warning(
                "the first update's log-ratio reached %.1e, above 2%% of the clip range %.1e: sampling and training"
                " disagree. Likely causes: another batch size or guidance order, mixed precision, dropout, a kernel"
                " whose arguments changed",
                tally.log_ratio_max,
                self.recipe.objective.clip_range,
            )
        return tally

    def _backward(
        self, sampled: Rollout, stored: int, advantages: Tensor, weight: float, tally: _Tally, first: bool
    ) -> None:
        """Add the gradient of one stored step of one batch."""
        objective, guidance = self.recipe.objective, self.sampling.guidance
        again = replay(self.pipeline, sampled, self.grid, self.recipe.kernel, stored, guidance)
        advantages = advantages.to(again.new.mean.device)
        log_ratio = again.new.log_ratio(again.old, again.x_next)
        losses = clipped_surrogate(log_ratio, advantages, objective.clip_range)
        if objective.kl or not tally.kl:
            distance = self._distance(sampled, stored, again)
            tally.kl.append(float(distance.detach().mean()))
            tally.forwards += len(advantages)
            losses = losses + objective.kl * distance
        (losses.sum() * weight).backward()  # type: ignore[no-untyped-call]
        tally.forwards += len(advantages)
        tally.loss.append(float(losses.detach().mean()))
        tally.clipped.append(float(clip_fraction(log_ratio.detach(), objective.clip_range)))
        if first:
            tally.log_ratio_max = max(tally.log_ratio_max, float(log_ratio.detach().abs().max()))

    def _distance(self, sampled: Rollout, stored: int, again: Replay) -> Tensor:
        """The distance (B,) of the current from the reference policy, by the recipe's form of the KL."""
        with torch.no_grad(), self.policy.reference():
            base = replay(self.pipeline, sampled, self.grid, self.recipe.kernel, stored, self.sampling.guidance)
        form = self.recipe.objective.kl_form
        return kl_penalty(form, again.new, base.new, again.prediction, base.prediction, again.step)

    def _step(self, tally: _Tally) -> None:
        norm = nn.utils.clip_grad_norm_(self.policy.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.policy.update_average()
        tally.grad_norm.append(float(norm))

    def _result(self, index: int, scores_BK: Tensor, scores: Tensor, silent: float, tally: _Tally) -> RoundResult:
        valid = scores[~scores.isnan()]
        return RoundResult(
            round=index,
            reward=float(valid.mean()),
            reward_std=float(valid.std(correction=0)),
            rewards={reward.name: float(scores_BK[:, k].nanmean()) for k, reward in enumerate(self.rewards)},
            kl=_mean(tally.kl),
            clip_fraction=_mean(tally.clipped),
            zero_std_share=silent,
            grad_norm=_mean(tally.grad_norm),
            loss=_mean(tally.loss),
            log_ratio_max=tally.log_ratio_max,
            failed_rewards=int(scores_BK.isnan().sum()),
            images=self.images,
            forwards=self.forwards,
            seconds=self.seconds,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
