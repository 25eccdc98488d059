"""The Laplace approximation of the last layer of a trained reward network."""

from __future__ import annotations

import torch

from genalign.reward_learning.examples import Examples
from genalign.reward_learning.objective import RewardObjective
from genalign.reward_learning.preference_losses import PairLoss
from genalign.reward_learning.training import CHUNK, RewardTraining
from genalign.reward_learning.uncertainty import LaplacePosterior, LastLayerLaplace, PairFeatures, fit_laplace


def require_laplace(settings: LastLayerLaplace, objective: RewardObjective, held_out: Examples, members: int) -> None:
    """Raise ValueError for an ensemble, a loss of grades, nuisances, or a precision by held-out pairs without any."""
    if members > 1 or not isinstance(objective.loss, PairLoss) or objective.disentangle:
        raise ValueError(
            "LastLayerLaplace is of one member that learns from pairs, without nuisances: an ensemble has its deviation"
        )
    if settings.precision == "held-out" and bool(held_out.pairs.preferred.isnan().all(0).any()):
        raise ValueError('LastLayerLaplace(precision="held-out") needs held-out pairs: hold out more prompts')


@torch.no_grad()
def laplace_posteriors(training: RewardTraining, settings: LastLayerLaplace) -> list[LaplacePosterior]:
    """Approximate the posterior of the last layer of a trained network with one member, for each dimension.

    Raises ValueError as ``require_laplace`` does.
    """
    data = training.data
    require_laplace(settings, training.objective, data.held_out, len(training.members))
    head, offset = training.members[0].head, len(data.training.items)
    every = torch.arange(offset + len(data.held_out.items))
    parts = [
        head.features(training.network.standardized(data.tokens.tokens(p))).cpu() for p in torch.split(every, CHUNK)
    ]
    features, posteriors = torch.cat(parts), list[LaplacePosterior]()
    for column in range(len(data.training.dimensions)):
        pair_features = []
        for examples, first in ((data.training, 0), (data.held_out, offset)):
            preferred = examples.pairs.preferred[:, column]
            judged = ~preferred.isnan()
            left, right = (examples.pairs.rows[judged] + first).unbind(1)
            pair_features.append(PairFeatures(features[left] - features[right], preferred[judged]))
        weights, center = head.last.weight[column].cpu(), features[:offset].mean(0)
        posteriors.append(fit_laplace(settings, weights, center, *pair_features))
    return posteriors
