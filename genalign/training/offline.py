"""Learning from a pool instead of sampling: batches of a round from samples on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from genalign.algorithms.recipe import Recipe
from genalign.algorithms.redraws import Member
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import Rollout, RolloutInputs, rows_are_finite
from genalign.diffusion.user_attention import with_user_dropout
from genalign.runtime.distributed import ALL_RANKS, SINGLE_PROCESS, ProcessGroup, RankShare
from genalign.runtime.progress import SILENT, Progress
from genalign.scoring.score import NamedReward
from genalign.training.pools import Pool, drawn_group
from genalign.training.sampler import SampledBatch, blank_nonfinite, features_of_finite, score_finite
from genalign.training.settings import FittedSettings
from genalign.types import EncodesSamples, Pipeline, Prompt

logger = logging.getLogger(__name__)


def stored_score(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that exists only as a column of a pool, such as people's preferences: name it like the column.

    Raises ValueError where a sample would have to be scored, as for an evaluation.
    """
    raise ValueError(
        "genalign.stored_score is a column of a pool and cannot score other samples: name a reward for these"
    )


@dataclass(frozen=True)
class OfflineSampler:
    """A callable that returns groups of a pool as the batches of a round, in place of ``Sampler``.

    A reward named like one of the pool's scores uses that score; any other scores the decoded samples.
    """

    pipeline: Pipeline
    rewards: Sequence[NamedReward]
    pool: Pool
    settings: FittedSettings
    keep_samples: bool

    def __call__(
        self,
        recipe: Recipe,
        steps: Sequence[int],
        prompts: Sequence[Prompt],
        name: str,
        share: RankShare = ALL_RANKS,
        progress: Progress = SILENT,
        members: Sequence[Member | None] | None = None,
    ) -> Iterator[SampledBatch]:
        """Yield this rank's batches of a round that are not empty; the arguments are those of ``Sampler``."""
        rows, own = self.draw(prompts, name)
        place = torch.arange(len(prompts)).repeat_interleave(self.settings.group_size)
        seeds = tuple(derived_seed(name, "pool", number) for number in range(len(rows)))
        seen = with_user_dropout(own, self.settings.user_dropout, name)
        inputs = RolloutInputs(self.pipeline.encode(seen), place, seeds, seeds)
        sizes = self.settings.batch_sizes(recipe.objective.unit, share.world_size)
        batches, drawn = inputs.split(sizes), torch.split(torch.tensor(rows), list(sizes))
        with progress.phase("reading", len(rows)) as advance:
            for number in share.indices(len(sizes)):
                if not len(drawn[number]):
                    continue
                yield self._batch(recipe, batches[number], drawn[number].tolist(), own)
                advance(len(drawn[number]) * share.world_size)

    def draw(self, prompts: Sequence[Prompt], name: str) -> tuple[list[int], list[Prompt]]:
        """Draw a group for each of P prompts by the seed ``name``: the numbers of its samples, and its own prompt.

        Several users may share a text, so the prompt of the drawn group may have other metadata.

        Args:
            prompts: The prompts, of which only the texts matter.
            name: The seed, different in every round.

        Returns:
            The numbers of the samples in the pool, group by group, and the prompts (P).
        """
        size = self.settings.group_size
        rows = [
            row
            for place, prompt in enumerate(prompts)
            for row in drawn_group(self._groups[prompt.text], size, f"{name}/{place}")
        ]
        return rows, [self.pool.samples[row].prompt for row in rows[::size]]

    @cached_property
    def _groups(self) -> dict[str, list[list[int]]]:
        return self.pool.groups()

    @torch.no_grad()
    def _batch(
        self, recipe: Recipe, inputs: RolloutInputs, rows: Sequence[int], prompts: Sequence[Prompt]
    ) -> SampledBatch:
        """Read some samples, and decode and score them if needed; a non-finite sample has no score."""
        device = next(self.pipeline.denoiser.parameters()).device
        latents = self.pool.read(rows).to(device)
        final, finite = blank_nonfinite(latents), rows_are_finite(latents)
        none = final.new_empty(len(final), 0, *final.shape[1:])
        columns, features, samples = dict[str, Tensor](), None, None
        for name in self.pool.info.scores:
            values = [self.pool.samples[row].scores.get(name, torch.nan) for row in rows]
            columns[name] = torch.tensor(values, dtype=torch.float32).masked_fill(~finite.cpu(), torch.nan)
        missing = [reward for reward in self.rewards if reward.name not in self.pool.info.scores]
        if missing or recipe.features or self.keep_samples:
            decoded = self.pipeline.decode(final)
            finite, samples = finite & rows_are_finite(decoded), blank_nonfinite(decoded)
            if missing:
                table = score_finite(missing, decoded, [prompts[place] for place in inputs.prompt.tolist()], finite)
                columns |= zip([reward.name for reward in missing], table.unbind(1), strict=True)
            features = features_of_finite(recipe.features, samples, finite) if recipe.features else None
        rollout = Rollout(inputs, (), none, none, final)
        samples = samples if self.keep_samples else None
        scores = torch.stack([columns[reward.name] for reward in self.rewards], dim=1)
        return SampledBatch(rollout, samples, scores, None, features)


def pool_of(folder: str, pipeline: Pipeline, group_size: int, processes: ProcessGroup = SINGLE_PROCESS) -> Pool:
    """Open a pool for a model, with the groups that have enough samples; the main rank logs how many do not.

    Raises ValueError for a pool of another model.
    """
    if not isinstance(pipeline, EncodesSamples):
        raise ValueError(f"{type(pipeline).__name__} has no autoencoder fingerprint, which learning from a pool needs")
    pool = Pool.load(Path(folder))
    pool.require(pipeline.autoencoder, pipeline.latent_shape)
    large = pool.with_groups_of(group_size)
    every, used = (sum(map(len, one.groups().values())) for one in (pool, large))
    if used < every and processes.is_main:
        logger.warning(
            "%d of the %d groups of %s have fewer than %d samples (training.group_size), and are left out",
            *(every - used, every, folder, group_size),
        )
    return large


def require_offline(recipe: Recipe, steps: Sequence[int]) -> None:
    """Raise ValueError for a recipe that needs more about its samples than a pool contains."""
    if steps or recipe.completion:
        raise ValueError(
            "this recipe learns from the sampling steps of its own samples, which a pool does not contain: choose one"
            " that learns from final samples, such as dpo, sft, gdro or dragon"
        )
    if recipe.lag or recipe.redraw:
        raise ValueError(
            "this recipe controls how samples are drawn (by a lag, or redraws of zero-variance groups), but those of a"
            " pool exist already: choose one such as dpo, sft, gdro or dragon"
        )
