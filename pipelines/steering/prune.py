"""Noise-aware pruning of a diffusers pipeline of the user's own, in calls of it that each make a part of the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.scoring.budget import DECODE, Ledger, metered_rewards
from genalign.scoring.score import NamedReward, named, score
from genalign.search.lineage import Lineage
from genalign.search.pruning import Prune
from genalign.search.ranking import top
from genalign.types import Prompt, RewardFunction
from pipelines.steering.decode import Decode, decode_latents
from pipelines.steering.partial_runs import FirstPart, first_part, next_part, second_part
from pipelines.steering.steer import billed, network_of, sizes_seen


@dataclass(frozen=True)
class Pruned:
    """Result of pruning: decoded ``samples`` (M, ...), best first (see ``pipelines.steering.decode``), their ``scores``
    (M, K), the ``lineage`` of all candidates and the ``ledger``.
    """

    samples: Tensor
    scores: Tensor
    lineage: Lineage
    ledger: Ledger


def prune(
    pipe: DiffusionPipeline,
    prompt: str | Prompt,
    reward: RewardFunction | Mapping[str, RewardFunction] | Sequence[NamedReward],
    strategy: Prune,
    decode: Decode | None = None,
    seed: int = 0,
    **call: Any,
) -> Pruned:
    """``pipe(prompt, **call)`` for ``strategy.candidates`` seeds, most of which the schedule gives up on their way.

    The pipeline is called once for each part between two pruning steps, with as many prompts as candidates are alive;
    other texts in ``call``, such as a negative prompt, are repeated as often, and tensors (embeddings of the prompt, in
    its place) too. Raises ValueError without a number of candidates, for a scorer other than the rewards, and for what
    ``pipelines.steering.partial_runs`` cannot run in parts.
    """
    if strategy.candidates is None or strategy.scorer is not None:
        raise ValueError("prune needs Prune(candidates=...), and scores decoded previews by the rewards alone")
    asked = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
    work = _Work(pipe, asked, reward, decode, seed, call)
    with ExitStack() as stack:
        work.sizes = stack.enter_context(sizes_seen(pipe))
        stack.enter_context(billed(network_of(pipe), work.ledger))
        return work.run(strategy, strategy.candidates)


class _Work:
    """One prompt's candidates, on their way through calls of the pipeline."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompt: Prompt,
        reward: RewardFunction | Mapping[str, RewardFunction] | Sequence[NamedReward],
        decode: Decode | None,
        seed: int,
        call: dict[str, Any],
    ) -> None:
        self.pipe, self.prompt, self.decode, self.seed, self.call = pipe, prompt, decode, seed, call
        self.ledger, self.lineage = Ledger(), Lineage()
        self.rewards = metered_rewards(named(reward), self.ledger)
        self.sizes: list[tuple[int, int]] = []

    def run(self, strategy: Prune, count: int) -> Pruned:
        """All parts."""
        generators = [torch.Generator().manual_seed(derived_seed(self.seed, j)) for j in range(count)]
        names = self.lineage.add([0] * count, [None] * count, 0)
        part: FirstPart | None = None
        for step, left in zip(strategy.steps, strategy.schedule.counts(count)[1:], strict=True):
            arguments = self._arguments(generators)
            if part is None:
                part = first_part(self.pipe, step + 1, **arguments)
            else:
                part = next_part(self.pipe, part, step + 1, **arguments)
            scores, _ = self._scored(part.x0, names, step + 1)
            rows = _best(scores, left)
            kept = tuple(names[i] for i in rows.tolist())
            self.lineage.close([name for name in names if name not in kept], step + 1)
            part, names, generators = part.rows(rows), kept, [generators[i] for i in rows.tolist()]
        return self._finished(part, names, generators)

    def _finished(self, part: FirstPart | None, names: Sequence[int], generators: Sequence[torch.Generator]) -> Pruned:
        arguments = {**self._arguments(generators), "output_type": "latent", "return_dict": False}
        made = self.pipe(**arguments) if part is None else second_part(self.pipe, part, **arguments)
        total = len(self.pipe.scheduler.timesteps)
        scores, samples = self._scored(made[0], names, total)
        self.lineage.close(names, total)
        order = _best(scores, len(names))
        return Pruned(samples[order], scores[order], self.lineage, self.ledger)

    def _arguments(self, generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """A call for so many candidates."""
        count = len(generators)
        repeated = {name: _repeated(value, count) for name, value in self.call.items()}
        prompt = {} if "prompt_embeds" in self.call else {"prompt": [self.prompt.text] * count}
        return {**prompt, **repeated, "generator": list(generators)}

    def _scored(self, latents: Tensor, names: Sequence[int], done: int) -> tuple[Tensor, Tensor]:
        self.ledger.bill(DECODE, len(latents))
        size = self.sizes[-1] if self.sizes else None
        samples = self.decode(latents) if self.decode else decode_latents(self.pipe, latents, size)
        scores = score(self.rewards, samples, [self.prompt] * len(latents))
        self.lineage.record_scores(names, done, scores.tolist())
        return scores, samples


def _repeated(value: Any, count: int) -> Any:
    if isinstance(value, str):
        return [value] * count
    return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value


def _best(scores: Tensor, count: int) -> Tensor:
    same = torch.zeros(len(scores), dtype=torch.long)
    return top(scores, same, count)
