"""How far annotators agree, and whether one of them prefers a side."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from genalign.reward_learning.annotators import judged_units, side_choices
from genalign.reward_learning.preferences import Judgment


@dataclass(frozen=True)
class AnnotatorAnswers:
    """What one annotator answered.

    Attributes:
        annotator: The annotator's name.
        judgments: The number of judgments.
        compared: The number of pairs of samples that were compared, in all dimensions.
        ties: The number of these that were ties.
        left: The number of judgments of pairs in which the left sample was preferred.
        decided: The number of judgments of pairs that were no ties.
        one_sided: Whether nearly all were of one side, and not by chance: see ``side_choices``.
    """

    annotator: str
    judgments: int
    compared: int
    ties: int
    left: int
    decided: int
    one_sided: bool


@dataclass(frozen=True)
class AnnotatorPair:
    """How far two annotators agree on what both judged.

    Attributes:
        annotators: Their names.
        common: The number of answers to the same question, in all dimensions; of a ranking, one for each pair.
        agreed: The number of these that are equal.
        decided: The number of common answers without those that either called a tie.
        agreed_decided: The number of these that are equal.
    """

    annotators: tuple[str, str]
    common: int
    agreed: int
    decided: int
    agreed_decided: int


@dataclass(frozen=True)
class LabelAgreement:
    """The statistics of each annotator, and of each two who have judged the same."""

    annotators: tuple[AnnotatorAnswers, ...]
    pairs: tuple[AnnotatorPair, ...]


def label_agreement(judgments: Sequence[Judgment]) -> LabelAgreement:
    """Compare the annotators of judgments; where one judged the same twice, the last judgment counts for agreement."""
    by_annotator: dict[str, list[Judgment]] = defaultdict(list)
    answers: dict[str, dict[tuple[object, ...], float]] = defaultdict(dict)  # by kind, dimension and what was compared
    for judgment in judgments:
        if judgment.annotator:
            by_annotator[judgment.annotator].append(judgment)
            kind = judgment.kind if judgment.kind in ("rating", "label") else "compared"
            for dimension in judgment.scores:
                units = judged_units(judgment, dimension)
                answers[judgment.annotator] |= {(kind, dimension, *unit): value for unit, value in units}
    annotators, sides = [], {choices.annotator: choices for choices in side_choices(judgments)}
    for name, own in by_annotator.items():
        compared = [value for (kind, *_), value in answers[name].items() if kind == "compared"]
        left, decided, one_sided = 0, 0, False
        if own_sides := sides.get(name):
            decided, one_sided = own_sides.first.n, own_sides.one_sided
            left = round(own_sides.first.mean * decided)
        answered = len(own), len(compared), compared.count(0)
        annotators.append(AnnotatorAnswers(name, *answered, left, decided, one_sided))
    pairs = [_compare(two, answers[two[0]], answers[two[1]]) for two in itertools.combinations(by_annotator, 2)]
    return LabelAgreement(tuple(annotators), tuple(filter(None, pairs)))


def _compare(
    annotators: tuple[str, str],
    first: Mapping[tuple[object, ...], float],
    second: Mapping[tuple[object, ...], float],
) -> AnnotatorPair | None:
    """Compare what two annotators answered to the same questions; None where they have none in common."""
    common = [key for key in first if key in second]
    if not common:
        return None
    equal = [first[key] == second[key] for key in common]
    decided = [key[0] != "compared" or 0 not in (first[key], second[key]) for key in common]
    agreed_decided = sum(itertools.compress(equal, decided))
    return AnnotatorPair(annotators, len(common), sum(equal), sum(decided), agreed_decided)
