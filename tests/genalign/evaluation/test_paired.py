"""Gains of paired evaluations: their kinds of intervals, effect sizes, and their verdicts in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from genalign.cli.train import print_gains
from genalign.evaluation.evaluate import Evaluation, SampleRecord
from genalign.evaluation.paired import compare_models, effect_sizes, gain
from genalign.metrics.intervals import mean_over_tasks
from tests.genalign.evaluation.still_pipeline import PROTOCOL


def evaluation(scores: Sequence[float]) -> Evaluation:
    """One sample of each prompt."""
    return Evaluation(
        PROTOCOL, tuple(SampleRecord(f"prompt {i}", "all", 0, i, None, {"s": v}) for i, v in enumerate(scores))
    )


def test_a_score_that_did_not_move_is_no_share() -> None:
    """Differences of 0 alone do not say that the score lies in [0, 1]: it has no interval in units of its own."""
    same = evaluation([5.1, 5.2, 5.3])
    assert not gain(same, same)["s"].has_interval
    shares = evaluation([0.0, 1.0, 1.0])
    assert gain(shares, shares)["s"].has_interval


def test_gains_of_scores_have_students_interval_and_an_effect_size() -> None:
    before, after = evaluation([1.0, 2.0, 3.0]), evaluation([2.0, 2.5, 4.5])
    assert gain(before, after)["s"] == mean_over_tasks({"all": [1.0, 0.5, 1.5]}, "score")
    assert effect_sizes(before, after)["s"] == pytest.approx(1.0 / ((1.0 + 1.75) / 2) ** 0.5)
    assert compare_models(before, after).effects == effect_sizes(before, after)


@pytest.mark.parametrize(
    ("prompts", "verdict"),
    [(3, "s: no verdict from 3 prompts, at least 20 needed"), (24, "s: a clear improvement, effect size ")],
)
def test_the_terminal_has_the_verdict_of_the_page(
    prompts: int, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = [5 + index / 10 for index in range(prompts)]
    print_gains(evaluation(scores), evaluation([score + 1 + (score > 6) / 10 for score in scores]))
    assert verdict in capsys.readouterr().out
