"""Optimizer steps on a reward's weights: AdamW in float32, with a schedule, clipping, and a state to resume from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.state import load_optimizer_tensors, optimizer_tensors


@dataclass(frozen=True)
class FitSettings:
    """How weights are trained: AdamW with a linear warmup, and a learning rate that then falls linearly.

    Args:
        learning_rate: The largest learning rate.
        weight_decay: Weight decay of AdamW.
        betas: Decay rates of AdamW's averages of gradients and of their squares.
        warmup: Number of steps in which the learning rate rises from 0.
        last: The learning rate after the last step, as a share of the largest; 1 leaves it constant.
        clip: The largest norm of the gradient of all weights; null does not clip.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    last: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or self.weight_decay < 0 or self.warmup < 0 or not 0 <= self.last <= 1:
            raise ValueError(
                "learning_rate must be positive, weight_decay and warmup at least 0, and last within 0 and 1, not"
                f" {self}"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, not {self.clip}: leave it null to clip no gradient")

    def rate(self, step: int, steps: int | None) -> float:
        """Return the learning rate of ``step``, from 0, of ``steps``; of None it is constant after the warmup."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        passed = 0.0 if not steps else min(1.0, step / steps)
        return self.learning_rate * warm * (1 + (self.last - 1) * passed)


class Fitter:
    """The trained weights of a reward with their optimizer.

    Weights are cast to float32. The learning rate follows from the number of the step alone, so a run that is
    resumed by ``load_tensors`` makes the same steps, bit for bit. Where the module that holds the weights moves to
    another device, the optimizer's state follows at the next step. No step waits for the device.

    Args:
        weights: The weights to train, by name; each requires a gradient.
        settings: Learning rate, decay and clipping.
        steps: Number of steps over which the learning rate falls; None leaves it constant.

    Raises:
        ValueError: There are no weights, or one does not require a gradient.
    """

    def __init__(self, weights: Mapping[str, Tensor], settings: FitSettings, steps: int | None = None) -> None:
        if not weights or not all(weight.requires_grad for weight in weights.values()):
            raise ValueError("no weight to train: a trained weight requires a gradient")
        self.weights, self.settings, self.steps, self.count = dict(weights), settings, steps, 0
        for weight in self.weights.values():
            weight.data = weight.data.float()
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(iter(self.weights.values())).device

    def step(self, loss: Tensor) -> Tensor:
        """Take an optimizer step on a scalar loss, and return the norm () of the gradient before clipping."""
        return self.apply(self.gradients(loss))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Compute the gradient of a scalar loss for each weight; 0 for those that it does not depend on."""
        return list(torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True, materialize_grads=True))

    def apply(self, gradients: Sequence[Tensor]) -> Tensor:
        """Take an optimizer step along gradients, summed over ranks, and return their norm () before clipping."""
        weights = list(self.weights.values())
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        norm = nn.utils.clip_grad_norm_(weights, self.settings.clip or float("inf"))
        slots = next(iter(self.optimizer.state.values()), None)
        if slots is not None and slots["exp_avg"].device != self.device:  # the weights moved since the last step
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.count, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        return norm

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the weights, by name, where they are."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the weights, of the optimizer's state, and of the number of steps made."""
        state = {name: tensor.detach().clone() for name, tensor in optimizer_tensors(self.optimizer).items()}
        count = {"count": torch.tensor(self.count)}
        return with_prefix("weights.", self.copies()) | with_prefix("optimizer.", state) | count

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors`` returned. Raises ValueError for those of other weights."""
        weights = without_prefix("weights.", tensors)
        shapes = {name: weight.shape for name, weight in weights.items()}
        if shapes != {name: weight.shape for name, weight in self.weights.items()}:
            raise ValueError("this state is of other weights: resume with the same encoder and head")
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
        state = {name: tensor.clone() for name, tensor in without_prefix("optimizer.", tensors).items()}
        load_optimizer_tensors(self.optimizer, state)
        self.count = int(tensors["count"])
