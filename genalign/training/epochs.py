"""The passes over a round's samples, each divided into the batches of its updates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from genalign.algorithms.interfaces import UpdateBatch
from genalign.diffusion.noise import derived_seed

Batches = Mapping[int, UpdateBatch]
"""Batches of a rank by their number in the round."""


def updates_of_round(
    batches: Batches, sizes: Sequence[int], updates: int, epochs: int, unit: int, seed: int
) -> Iterator[Batches]:
    """Return this rank's part of each update: first in the order of the round, then shuffled ``epochs`` - 1 times.

    Args:
        batches: This rank's batches of the round.
        sizes: The sizes of all ranks' batches, in order.
        updates: The number of updates of a pass.
        epochs: The number of passes.
        unit: The number of consecutive samples that stay together.
        seed: The seed of the orders, the same on all ranks.
    """
    per_update = len(sizes) // updates
    for update in range(updates):
        yield {number: batch for number, batch in batches.items() if number // per_update == update}
    for epoch in range(1, epochs):
        yield from shuffled(batches, sizes, updates, unit, derived_seed(seed, epoch))


def shuffled(batches: Batches, sizes: Sequence[int], updates: int, unit: int, seed: int) -> Iterator[Batches]:
    """Divide the samples of a round among the updates at random, the same way for any number of ranks.

    A rank's part of an update is the samples of its own batches that fall into the update. The arguments are those of
    ``updates_of_round``.
    """
    starts = [0, *itertools.accumulate(sizes)]
    order = torch.randperm(starts[-1] // unit, generator=torch.Generator().manual_seed(seed))
    for part in torch.tensor_split(order, updates):
        rows = (part.sort().values[:, None] * unit + torch.arange(unit)).flatten()  # in the round
        selected = {
            number: rows[(rows >= starts[number]) & (rows < starts[number + 1])] - starts[number] for number in batches
        }
        yield {number: batch.select(selected[number]) for number, batch in batches.items() if len(selected[number])}
