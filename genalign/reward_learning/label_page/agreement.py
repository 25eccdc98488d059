"""How far annotators agree, and whether one of them prefers a side."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
    for judgment in judgments:
        if judgment.annotator:
            by_annotator[judgment.annotator].append(judgment)
    answers = {name: dict(itertools.chain(*map(_answers, own))) for name, own in by_annotator.items()}
    annotators, sides = [], {choices.annotator: choices for choices in side_choices(judgments)}
    for name, own in by_annotator.items():
        compared = [value for (kind, *_), value in answers[name].items() if kind == "compared"]
        left, decided, one_sided = 0, 0, False
        if own_sides := sides.get(name):
            decided, one_sided = own_sides.first.n, own_sides.one_sided
            left = round(own_sides.first.mean * decided)
        answered = len(own), len(compared), compared.count(0)
        annotators.append(AnnotatorAnswers(name, *answered, left, decided, one_sided))
    agreements = []
    for first, second in itertools.combinations(by_annotator, 2):
        common = [key for key in answers[first] if key in answers[second]]
        equal = [answers[first][key] == answers[second][key] for key in common]
        decided_keys = [key[0] != "compared" or 0 not in (answers[first][key], answers[second][key]) for key in common]
        agreed_decided = sum(itertools.compress(equal, decided_keys))
        if common:
            pair = AnnotatorPair((first, second), len(common), sum(equal), sum(decided_keys), agreed_decided)
            agreements.append(pair)
    return LabelAgreement(tuple(annotators), tuple(agreements))


def _answers(judgment: Judgment) -> Iterator[tuple[tuple[object, ...], float]]:
    """The answers of a judgment in all dimensions: of two samples who wins, or the grade of each sample."""
    kind = judgment.kind if judgment.kind in ("rating", "label") else "compared"
    for dimension in judgment.scores:
        yield from (((kind, dimension, *unit), value) for unit, value in judged_units(judgment, dimension))
