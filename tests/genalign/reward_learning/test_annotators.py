"""Sides that annotators choose, and their agreement: Krippendorff's own example, and tables by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from genalign.reward_learning.annotators import agreement, krippendorff_alpha, side_choices
from genalign.reward_learning.preferences import JudgedSample, Judgment, Kind
from genalign.types import Prompt

_N = math.nan
KRIPPENDORFF = [  # of four observers, twelve units; section C of Computing Krippendorff's Alpha
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _N, _N, _N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _N, 3],
    [_N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _N],
]


def _judgment(annotator: str | None, prompt: str, scores: Sequence[float], kind: Kind = "pair") -> Judgment:
    samples = tuple(JudgedSample(Path(f"{prompt}-{place}.png")) for place in range(len(scores)))
    return Judgment(Prompt(prompt), samples, kind, {"overall": tuple(scores)}, annotator)


def test_alpha_of_krippendorffs_example() -> None:
    units = [[value for value in unit if not math.isnan(value)] for unit in zip(*KRIPPENDORFF, strict=True)]
    assert krippendorff_alpha(units, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, "interval") == pytest.approx(0.849, abs=5e-4)
    assert math.isnan(krippendorff_alpha([[1], []], "nominal")) and math.isnan(krippendorff_alpha([[1, 1]], "interval"))


def test_an_annotator_who_always_chooses_one_side_is_named() -> None:
    left = [_judgment("ada", f"p{number}", (1, 0)) for number in range(19)]
    assert not side_choices(left)[0].one_sided  # too few pairs to tell
    left += [_judgment("ada", "p19", (0, 1)), _judgment("ada", "p20", (0.5, 0.5))]
    right = [_judgment("bob", f"p{number}", (0, 1)) for number in range(40)]
    fair = [_judgment("cy", f"p{number}", (number % 2, 1 - number % 2)) for number in range(40)]
    unnamed = [_judgment(None, f"p{number}", (1, 0)) for number in range(40)]
    ada, bob, cy = side_choices([*left, *right, *fair, *unnamed])
    assert ada.one_sided and bob.one_sided and not cy.one_sided
    assert (ada.first.mean, ada.first.n) == (0.95, 20)  # the tie does not count
    assert ada.p_value == pytest.approx(2 * (20 + 1) / 2**20)
    assert str(ada).startswith("annotator 'ada' chose the left sample in 19 of 20 decided pairs (p = 4e-05)")
    assert "chose the right sample in 40 of 40" in str(bob) and cy.p_value == 1
    assert side_choices([replace(judgment, shown=None) for judgment in right]) == []  # the sides are not known
    style = [replace(judgment, scores={"style": judgment.overall()}) for judgment in right]
    assert side_choices([*right, *style]) == [bob]  # a pair counts once, in however many judgments its dimensions are


def test_agreement_about_pairs_in_any_order() -> None:
    ada = [_judgment("ada", prompt, scores) for prompt, scores in [("a", (1, 0)), ("b", (1, 0)), ("c", (0.5, 0.5))]]
    bob = [_judgment("bob", prompt, scores) for prompt, scores in [("a", (1, 0)), ("b", (0, 1)), ("c", (0.5, 0.5))]]
    bob = [Judgment(j.prompt, j.samples[::-1], j.kind, {"overall": j.scores["overall"][::-1]}, "bob") for j in bob]
    alone = [_judgment("cy", "d", (1, 0)), _judgment(None, "a", (0, 1))]
    (result,) = agreement([*ada, *bob, *alone])
    assert (result.kind, result.annotators, result.judged) == ("pair", ("ada", "bob"), 3)
    assert result.raw.mean == pytest.approx(2 / 3) and 0 < result.raw.low < result.raw.high < 1
    # values 1, 1 | 1, -1 | 0, 0: observed 2 / 6, expected (36 - 9 - 1 - 4) / 30
    assert result.alpha.mean == pytest.approx(1 - (2 / 6) / (22 / 30))
    assert result.alpha.low < result.alpha.mean < result.alpha.high and result.alpha.n == 3


def test_rankings_are_compared_by_their_pairs_and_ratings_by_differences() -> None:
    rankings = [_judgment("ada", "a", (3, 2, 1), "ranking"), _judgment("bob", "a", (3, 1, 2), "ranking")]
    ratings = [
        _judgment(name, prompt, (value,), "rating")
        for name, values in (("ada", (1, 3, 5)), ("bob", (2, 3, 4)))
        for prompt, value in zip("abc", values, strict=True)
    ]
    pairs, rated = agreement([*rankings, *ratings])
    assert (pairs.kind, pairs.judged, rated.kind, rated.judged) == ("pair", 3, "rating", 3)
    assert pairs.raw.mean == pytest.approx(2 / 3) and rated.raw.mean == pytest.approx(1 / 3)
    assert rated.alpha.mean == pytest.approx(krippendorff_alpha([[1, 2], [3, 3], [5, 4]], "interval"))
    assert agreement([_judgment("ada", "a", (1, 0))]) == []
    assert math.isinf(pairs.alpha.high)  # one prompt gives no interval


def test_a_full_agreement_is_one() -> None:
    judgments = [
        _judgment(name, f"p{number}", (number % 2, 1 - number % 2)) for name in ("ada", "bob") for number in range(10)
    ]
    (result,) = agreement(judgments)
    assert result.raw.mean == 1 and result.alpha.mean == 1 and result.raw.low < 1
