"""The measurements of the pathwise family, on made-up runs and a few samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genalign.algorithms.tails import Chain, RenoisedCopies
from scripts.benchmarks import reward_gradients


def _run(monkeypatch: pytest.MonkeyPatch, curve: list[tuple[float, float]]) -> None:
    """Stand in for a run whose evaluations are (clip, partial), the first before training."""
    means = [{"clip": {"mean": clip}, "partial": {"mean": partial}} for clip, partial in curve]
    start = SimpleNamespace(overall={name: SimpleNamespace(**one) for name, one in means[0].items()})
    rows: list[dict[str, Any]] = [{"held_out": one} for one in means[1:]]
    monkeypatch.setattr(reward_gradients, "load_evaluation", lambda folder: start)
    monkeypatch.setattr(reward_gradients, "metrics", lambda run: [{"held_out": {}}, *rows])


def test_partial_credit_is_read_where_the_reward_has_risen(monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, [(0.50, 0.6), (0.54, 0.58), (0.58, 0.50), (0.60, 0.2)])
    start, there = reward_gradients.at_rise(Path("run"))
    assert start == 0.6 and there == pytest.approx(0.56)  # a quarter of the way from 0.58 to 0.50


def test_a_run_that_never_rises_so_far_counts_by_its_last_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    _run(monkeypatch, [(0.50, 0.6), (0.54, 0.58), (0.51, 0.57)])
    assert reward_gradients.at_rise(Path("run")) == (0.6, 0.57)


@pytest.mark.slow
def test_the_gradient_grows_with_the_moves_that_it_runs_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_gradients, "GROWTH_SAMPLES", 3)
    one, narrow = reward_gradients.gradients(Chain(), 1)
    assert reward_gradients.gradients(Chain(), 4)[0] > one > 0 < narrow
    assert reward_gradients.gradients(RenoisedCopies(2), 1)[1] > 0
