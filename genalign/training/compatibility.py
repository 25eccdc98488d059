"""Checks that a recipe, the settings and the policy fit together."""

from __future__ import annotations

from collections.abc import Sequence

from genalign.algorithms.interfaces import SingleSampleCredit, traits_of
from genalign.algorithms.recipe import Recipe
from genalign.diffusion.policy import Policy
from genalign.training.settings import FittedSettings, TrainerSettings


def _require_current_samples(recipe: Recipe, settings: FittedSettings, policy: Policy) -> None:
    """Raise ValueError for what a pathwise objective cannot do: its gradient is that of the sampling policy."""
    if settings.epochs > 1:
        raise ValueError(
            "this recipe differentiates the sampler that made the samples, and cannot learn from them twice: set"
            " training.epochs to 1"
        )
    if recipe.lag or recipe.balance:
        name = "lag" if recipe.lag else "balance of rewards"
        raise ValueError(f"this recipe backpropagates rewards through the sampler, and takes no {name}: leave it out")
    if policy.sharded:
        raise ValueError("recipes that backpropagate through the sampler do not support FSDP: train a LoRA without it")


def require_comparable(recipe: Recipe, settings: TrainerSettings) -> None:
    """Raise ValueError for a group size of 1 with a recipe that compares the samples of a prompt."""
    alone = recipe.objective.unit != "group" and isinstance(recipe.credit, SingleSampleCredit)
    if settings.group_size == 1 and not alone:
        raise ValueError(
            "training.group_size is 1, and this recipe compares the samples of a prompt: set it to 2 or more, or choose"
            " a recipe that takes single samples, such as sft, kto or consistency"
        )


def require_fit(recipe: Recipe, settings: FittedSettings, policy: Policy, batch_sizes: Sequence[int]) -> None:
    """Raise ValueError where the recipe, the settings and the policy do not fit together."""
    require_comparable(recipe, settings)
    if traits_of(recipe.objective).through_sampler:
        _require_current_samples(recipe, settings, policy)
    if policy.sharded:
        _require_equal_work(recipe, settings, batch_sizes, policy.processes.world_size)
    if settings.group_reward and recipe.redraw and not recipe.redraw.whole_groups:
        raise ValueError(
            f"reward {settings.group_reward!r} compares all samples of a prompt with each other, and"
            " with_adaptive_group_size draws some of them later: choose with_dynamic_sampling"
        )
    if recipe.companion is not None and policy.sharded:
        raise ValueError("this recipe trains a second network, for which FSDP is not supported: train without it")
    if policy.shifts_noise and not recipe.shifts_noise:
        raise ValueError(
            "the adapter on this model is a noise hypernetwork, which is off during sampling: train it with"
            " noise_hypernetwork, or open the model without it"
        )
    if recipe.shifts_noise and settings.data:
        raise ValueError("noise_hypernetwork learns from the noise of its own samples: leave training.data out")


def _require_equal_work(recipe: Recipe, settings: FittedSettings, batch_sizes: Sequence[int], ranks: int) -> None:
    """Raise ValueError for what gives the ranks of a sharded network unequal work, which FSDP does not allow."""
    if 0 in batch_sizes:
        raise ValueError(
            f"updates of {sum(batch_sizes) // settings.updates_per_round} samples do not give each of {ranks} processes"
            " equally many batches, which FSDP needs: change training.batch_size"
        )
    if settings.epochs > 1:
        raise ValueError(
            "training.epochs above 1 gives ranks unequal parts of an update, which FSDP does not allow: set it to 1"
        )
    if recipe.redraw:
        raise ValueError(
            "drawing other samples in place of zero-variance groups gives ranks unequal work, which FSDP does not"
            " allow: leave with_dynamic_sampling or with_adaptive_group_size out"
        )
