"""Networks that learn beside the policy of a few-step student: distribution matching's fake score, a proxy reward.

N counts samples. With several processes each learns from its own samples, and gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.algorithms.consistency_distillation import consistency_function
from genalign.algorithms.interfaces import UpdateBatch, UpdateContext
from genalign.algorithms.losses import mean_square
from genalign.algorithms.matching import noised_samples
from genalign.algorithms.tails import Mover
from genalign.diffusion.noise import derived_seed, seeded_noise, seeded_uniform
from genalign.diffusion.policy import Policy
from genalign.runtime.distributed import seeded
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.state import State, load_optimizer_tensors, optimizer_tensors
from genalign.scoring.score import combine, score
from genalign.types import Pipeline

LOWEST, HIGHEST = 0.02, 0.98
"""The range of levels at which few-step students and their companions learn, as fractions of the path's range."""


def places(seeds: Sequence[int], low: float = LOWEST, high: float = HIGHEST) -> Tensor:
    """Draw a place (N,) in the path's range of levels from each seed, uniformly."""
    return low + (high - low) * seeded_uniform(seeds)


@dataclass(frozen=True)
class FakeScore:
    """Settings of a score network that tracks the student's own samples (DMD2, arXiv 2405.14867).

    Its weights are a copy of the policy's initial ones, swapped in while it predicts and learns: there is no second
    network, and no second adapter.

    Args:
        steps: The number of its updates in a round.
        learning_rate: Its learning rate.
    """

    steps: int = 5
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.learning_rate > 0:
            raise ValueError(
                "a fake score needs at least 1 step a round and a positive learning rate, not"
                f" {self.steps} and {self.learning_rate}"
            )

    def __call__(self, pipeline: Pipeline, policy: Policy, seed: int) -> LearnedFakeScore:
        """Start from the policy's weights."""
        return LearnedFakeScore(self, policy)


class LearnedFakeScore:
    """The weights of a fake score, and their optimizer."""

    def __init__(self, settings: FakeScore, policy: Policy) -> None:
        self.settings, self.weights = settings, policy.snapshot()
        self.optimizer = torch.optim.AdamW(self.weights.tensors, lr=settings.learning_rate, weight_decay=0.0)

    def update(self, context: UpdateContext, parts: Sequence[UpdateBatch], total: int, seed: int) -> None:
        """Regress on the round's samples, noised to uniform levels, without guidance."""
        policy = context.policy
        for step in range(self.settings.steps):
            with policy.using(self.weights):
                for part in parts:
                    self._accumulate(context, part.to(policy.device), total, derived_seed(seed, step))
            policy.sum_gradients()
            for tensor, parameter in zip(self.weights.tensors, policy.parameters, strict=True):
                tensor.grad = None if parameter.grad is None else parameter.grad.to(tensor.device)
                parameter.grad = None  # it was not the policy's
            self.optimizer.step()

    @staticmethod
    def _accumulate(context: UpdateContext, batch: UpdateBatch, total: int, seed: int) -> None:
        """Accumulate the gradient of the errors of a micro-batch, divided by the ``total`` of samples."""
        rows = batch.credit.nonzero()[:, 0]
        if not len(rows):
            return
        own = batch.rollout.inputs.noise_seeds
        seeds = [derived_seed(seed, own[row]) for row in rows.tolist()]
        noising = noised_samples(context.pipeline, batch, rows, places(seeds), seeds)
        errors = mean_square(noising.predict(context.pipeline), noising.target)
        context.metrics.add("error", errors)
        torch.autograd.backward(errors.sum() / total)

    def state(self) -> State:
        """Return the weights and the optimizer's moments."""
        moments = with_prefix("optimizer.", optimizer_tensors(self.optimizer))
        return State(with_prefix("weights.", self.weights.state_dict()) | moments, {})

    def restore(self, state: State) -> None:
        """Restore what ``state()`` returned."""
        self.weights.load_state_dict(without_prefix("weights.", state.tensors))
        load_optimizer_tensors(self.optimizer, without_prefix("optimizer.", state.tensors))


@dataclass(frozen=True)
class LatentProxy:
    """Settings of a latent reward that imitates the run's rewards (RG-LCD's latent proxy, arXiv 2403.11027).

    Gradients come from the proxy, so neither the rewards nor the decoder need any.

    Args:
        network: Makes the network, which scores latents (N, ...) of N prompts as (N,).
        steps: The number of its updates in a round.
        learning_rate: Its learning rate.
    """

    network: Callable[[], nn.Module]
    steps: int = 1
    learning_rate: float = 1e-4

    def __call__(self, pipeline: Pipeline, policy: Policy, seed: int) -> LearnedProxy:
        """Build the network, with initial weights drawn from the seed."""
        with seeded(seed):
            network = self.network()
        return LearnedProxy(self, network.to(policy.device).eval(), policy)


class LearnedProxy:
    """The network of a proxy, and its optimizer. Raises ValueError for a network without weights to train."""

    def __init__(self, settings: LatentProxy, network: nn.Module, policy: Policy) -> None:
        self.settings, self.network, self.processes = settings, network, policy.processes
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError(f"the proxy {type(network).__name__} has no trainable weights")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)

    def update(self, context: UpdateContext, parts: Sequence[UpdateBatch], total: int, seed: int) -> None:
        """Learn to rank the student's estimate, its target's and the sample itself as the rewards do."""
        for step in range(self.settings.steps):
            for part in parts:
                self._accumulate(context, part.to(context.policy.device), total, derived_seed(seed, step))
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.processes.all_reduce_([p.grad for p in self.parameters if p.grad is not None])
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _accumulate(self, context: UpdateContext, batch: UpdateBatch, total: int, seed: int) -> None:
        """Accumulate the gradient of the losses of a micro-batch, divided by the ``total`` of samples."""
        rows = batch.credit.nonzero()[:, 0]
        if not len(rows):
            return
        prompts = [context.prompts[place] for place in batch.group[rows].tolist()]
        latents, weights = self._compared(Mover.of(context, batch, rows), seed), [r.weight for r in context.rewards]
        with torch.no_grad():
            tables = [score(context.rewards, context.pipeline.decode(one), prompts) for one in latents]
        expert = torch.stack([combine(table, weights) for table in tables], dim=1).to(latents[0].device)
        scores = torch.stack([self.network(one, prompts) for one in latents], dim=1)
        finite = expert.isfinite().all(1)
        losses = proxy_loss(expert[finite], scores[finite])
        context.metrics.add("loss", losses)
        torch.autograd.backward(losses.sum() / total)

    @staticmethod
    @torch.no_grad()
    def _compared(mover: Mover, seed: int) -> list[Tensor]:
        """Return latents (N, ...) of the student, of its target, and of the samples, from one noised latent each."""
        context, x0 = mover.context, mover.batch.rollout.final[mover.on_device]
        pipeline, seeds = context.pipeline, mover.seeds(seed, "proxy")
        level = pipeline.level(places(seeds))
        x = pipeline.path.add_noise(x0, seeded_noise(seeds, x0), level)

        def estimate() -> Tensor:
            prediction = pipeline.predict(x, level, mover.conditioning, 1.0)
            return consistency_function(pipeline.path, x, prediction, level)

        assert context.memory is not None, "a recipe with a proxy has a target"
        with context.policy.using(context.memory):
            target = estimate()
        return [estimate(), target, x0]

    def state(self) -> State:
        """Return the trained weights and the optimizer's moments."""
        weights = {str(place): parameter.detach() for place, parameter in enumerate(self.parameters)}
        moments = with_prefix("optimizer.", optimizer_tensors(self.optimizer))
        return State(with_prefix("weights.", weights) | moments, {})

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Restore what ``state()`` returned."""
        weights = without_prefix("weights.", state.tensors)
        for place, parameter in enumerate(self.parameters):
            parameter.copy_(weights[str(place)])
        load_optimizer_tensors(self.optimizer, without_prefix("optimizer.", state.tensors))


def proxy_loss(expert: Tensor, scores: Tensor) -> Tensor:
    """Sum over pairs of columns of KL(softmax of the expert's pair || softmax of the proxy's), as (N,).

    Args:
        expert: Scores (N, C) of C samples by the rewards.
        scores: Scores (N, C) by the proxy.
    """
    total = torch.zeros(len(scores), dtype=scores.dtype, device=scores.device)
    for pair in combinations(range(expert.shape[1]), 2):
        aim, guess = F.softmax(expert[:, pair].to(scores.dtype), dim=1), F.log_softmax(scores[:, pair], dim=1)
        total = total + F.kl_div(guess, aim, reduction="none").sum(1)
    return total
