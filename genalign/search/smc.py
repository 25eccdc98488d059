"""Sequential Monte Carlo towards p(x0) exp(lam r(x0)): Feynman-Kac steering (arXiv 2501.06848).

K particles of each prompt are sampled together. At some steps their previews are scored, potentials G weigh them, and
those of little weight are replaced by copies of others; the potentials along a path multiply to exp(lam r(x0)). What is
here knows scores, steps and prompts, but no latents: a loop moves and scores N particles of P prompts, and follows
the ancestors that it is given.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.diffusion.transitions import DDIM, Kernel
from genalign.search.ranking import best
from genalign.search.resampling import RESAMPLERS, ResamplerName, effective_size, normalized_weights
from genalign.types import Grid

logger = logging.getLogger(__name__)

Potential = Literal["difference", "max", "sum"]
Terminal = Literal["argmax", "weighted"]


@dataclass(frozen=True)
class FKSettings:
    """How particles are weighed, resampled and chosen from; ``particles`` of each prompt, None where a budget decides.

    The potential of a preview with reward r is exp(lam (r - the one before)), exp(lam max) or exp(lam sum) of the
    rewards so far; at the last step it is what the product lacks of exp(lam r(x0)). Copies are made where the
    effective number of a prompt's particles is below the share ``ess`` of them (None: at every scoring step).
    ``start``, ``stop`` and ``every`` are fractions of the steps. ``gamma`` tempers lam as DAS does (arXiv 2501.05803).
    ``terminal`` "argmax" returns the best final reward (search), "weighted" a draw by the weights (sampling).
    ``kernel`` None leaves the moves to a scheduler of the user's own, which must draw noise.
    """

    particles: int | None = 4
    lam: float = 10.0
    potential: Potential = "difference"
    resampler: ResamplerName = "ssp"
    ess: float | None = 0.5
    start: float = 0.2
    stop: float = 0.8
    every: float = 0.2
    gamma: float | None = None
    terminal: Terminal = "argmax"
    kernel: Kernel | None = DDIM(1.0)  # noqa: RUF009  # kernels are frozen

    def __post_init__(self) -> None:
        _require_one_of("potential", self.potential, get_args(Potential))
        _require_one_of("resampler", self.resampler, get_args(ResamplerName))
        _require_one_of("terminal", self.terminal, get_args(Terminal))
        if self.particles is not None and self.particles < 1:
            raise ValueError(f"particles must be at least 1, or None where a budget decides, not {self.particles}")
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam must be finite and 0 or more, not {self.lam}; to lower a score, negate the reward")
        if self.ess is not None and not 0 < self.ess <= 1:
            raise ValueError(f"ess is a share of the particles in (0, 1], or None for every time, not {self.ess}")
        if not (0 <= self.start <= self.stop <= 1 and self.every > 0):
            raise ValueError(
                "start, stop and every are fractions of the steps, 0 <= start <= stop <= 1 and every > 0, not"
                f" {self.start}, {self.stop} and {self.every}"
            )
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma must be positive, or None for the full lam at every step, not {self.gamma}")

    def scoring_steps(self, total: int) -> tuple[int, ...]:
        """The network evaluations, from 0, whose previews are scored, and the last of ``total``: that of the samples.

        Of the evaluation before the last no preview is scored: its copies could hardly differ any more, and under a
        kernel without noise at the end not at all. Raises ValueError where no step is left to resample at.
        """
        count = math.floor((self.stop - self.start) / self.every + 1e-9) + 1
        steps = {round((self.start + place * self.every) * total) for place in range(count)}
        early = sorted(step for step in steps if step < total - 2)
        if not early:
            raise ValueError(
                f"no preview between {self.start} and {self.stop} of {total} steps leaves its copies time to differ:"
                " take more steps, or an earlier start"
            )
        return (*early, total - 1)

    def strength(self, step: int, total: int) -> float:
        """Lam at evaluation ``step``: under tempering lam min((1 + gamma)^i - 1, 1) for i = step + 1 (DAS, code), and
        lam at the last.
        """
        if self.gamma is None or step == total - 1:
            return self.lam
        return self.lam * min(math.expm1(min((step + 1) * math.log1p(self.gamma), 1.0)), 1.0)


def require_stochastic(kernel: Kernel, grid: Grid) -> None:
    """Raises ValueError for a kernel that does not draw noise at every step of the grid but the last."""
    if not bool((kernel(grid[torch.arange(len(grid))]).s[:-1] > 0).all()):
        raise ValueError(
            f"{kernel} moves without noise, so that copies of a particle would stay identical and resampling could"
            " find nothing new: use a stochastic kernel such as DDIM(1.0), or Prune, which makes no copies"
        )


class FKState:
    """The weights of N particles of P prompts along one run; for another run, make another.

    ``group`` (N,) long tells each particle's prompt, prompts counting in ascending order; they may have unequal numbers
    of particles, and never exchange any. What is drawn for a prompt depends on ``seed`` and its index alone.
    ``origins`` (N,) long are the particles of the beginning that those of now descend from, and ``failures`` counts
    scores that were not finite. Tensors are float64 or long, on the CPU.
    """

    def __init__(self, settings: FKSettings, group: Tensor, total: int, seed: int | str) -> None:
        if group.ndim != 1 or len(group) == 0 or group.dtype != torch.long:
            raise ValueError(f"group must hold prompt indices (N,) long, N > 0, not {tuple(group.shape)} {group.dtype}")
        self.settings, self.group, self.total = settings, group.cpu(), total
        keys = torch.unique(self.group)
        self.members = [(self.group == key).nonzero()[:, 0] for key in keys]
        self.origins = torch.arange(len(group))
        self.failures = 0
        self._generators = [torch.Generator().manual_seed(derived_seed(seed, "resample", int(key))) for key in keys]
        self._step = -1
        self._scores = torch.full((len(group),), -math.inf, dtype=torch.float64)
        self._log_w = torch.zeros_like(self._scores)  # since the prompt was last resampled
        self._log_product = torch.zeros_like(self._scores)  # of all potentials along the path
        self._rewards = self._scores.clone() if settings.potential == "max" else self._log_w.clone()  # max or sum
        self._failed = torch.zeros(len(group), dtype=torch.bool)
        self._log_evidence = torch.zeros(len(keys), dtype=torch.float64)

    @property
    def log_weights(self) -> Tensor:
        """(N,), up to a constant of each prompt; -inf where the score failed."""
        return torch.where(self._failed, -math.inf, self._log_w)

    @property
    def log_evidence(self) -> Tensor:
        """Per prompt (P,) the estimate of log E[product of all potentials so far]; at the end log E[exp(lam r(x0))]."""
        return self._log_evidence + torch.stack([self._log_mean_weight(members) for members in self.members])

    def weigh(self, scores: Tensor, step: int, log_ratio: Tensor | None = None) -> None:
        """Multiply the weights by the potentials of previews, or at the last step of samples, with ``scores`` (N,).

        ``step`` is the network evaluation that the previews are of. ``log_ratio`` (N,) is log p - log q, summed over
        the moves since the last call, where these were drawn from a guided q in place of the kernel's p. A particle
        whose score is not finite weighs nothing until it is scored again; where all of a prompt's failed, its step
        does not count. Raises ValueError for another shape, a step out of order, or a ratio that is not finite.
        """
        self._require_next(scores, step)
        if log_ratio is not None:
            self._log_w += self._checked_ratio(log_ratio)
        self._step = step
        self._scores = self._known_scores(scores)
        valid = self._scores > -math.inf
        product = self._log_product_with(self._scores, self.settings.strength(step, self.total))
        self._log_w = torch.where(valid, self._log_w + product - self._log_product, self._log_w)
        self._log_product = torch.where(valid, product, self._log_product)
        for members in self.members:
            if bool(valid[members].any()):
                self._failed[members] = ~valid[members]

    def resample(self) -> Tensor | None:
        """Ancestors (N,) long of all particles, or None where no prompt needs it, as always after the last step.

        Follow them with everything that belongs to a particle, but leave each place its own source of noise. A prompt
        that is not resampled keeps its particles and their weights.
        """
        worn = [place for place in range(len(self.members)) if self._is_worn(place)]
        if self._step == self.total - 1 or not worn:
            return None
        ancestors = torch.arange(len(self.group))
        for place in worn:
            members = self.members[place]
            draw = RESAMPLERS[self.settings.resampler]
            ancestors[members] = members[draw(normalized_weights(self.log_weights[members]), self._generators[place])]
            self._log_evidence[place] += self._log_mean_weight(members)
            self._log_w[members] = 0.0
        self._follow(ancestors)
        return ancestors

    def choose(self) -> Tensor:
        """The particle (P,) long that each prompt returns, by ``settings.terminal``; of equal rewards the first.

        Raises ValueError before the last step was weighed.
        """
        if self._step != self.total - 1:
            raise ValueError(f"weigh the samples' own scores first, as step {self.total - 1}")
        if self.settings.terminal == "argmax":
            return best(self._scores, self.group, 1)
        draws = [
            members[torch.multinomial(normalized_weights(self.log_weights[members]), 1, generator=generator)]
            for members, generator in zip(self.members, self._generators, strict=True)
        ]
        return torch.cat(draws)

    def effective_sizes(self) -> Tensor:
        """Per prompt (P,), how many equal particles the weights are worth."""
        sizes = [effective_size(self.log_weights[members]) for members in self.members]
        return torch.tensor(sizes, dtype=torch.float64)

    def unique_ancestors(self) -> Tensor:
        """Per prompt (P,) long, how many of the initial particles have descendants."""
        return torch.tensor([len(torch.unique(self.origins[members])) for members in self.members])

    def _log_product_with(self, scores: Tensor, lam: float) -> Tensor:
        """The product of potentials including the new ones (N,)."""
        if self.settings.potential == "difference" or self._step == self.total - 1:
            return lam * scores
        valid = scores > -math.inf
        joined = torch.maximum(self._rewards, scores) if self.settings.potential == "max" else self._rewards + scores
        self._rewards = torch.where(valid, joined, self._rewards)
        return self._log_product + lam * self._rewards

    def _is_worn(self, place: int) -> bool:
        log_weights = self.log_weights[self.members[place]]
        return self.settings.ess is None or effective_size(log_weights) < self.settings.ess * len(log_weights)

    def _log_mean_weight(self, members: Tensor) -> Tensor:
        return torch.logsumexp(self.log_weights[members], dim=0) - math.log(len(members))

    def _follow(self, ancestors: Tensor) -> None:
        self.origins = self.origins[ancestors]
        self._scores = self._scores[ancestors]
        self._failed = self._failed[ancestors]
        self._log_w = self._log_w[ancestors]
        self._log_product = self._log_product[ancestors]
        self._rewards = self._rewards[ancestors]

    def _known_scores(self, scores: Tensor) -> Tensor:
        """The scores in float64, those that failed counted and -inf."""
        known = scores.detach().cpu().double()
        failed = ~known.isfinite()
        if count := int(failed.sum()):
            self.failures += count
            logger.warning("%d of %d scores at step %d are not finite: weight 0", count, len(known), self._step)
        return torch.where(failed, -math.inf, known)

    def _checked_ratio(self, log_ratio: Tensor) -> Tensor:
        ratio = log_ratio.detach().cpu().double()
        if ratio.shape != self.group.shape or not bool(ratio.isfinite().all()):
            raise ValueError(
                f"log_ratio must be ({len(self.group)},) and finite, not {tuple(ratio.shape)}: guide only moves that"
                " draw noise"
            )
        return ratio

    def _require_next(self, scores: Tensor, step: int) -> None:
        if scores.shape != self.group.shape:
            raise ValueError(f"scores must be ({len(self.group)},), one per particle, not {tuple(scores.shape)}")
        if not self._step < step < self.total:
            raise ValueError(
                f"step {step} cannot be weighed after step {self._step} of {self.total}: steps ascend; make a new"
                " FKState for a new run"
            )


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
