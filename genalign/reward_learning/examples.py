"""Judgments as a reward model learns from them: pairs and grades of distinct items, a sample with its prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.reward_learning.preferences import JudgedSample, Judgment, Kind
from genalign.types import Prompt


@dataclass(frozen=True)
class Item:
    """A sample with the prompt that it was judged for, and the digest of the sample's file."""

    prompt: Prompt
    sample: JudgedSample
    digest: str


def prompt_numbers(items: Sequence[Item]) -> Tensor:
    """Number the prompts (n,) of items in order of first appearance; prompts are the same if their texts are."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(item.prompt.text, len(numbers)) for item in items], dtype=torch.long)


@dataclass(frozen=True)
class Pairs:
    """N pairs of items, judged in K dimensions.

    Attributes:
        rows: The numbers (N, 2) long of the items, in the order in which they were shown.
        preferred: The share (N, K) of the preference for the first item: 1, 0, 0.5 for a tie; NaN where a dimension
            was not judged.
        difference: The first item's score less the second's (N, K), as they were judged; NaN likewise.
        annotators: Who judged (N); "" where the data do not say.
    """

    rows: Tensor
    preferred: Tensor
    difference: Tensor
    annotators: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Sequence[int]) -> Pairs:
        """Select pairs by their numbers ``index``, in that order."""
        at = torch.tensor(list(index), dtype=torch.long)
        names = tuple(self.annotators[place] for place in index)
        return Pairs(self.rows[at], self.preferred[at], self.difference[at], names)


@dataclass(frozen=True)
class Grades:
    """N grades or labels of single items, in K dimensions.

    Attributes:
        rows: The numbers (N,) long of the items.
        values: The grades (N, K); NaN where a dimension was not judged.
        annotators: Who judged (N); "" where the data do not say.
    """

    rows: Tensor
    values: Tensor
    annotators: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Sequence[int]) -> Grades:
        """Select grades by their numbers ``index``, in that order."""
        at = torch.tensor(list(index), dtype=torch.long)
        return Grades(self.rows[at], self.values[at], tuple(self.annotators[place] for place in index))


@dataclass(frozen=True)
class Examples:
    """What judgments say: pairs, and grades, of distinct items, in named dimensions.

    Attributes:
        items: The distinct items.
        dimensions: The names (K) of the dimensions.
        pairs: Pairs, of judgments of the kinds "pair" and "ranking".
        grades: Grades, of judgments of the kinds "rating" and "label".
    """

    items: tuple[Item, ...]
    dimensions: tuple[str, ...]
    pairs: Pairs
    grades: Grades

    def of_dimensions(self, dimensions: Sequence[str]) -> Examples:
        """Return the same examples in these dimensions, NaN in those that none was judged in."""

        def columns(values: Tensor) -> Tensor:
            own = dict(zip(self.dimensions, values.unbind(1), strict=True))
            missing = values.new_full((len(values),), torch.nan)
            return torch.stack([own.get(name, missing) for name in dimensions], dim=1)

        pairs, grades = self.pairs, self.grades
        return Examples(
            self.items,
            tuple(dimensions),
            replace(pairs, preferred=columns(pairs.preferred), difference=columns(pairs.difference)),
            replace(grades, values=columns(grades.values)),
        )


def examples(judgments: Sequence[Judgment], dimensions: Sequence[str] = ()) -> Examples:
    """Turn judgments into pairs and grades of distinct items; a ranking becomes all pairs of its samples.

    Args:
        judgments: Judgments with scores.
        dimensions: The dimensions to learn; by default all, in order of first appearance.

    Raises:
        ValueError: A judgment has no scores, its samples have equal files, no judgment has one of the dimensions, or
            ratings and labels are mixed.
    """
    names = tuple(dimensions) or tuple(dict.fromkeys(name for judgment in judgments for name in judgment.scores))
    _require_learnable(judgments, names)
    items: dict[tuple[str, str], Item] = {}
    places: dict[tuple[str, str], int] = {}
    pairs, grades = list[tuple[int, int, list[float], Kind, str]](), list[tuple[int, list[float], str]]()
    for judgment in map(Judgment.in_shown_order, judgments):
        rows, own_items = [], [Item(judgment.prompt, sample, sample.digest()) for sample in judgment.samples]
        if len({item.digest for item in own_items}) < len(own_items):
            raise ValueError(f"the samples of a judgment of {judgment.prompt.text!r} have equal files: leave it out")
        for item in own_items:
            key = (item.prompt.text, item.digest)
            items.setdefault(key, item)
            rows.append(places.setdefault(key, len(places)))
        scores = [judgment.scores.get(name, (math.nan,) * len(rows)) for name in names]
        judged, annotator = list(zip(rows, zip(*scores, strict=True), strict=True)), judgment.annotator or ""
        if judgment.kind in ("rating", "label"):
            grades += [(row, list(own), annotator) for row, own in judged]
        else:
            for (row, first), (other, second) in itertools.combinations(judged, 2):
                gaps = [a - b for a, b in zip(first, second, strict=True)]
                pairs.append((row, other, gaps, judgment.kind, annotator))
    return Examples(
        tuple(items.values()),
        names,
        _pairs(pairs, len(names)),
        Grades(
            torch.tensor([row for row, *_ in grades], dtype=torch.long),
            _matrix((values for _, values, _ in grades), len(names)),
            tuple(annotator for *_, annotator in grades),
        ),
    )


def _require_learnable(judgments: Sequence[Judgment], names: Sequence[str]) -> None:
    """Raise ValueError where judgments have no scores, none in a dimension, or are ratings beside labels."""
    for name in names or ("",):
        if not any(name in judgment.scores for judgment in judgments):
            raise ValueError(f"no judgment has the dimension {name!r}" if name else "no judgment has a score")
    if {"rating", "label"} <= {judgment.kind for judgment in judgments}:
        raise ValueError("the judgments mix ratings, on a scale, with labels, of 0 and 1: train a reward of each")
    if unscored := next((judgment for judgment in judgments if not judgment.scores), None):
        raise ValueError(f"a judgment of {unscored.prompt.text!r} has no scores: judge it first")


def _pairs(pairs: Sequence[tuple[int, int, list[float], Kind, str]], width: int) -> Pairs:
    """Make tensors of pairs in ``width`` dimensions: two items, how far the first leads, the kind and the annotator."""
    difference = _matrix((gaps for _, _, gaps, _, _ in pairs), width)
    ranked = torch.tensor([kind == "ranking" for *_, kind, _ in pairs], dtype=torch.bool)
    lead = torch.where(ranked[:, None], difference.sign(), difference)
    return Pairs(
        torch.tensor([pair[:2] for pair in pairs], dtype=torch.long).reshape(-1, 2),
        ((1 + lead) / 2).masked_fill(difference.isnan(), math.nan),
        difference,
        tuple(annotator for *_, annotator in pairs),
    )


def _matrix(rows: Iterable[Sequence[float]], width: int) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.float32).reshape(-1, width)


def split_by_prompt(judgments: Sequence[Judgment], fraction: float, seed: int) -> tuple[list[Judgment], list[Judgment]]:
    """Hold out the judgments of a ``fraction`` of the prompts, drawn by ``seed``: (the rest, these).

    All judgments of a prompt are on one side. Where there are two prompts or more, at least one is on each, unless the
    fraction is 0.
    """
    texts = list(dict.fromkeys(judgment.prompt.text for judgment in judgments))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(derived_seed(seed, "held-out prompts")))
    count = min(max(1, round(fraction * len(texts))), len(texts) - 1) if fraction else 0
    held_out = {texts[place] for place in order[:count].tolist()}
    rest = [judgment for judgment in judgments if judgment.prompt.text not in held_out]
    return rest, [judgment for judgment in judgments if judgment.prompt.text in held_out]
