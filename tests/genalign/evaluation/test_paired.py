"""Gains of paired evaluations: their kinds of intervals, effect sizes, and their verdicts in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from genalign.cli.training_run import print_gains
from genalign.evaluation.evaluate import Evaluation, SampleRecord
from genalign.evaluation.paired import (
    compare_models,
    effect_sizes,
    gain,
    gain_record,
    gallery_improvements,
    pairs_by_gain,
)
from genalign.evaluation.scorers import RECOGNIZED
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


def judged(rows: Sequence[tuple[float, bool | None]]) -> Evaluation:
    """One sample of each prompt, with its strict score and whether the verifier recognizes everything in it."""
    records = []
    for i, (score, recognized) in enumerate(rows):
        details = {} if recognized is None else {"strict": {RECOGNIZED: recognized}}
        scores = {"strict": score, "partial": 0.5 + score / 2 - i / 1000}
        records.append(SampleRecord(f"prompt {i}", "ab"[i % 2], 0, i, None, scores, details))
    return Evaluation(PROTOCOL, tuple(records))


def test_pairs_that_turn_right_are_told_apart_by_what_was_there_before() -> None:
    """Two colors corrected, noise removed, one correct before, one still wrong, and one that becomes wrong."""
    before = judged([(0, True), (0, True), (0, False), (1, True), (0, True), (1, True)])
    after = judged([(1, True), (1, True), (1, True), (1, True), (0, True), (0, True)])
    record = gain_record(before, after)
    assert record["newly_correct"] == {"pairs": 3, "recognized_before": 2, "share": pytest.approx(2 / 3)}
    assert record["gain"]["strict"]["mean"] == pytest.approx(1 / 3) and set(record["tasks"]) == {"a", "b"}
    assert gain_record(after, after)["newly_correct"] == {"pairs": 0, "recognized_before": 0, "share": None}
    silent = judged([(0, None), (0, None)])
    assert gain_record(silent, judged([(1, None), (1, None)]))["newly_correct"] is None


def test_a_gallery_shows_content_put_right_first_in_an_order_that_nobody_selects() -> None:
    """The order of the first does not follow the gains, which fall with the number of the prompt."""
    before = judged([(0, i >= 5) for i in range(20)])
    after = judged([(1, True)] * 20)
    for pair in pairs_by_gain(before, after):
        assert pair.became_correct and pair.content_repaired == (pair.before.seed >= 5)
    drawn = [pair.before.seed for pair in gallery_improvements(pairs_by_gain(before, after))]
    assert sorted(drawn[:15]) == [*range(5, 20)] and drawn[:15] != sorted(drawn[:15])
    again = gallery_improvements(tuple(reversed(pairs_by_gain(before, after))))
    assert [pair.before.seed for pair in again][:15] == drawn[:15]  # whatever the gains are
    assert gallery_improvements(pairs_by_gain(after, before)) == []


def test_the_last_lines_name_the_tasks_that_gained_and_the_samples_that_became_correct(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Task a gains on all 20 prompts, task b on 2 of 20, an interval with 0 in it."""
    before = judged([(0, i != 0) for i in range(40)])
    print_gains(before, judged([(float(i % 2 == 0 or i < 4), True) for i in range(40)]))
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0] == "strict: the interval of the gain is above 0 in 1 of 2 tasks (a)"
    assert lines[1].startswith("of the 22 samples that became correct, 21 (95.5 %) had nothing unknown to the")
    print_gains(evaluation([0.0, 1.0]), evaluation([1.0, 1.0]))  # one task, and no verifier
    assert "in 1 of" not in (text := capsys.readouterr().out) and "became correct" not in text
