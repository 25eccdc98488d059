"""Pairs of items and their truth as a reward is measured on them, from what judgments say in one dimension."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from genalign.reward_learning.examples import Examples, prompt_numbers
from genalign.reward_learning.pair_measures import Votes
from genalign.runtime.text_files import read_json

TRAINING_ITEMS = "training_items.json"
"""The file beside a trained reward that lists what it was trained on: [{"digest": ..., "prompt": ...}, ...]."""

_Pair = tuple[int, int]


@dataclass(frozen=True)
class EvaluatedPairs:
    """N distinct pairs of items of one prompt.

    Attributes:
        rows: The numbers (N, 2) long of the items, the lower first.
        preferred: The share (N,) of the preference for the first item: the mean over judgments, 1/2 for a tie.
        margin: How far (N,) the two are apart: the difference of ratings or of places in a ranking, and of the shares
            of the annotators.
    """

    rows: Tensor
    preferred: Tensor
    margin: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def item_grades(examples: Examples, dimension: str) -> Tensor:
    """Average the grades (n,) of each item in a dimension, float64; NaN for an item without."""
    values = examples.grades.values[:, examples.dimensions.index(dimension)].double()
    graded = ~values.isnan()
    rows, count = examples.grades.rows[graded], len(examples.items)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, rows, values[graded])
    return sums / torch.bincount(rows, minlength=count)


def pairs_of_values(values: Tensor, prompt: Tensor) -> EvaluatedPairs:
    """Pair all items of a prompt that have values (n,), such as mean ratings: the larger one is preferred."""
    groups = defaultdict[int, list[int]](list)
    for row in (~values.isnan()).nonzero()[:, 0].tolist():
        groups[int(prompt[row])].append(row)
    rows = torch.tensor([pair for group in groups.values() for pair in combinations(group, 2)], dtype=torch.long)
    rows = rows.reshape(-1, 2)
    gaps = values[rows[:, 0]].double() - values[rows[:, 1]].double()
    return EvaluatedPairs(rows, (1 + gaps.sign()) / 2, gaps.abs())


def judged_pairs(examples: Examples, dimension: str) -> EvaluatedPairs:
    """Return the distinct pairs that were judged in a dimension; else, all pairs of a prompt's graded items."""
    judgments = _pair_judgments(examples, dimension)
    if not judgments:
        return pairs_of_values(item_grades(examples, dimension), prompt_numbers(examples.items))
    by_pair = defaultdict[_Pair, list[tuple[float, float]]](list)
    for pair, preferred, gap, _ in judgments:
        by_pair[pair].append((preferred, gap))
    means = [[math.fsum(side) / len(side) for side in zip(*own, strict=True)] for own in by_pair.values()]
    shares, leads = torch.tensor(means, dtype=torch.float64).unbind(1)
    return EvaluatedPairs(torch.tensor(list(by_pair), dtype=torch.long), shares, leads.abs())


def _pair_judgments(examples: Examples, dimension: str) -> list[tuple[_Pair, float, float, str]]:
    """The judged pairs with the lower item first: items, preference for the first, its lead, and the annotator."""
    pairs, column = examples.pairs, examples.dimensions.index(dimension)
    judged = list[tuple[_Pair, float, float, str]]()
    shares, leads = pairs.preferred[:, column].tolist(), pairs.difference[:, column].tolist()
    for (first, second), share, gap, name in zip(pairs.rows.tolist(), shares, leads, pairs.annotators, strict=True):
        if not math.isnan(gap):
            ordered = first < second
            pair = (first, second) if ordered else (second, first)
            judged.append((pair, share if ordered else 1 - share, gap if ordered else -gap, name))
    return judged


def annotator_votes(examples: Examples, dimension: str, pairs: EvaluatedPairs) -> Votes:
    """Return what named annotators preferred in ``pairs``; by an annotator's own grades where pairs were not judged.

    Several judgments of a pair by one annotator are averaged.
    """
    places = {tuple(row): place for place, row in enumerate(pairs.rows.tolist())}
    votes = defaultdict[tuple[int, str], list[float]](list)
    judgments = _pair_judgments(examples, dimension)
    for pair, preferred, _, name in judgments:
        votes[places[pair], name].append(preferred)
    if not judgments:
        grades, column = examples.grades, examples.dimensions.index(dimension)
        own = defaultdict[tuple[str, str], dict[int, float]](dict)
        values = grades.values[:, column].tolist()
        for row, value, name in zip(grades.rows.tolist(), values, grades.annotators, strict=True):
            if not math.isnan(value):
                own[name, examples.items[row].prompt.text][row] = value
        for (name, _), graded in own.items():
            for first, second in combinations(sorted(graded), 2):
                lead = graded[first] - graded[second]
                votes[places[first, second], name].append(0.5 if lead == 0 else float(lead > 0))
    named = {key: shares for key, shares in votes.items() if key[1]}
    return Votes(
        torch.tensor([pair for pair, _ in named], dtype=torch.long),
        torch.tensor([math.fsum(shares) / len(shares) for shares in named.values()], dtype=torch.float64),
        tuple(name for _, name in named),
    )


def win_shares(pairs: EvaluatedPairs, prompt: Tensor) -> Tensor:
    """Compute the share (n,) of its prompt's other items that each item is preferred to, a tie as half.

    NaN for the items of a prompt whose items were not all compared with each other, and of one with fewer than three.
    ``prompt`` (n,) are the numbers of the items' prompts.
    """
    count = len(prompt)
    wins, comparisons = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for side, preferred in ((0, pairs.preferred), (1, 1 - pairs.preferred)):
        wins.index_add_(0, pairs.rows[:, side], preferred.double())
        comparisons.index_add_(0, pairs.rows[:, side], torch.ones(len(pairs), dtype=torch.float64))
    others = torch.bincount(prompt)[prompt] - 1
    incomplete = torch.zeros(int(prompt.max()) + 1).index_add_(0, prompt, (comparisons != others).float())[prompt] > 0
    return (wins / others).masked_fill(incomplete | (others < 2), torch.nan)


def wins_over_several(pairs: EvaluatedPairs, prompt: Tensor) -> list[list[int]]:
    """Group pairs by the item that was preferred: the numbers of the pairs that an item won, two or more of them.

    Only of prompts whose items were not all compared with each other, as where one winner stands against several
    others; of the rest, ``win_shares`` say which item is the best. ``prompt`` (n,) are the numbers of the items'
    prompts.
    """
    incomplete, won = win_shares(pairs, prompt).isnan().tolist(), defaultdict[int, list[int]](list)
    for place, ((first, second), share) in enumerate(zip(pairs.rows.tolist(), pairs.preferred.tolist(), strict=True)):
        if share != 0.5 and incomplete[first]:
            won[first if share > 0.5 else second].append(place)
    return [places for places in won.values() if len(places) > 1]


def training_items(path: Path) -> frozenset[str]:
    """Read the digests of the items that a reward was trained on.

    Args:
        path: The list, or the trained reward's folder or a file in it that has the list beside it.

    Raises:
        FileNotFoundError: There is no list.
        ValueError: It is no list of objects with a digest.
    """
    if path.suffix != ".json":
        path = (path if path.is_dir() else path.parent) / TRAINING_ITEMS
    listed = read_json(path)
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) and "digest" in entry for entry in listed):
        example = json.dumps([{"digest": "<SHA-256 of the file>", "prompt": "a red cube"}])
        raise ValueError(f"{path} lists no items: expected {example}")
    return frozenset(str(entry["digest"]) for entry in listed)
