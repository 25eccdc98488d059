"""Checks of a run's settings by ``train`` and ``plan`` before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from genalign.algorithms.interfaces import with_stronger_kl
from genalign.cli.base_samples import require_references
from genalign.cli.context import CommandContext, named_rewards, prompt_set
from genalign.cli.run_prompts import RunPrompts
from genalign.scoring.score import group_reward, parts
from genalign.training.loss_scale import LossScale
from genalign.training.pools import Pool
from genalign.training.run_folder import RunFolder
from genalign.training.settings import optimizer_class
from genalign.types import ComparesWithReferences, Prompt

if TYPE_CHECKING:
    from genalign.cli.parsing import Check
    from genalign.cli.train_settings import Train


def training_checks(context: CommandContext, resume: bool = False) -> Iterator[Check]:
    """Yield the checks of a training run; each raises ValueError or OSError for settings that fail it.

    A run that is not resumed needs an unused output.
    """
    if not resume:
        yield lambda settings: RunFolder(Path(settings.output)).require_unused()
    yield lambda settings: context.require(settings.model)
    yield lambda settings: optimizer_class(settings.training)
    yield _require_loss_scale
    yield lambda settings: require_trackers(settings.trackers)
    yield lambda settings: prompt_set(settings.prompts)
    for section in ("held_out", "reward_hacking", "before_after"):
        yield partial(_require_prompts, section)
    yield lambda settings: named_rewards(settings.rewards)
    yield _require_sizes
    yield _require_penalty
    yield require_references
    yield _require_prompts_of_references


def _require_prompts(section: str, settings: Train) -> None:
    """Raise an error if the prompts of an evaluation cannot be read, unless it is off."""
    panel = getattr(settings, section)
    if panel and panel.prompts is not None and panel.is_on:
        prompt_set(panel.prompts)


def _require_sizes(settings: Train) -> None:
    """Raise ValueError for sizes of a round that do not fit the prompts, the loss or the rewards."""
    unit, grouped = settings.recipe.objective.unit, group_reward(settings.rewards)
    settings.training.fit(RunPrompts.read(settings).training, unit, group_reward=grouped)


def _require_loss_scale(settings: Train) -> None:
    """Raise ValueError for a network that computes in float16 without a loss scale."""
    model = settings.model
    LossScale.for_dtype(getattr(torch, model.autocast or model.dtype), settings.training.loss_scale)


def _require_penalty(settings: Train) -> None:
    """Raise ValueError if ``on_red.raise_kl`` is set for an objective without a penalty."""
    minimum = settings.reward_hacking.on_red.raise_kl
    if minimum is not None:
        with_stronger_kl(settings.recipe.objective, minimum)


def _require_prompts_of_references(settings: Train) -> None:
    """Raise ValueError for a reward that compares with references but has none for some training prompts.

    A reward that is a column of a pool is not called.
    """
    training, called = RunPrompts.read(settings).training, dict(settings.rewards)
    if settings.training.data:
        pool = Pool.load(Path(settings.training.data)).with_groups_of(settings.training.group_size)
        training = pool.restricted(training)
        called = {name: choice for name, choice in called.items() if name not in pool.info.scores}
    for name, choice in called.items():
        compared = [part for _, part in parts(choice) if isinstance(part, ComparesWithReferences)]
        missing = [
            error for part in compared for prompt in training.prompts if (error := _missing_reference(part, prompt))
        ]
        if missing:
            raise ValueError(
                f"reward {name!r} has no references for {len(missing)} of the {len(training)} training prompts:"
                f" {missing[0]}"
            )


def _missing_reference(reward: ComparesWithReferences, prompt: Prompt) -> ValueError | None:
    """Return the error of a reward that has no reference for a prompt; None if it has one."""
    try:
        reward.require_references(prompt)
    except ValueError as error:
        return error
    return None


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for trackers that are not installed, which accelerate would silently ignore."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ValueError(
            f"trackers {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed:"
            f" pip install {' '.join(missing)}"
        )
