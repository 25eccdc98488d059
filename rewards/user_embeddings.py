"""Embeddings of users from few comparisons, for a network that attends to users (PPD, arXiv 2501.06655).

The paper reads a user's comparisons with a vision-language model. Here the embedding of a user is what the samples that
the user preferred have more of than the others, in the features of a frozen encoder: no model is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.diffusion.user_attention import Users
from genalign.reward_learning.ideal_points import Comparisons
from genalign.reward_learning.users import AnnotatedPair, UserAccuracy
from rewards.backbones.clap_encoder import load_clap
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.encoders import DualEncoder

HELD_OUT = 0.2
"""The fraction of each user's comparisons by which what was learned is measured, rounded down."""


@dataclass(frozen=True)
class MeanDifferenceLearner:
    """Embeddings of users for ``model.users``: preferred less rejected samples' features, on average.

    An embedding is one token of length sqrt(width), so its numbers are around 1.

    Args:
        model: The CLIP whose embeddings are read, or with a ``sample_rate`` the CLAP.
        sample_rate: Sample rate of the sound in Hz; null for images.
    """

    model: str
    sample_rate: int | None = None

    def learn(self, comparisons: Iterable[AnnotatedPair], path: Path, known: Path | None = None) -> UserAccuracy:
        """Write the users' embeddings; the accuracy is that of the cosine with the embedding as a reward.

        Args:
            comparisons: The comparisons; their samples are read once, in order.
            path: The safetensors file for ``model.users``.
            known: A file of other users, to which these are added; its trained attention, if any, is kept.

        Raises:
            ValueError: There is no comparison, a user's samples have equal features, or the widths differ.
        """
        train, held_out = embedded_comparisons(comparisons, self.model, self.sample_rate).split(HELD_OUT, seed=0)
        difference = train.preferred - train.rejected
        embeddings = dict[str, Tensor]()
        for user in dict.fromkeys(train.annotators):
            own = difference[[row for row, name in enumerate(train.annotators) if name == user]].mean(0)
            if not float(own.norm()) > 0:
                raise ValueError(f"the samples that user {user!r} compared have equal features: compare others")
            embeddings[user] = F.normalize(own, dim=0)[None] * own.numel() ** 0.5
        projections: Mapping[str, Tensor] = {}
        everyone: Mapping[str, Tensor] = embeddings
        if known is not None:
            earlier = Users.load(known)
            everyone, projections = {**earlier.embeddings, **embeddings}, earlier.projections
        Users(everyone, projections).save(path)
        return UserAccuracy(_accuracies(embeddings, train), _accuracies(embeddings, held_out))


def _accuracies(embeddings: dict[str, Tensor], comparisons: Comparisons) -> dict[str, float]:
    """Return the share of comparisons whose preferred sample is nearer to the embedding, by user."""
    hits: dict[str, list[float]] = {}
    for row, user in enumerate(comparisons.annotators):
        margin = float(embeddings[user][0] @ (comparisons.preferred[row] - comparisons.rejected[row]))
        hits.setdefault(user, []).append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    return {user: sum(values) / len(values) for user, values in hits.items()}


def dual_encoder(model: str, sample_rate: int | None) -> DualEncoder:
    """Open the CLIP of images, or with a ``sample_rate`` in Hz the CLAP of sound."""
    return load_clip(model) if sample_rate is None else load_clap(model)


def rate_arguments(sample_rate: int | None) -> tuple[int, ...]:
    """Return what follows the samples in the call of a ``dual_encoder``."""
    return () if sample_rate is None else (sample_rate,)


@torch.no_grad()
def embedded_comparisons(comparisons: Iterable[AnnotatedPair], model: str, sample_rate: int | None) -> Comparisons:
    """Read and embed the samples and texts of comparisons, one after the other. Raises ValueError if there are none."""
    encoder, columns, names = dual_encoder(model, sample_rate), list[tuple[Tensor, Tensor, Tensor]](), list[str]()
    for comparison in comparisons:
        sides = [read()[None] for read in (comparison.preferred, comparison.rejected)]
        preferred, rejected = (
            F.normalize(encoder(side, *rate_arguments(sample_rate)).float(), dim=-1)[0] for side in sides
        )
        columns.append((preferred, rejected, encoder.text([comparison.prompt])[0]))
        names.append(comparison.annotator)
    if not columns:
        raise ValueError("there is no comparison to learn from")
    preferred, rejected, prompts = map(torch.stack, zip(*columns, strict=True))
    return Comparisons(preferred, rejected, prompts, tuple(names))
