"""The prompts of a training run: those that are trained on, and those of its evaluations."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from genalign.cli.context import prompt_set
from genalign.cli.train_settings import Train
from genalign.evaluation.evaluate import suite_hash
from genalign.prompts import split_held_out
from genalign.types import PromptSet

logger = logging.getLogger(__name__)
_CHOOSING, _GAIN = "held_out", "before_after"  # the evaluations that select the weights, and that measure their gain


@dataclass(frozen=True)
class RunPrompts:
    """The training prompts, and those of each evaluation by the name of its section."""

    training: PromptSet
    evaluations: Mapping[str, PromptSet]

    @classmethod
    def read(cls, settings: Train) -> Self:
        """Read all prompt sources; evaluations without one share a held-out split of the training prompts.

        If the weights are selected on this split and their gain is measured on it, each takes half of it, unless a half
        would be a single prompt. Raises FileNotFoundError or ValueError for a source that cannot be used.
        """
        training, sources = prompt_set(settings.prompts), settings.evaluation_prompts()
        held_out = training
        if None in sources.values():
            training, held_out = split_held_out(training, settings.held_out_fraction)
        sets = {name: held_out if source is None else prompt_set(source) for name, source in sources.items()}
        both = [name for name in (_CHOOSING, _GAIN) if sources.get(name, "") is None]
        if len(both) == 2 and len({prompt.text for prompt in held_out.prompts}) >= 2 * len(both):
            for name, half in zip(both, split_held_out(held_out, 0.5), strict=True):
                sets[name] = replace(half, name=f"{held_out.name}, half for {name}")
        monitored = {prompt.text for prompt in sets["reward_hacking"].prompts} if "reward_hacking" in sets else ()
        if len(monitored) == 1:
            raise ValueError(
                "reward_hacking needs at least two prompts to compare: name some in reward_hacking.prompts, or raise"
                " held_out_fraction"
            )
        return cls(training, sets)

    def texts(self) -> list[str]:
        """List the texts of all prompts."""
        sets = (self.training, *self.evaluations.values())
        return list(dict.fromkeys(prompt.text for prompts in sets for prompt in prompts.prompts))

    def also_trained(self, name: str) -> int:
        """Count the prompts of an evaluation that are trained on."""
        trained = {prompt.text for prompt in self.training.prompts}
        return len(trained & {prompt.text for prompt in self.evaluations[name].prompts})

    def warn(self) -> None:
        """Log a warning for every evaluation with prompts that are trained on."""
        for name, prompts in self.evaluations.items():
            if count := self.also_trained(name):
                logger.warning(
                    "%d of the %d prompts of %s are trained on: its scores say nothing about new prompts. Name other"
                    " prompts in %s.prompts, or null for a split of the training prompts",
                    *(count, len({prompt.text for prompt in prompts.prompts}), name, name),
                )
        if shared := self._shared(_CHOOSING, _GAIN):
            logger.warning(
                "%d prompts of before_after are also used to select the weights (held_out): the measured gain is biased"
                " upward. Name other prompts in before_after.prompts, or raise held_out_fraction",
                shared,
            )

    def _shared(self, first: str, second: str) -> int:
        """Count the prompts that two evaluations have in common."""
        texts = [
            {prompt.text for prompt in self.evaluations[name].prompts}
            for name in (first, second)
            if name in self.evaluations
        ]
        return len(set.intersection(*texts)) if len(texts) == 2 else 0

    def as_dict(self) -> dict[str, Any]:
        """Describe every set as JSON types: its name, its number of different prompts, its hash, and the overlap."""

        def described(prompts: PromptSet) -> dict[str, Any]:
            distinct = len({prompt.text for prompt in prompts.prompts})
            return {"suite": prompts.name, "prompts": distinct, "suite_hash": suite_hash(prompts)}

        evaluations = {
            name: described(prompts) | {"also_trained": self.also_trained(name)}
            for name, prompts in self.evaluations.items()
        }
        return {"training": described(self.training)} | evaluations
