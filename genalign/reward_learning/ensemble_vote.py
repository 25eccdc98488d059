"""The vote of an ensemble on training pairs, of which each member has seen half of the prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from genalign.diffusion.noise import derived_seed
from genalign.reward_learning.examples import prompt_numbers
from genalign.reward_learning.label_noise import EnsembleVote, PairVotes, count_votes
from genalign.reward_learning.network import RewardNetwork
from genalign.reward_learning.objective import RewardData, RewardObjective, nothing_held_out
from genalign.reward_learning.training import RewardFit, RewardTraining


def ensemble_votes(
    build: Callable[[int], RewardNetwork],
    data: RewardData,
    objective: RewardObjective,
    fit: RewardFit,
    settings: EnsembleVote,
) -> PairVotes:
    """Train an ensemble each of whose members sees half of the prompts, and let it vote on the pairs of the others.

    Args:
        build: Builds an untrained network of so many members.
        data: Training judgments; nothing is held out.
        objective: What is minimized.
        fit: Epochs, batches and optimizer.
        settings: Number of members.

    Raises:
        ValueError: The loss is not of pairs, or all pairs have one prompt.
    """
    settings.require_pairs(objective.loss)
    pairs = data.training.pairs
    prompt = prompt_numbers(data.training.items)[pairs.rows[:, 0]] if len(pairs) else torch.empty(0)
    count = len(torch.unique(prompt))
    if count < 2:
        raise ValueError("an ensemble votes on pairs of prompts that a member has not seen: give two prompts or more")
    places = torch.unique(prompt, return_inverse=True)[1]
    seen = torch.zeros(settings.members, len(pairs), dtype=torch.bool)
    for member in range(settings.members):
        generator = torch.Generator().manual_seed(derived_seed(fit.seed, "voter", member))
        seen[member] = (torch.randperm(count, generator=generator) < (count + 1) // 2)[places]
    network = build(settings.members)
    alone, whole = RewardData(data.training, nothing_held_out(data.training), data.tokens), replace(fit, patience=None)
    training = RewardTraining(network, alone, objective, whole, [own.nonzero().squeeze(1) for own in seen])
    for _ in training.run():
        pass
    outputs = training.scores(torch.arange(len(data.training.items)))
    scores = outputs.sum(2, keepdim=True) if objective.disentangle else outputs
    leads = (scores[pairs.rows[:, 0]] - scores[pairs.rows[:, 1]]).transpose(0, 1)
    return count_votes(leads.masked_fill(seen[..., None], torch.nan), pairs)
