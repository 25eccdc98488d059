"""Loss scaling: gradients of a float16 network keep their direction at the sizes that training gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from genalign.algorithms.recipes import ddpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines import StableDiffusion
from tests.pipelines.tiny_checkpoints import FolderOf

SETTINGS = TrainerSettings(rounds=1, prompts_per_round=2, group_size=4, updates_per_round=1, learning_rate=1e-9)


def _ranking(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward of a sample's place in the batch, which rounding of the samples does not change."""
    return torch.linspace(-1, 1, len(samples))


class _Recorder(torch.optim.SGD):
    """An optimizer that records the gradients instead of following them."""

    gradient = torch.empty(0)

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # no closure is given
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.gradient = torch.cat(gradients)


def _gradient(folder: Path, dtype: torch.dtype, settings: TrainerSettings, factor: float) -> Tensor:
    """The gradient of an update through ``Trainer``, with the credit times ``factor``."""
    pipeline = StableDiffusion.load(folder, dtype=dtype)
    policy = Policy(pipeline.denoiser, Lora(rank=4, alpha=4), seed=0)
    for parameter in policy.parameters:  # B starts at zero, where A has no gradient
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    recipe = ddpo()
    credit = recipe.credit
    recipe = replace(recipe, credit=lambda scores: factor * credit(scores))
    trainer = Trainer(pipeline, policy, _ranking, PromptSet.of(["a cat", "a dog"]), recipe, settings, Sampling(4))
    trainer.learner.optimizer = recorder = _Recorder(policy.parameters, lr=1e-9)
    for _ in trainer.rounds():
        pass
    return recorder.gradient


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a @ b) / (a.norm() * b.norm()))


def test_float16_learns_in_the_direction_of_float32(folder_of: FolderOf) -> None:
    folder = folder_of("sd15")
    # SD 1.5 at 512 px has 64 times the latent values of this checkpoint, and its preset 100 times the transitions of an
    # update: gradients at its network's output are smaller by both factors, about 3e-8
    factor = 1 / 6400
    exact = _gradient(folder, torch.float32, SETTINGS, factor)
    scaled = _gradient(folder, torch.float16, SETTINGS, factor)
    assert _cosine(exact, scaled) > 0.99
    unscaled = _gradient(folder, torch.float16, replace(SETTINGS, loss_scale=2.0), factor)
    assert not unscaled.any() or _cosine(exact, unscaled) < 0.9


def test_latents_that_are_not_finite_are_no_overflow_of_the_autoencoder(folder_of: FolderOf) -> None:
    pipeline = StableDiffusion.load(folder_of("sd15"), dtype=torch.float16)
    latents = pipeline.initial_noise([1, 2])
    latents[1] = torch.nan
    decoded = pipeline.decode(latents)
    assert bool(decoded[0].isfinite().all()) and not bool(decoded[1].isfinite().all())
