"""The passes over a round's samples, each divided into the batches of its updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from genalign.algorithms.interfaces import UpdateBatch
from genalign.diffusion.noise import derived_seed

Batches = Mapping[int, UpdateBatch]
"""Batches of a rank by their number in the round."""


def updates_of_round(
    batches: Batches, epochs: int, updates: int, per_update: int, unit: int, seed: int
) -> Iterator[Batches]:
    """Return the batches of each update: in the order of the round, then ``epochs`` - 1 times shuffled.

    Args:
        batches: This rank's batches of the round.
        epochs: The number of passes.
        updates: The number of updates of a pass.
        per_update: The number of batches of all ranks in an update.
        unit: The number of consecutive samples that stay together.
        seed: The seed of the orders, the same on all ranks.
    """
    yield from in_order(batches, updates, per_update)
    for epoch in range(1, epochs):
        yield from shuffled(batches, updates, unit, derived_seed(seed, epoch))


def in_order(batches: Batches, updates: int, per_update: int) -> Iterator[Batches]:
    """Give each update the next ``per_update`` batches of the round, of which ``batches`` are those of this rank."""
    for update in range(updates):
        yield {number: batch for number, batch in batches.items() if number // per_update == update}


def shuffled(batches: Batches, updates: int, unit: int, seed: int) -> Iterator[Batches]:
    """Divide this rank's samples among the updates at random.

    An update has the selected samples of a batch as one batch. Ranks whose batches have equal sizes have the same
    number of samples of each batch in each update.

    Args:
        batches: The batches of the round.
        updates: The number of updates.
        unit: The number of consecutive samples that stay together.
        seed: The seed of the order, the same on all ranks.
    """
    pairs = [(number, start) for number, batch in batches.items() for start in range(0, len(batch), unit)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(derived_seed(seed, "order")))
    for part in torch.tensor_split(order, updates):
        members = [pairs[place] for place in part.tolist()]
        starts = {n: sorted(start for number, start in members if number == n) for n in batches}
        yield {
            number: batch.select(torch.cat([torch.arange(start, start + unit) for start in starts[number]]))
            for number, batch in batches.items()
            if starts[number]
        }
