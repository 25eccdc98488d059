"""The picture of over-optimized rewards, from a made-up result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from scripts.benchmarks import pictures


def best_of(*truths: float) -> list[dict[str, Any]]:
    """The curve of the best of n with these truths, at distances of 0, 2, ..."""
    return [{"kl": 4.0 * number**2, "truth": {"mean": truth}} for number, truth in enumerate(truths)]


def test_dragon_has_a_panel_of_its_own(tmp_path: Path) -> None:
    points = [[0.0, 1.0, 0.3, 0.2, 0.4], [1.0, 2.0, 0.5, 0.4, 0.6]]
    names = ("few_pairs", "clip", "verifier", "kl", "early_stop", "dragon")
    content = {
        "curves": {name: {"91": points, "92": points} for name in names},
        "best_of_n": {"few_pairs": {"91": best_of(0.3, 0.5), "92": best_of(0.5, 0.7)}, "clip": {"91": best_of(0.3)}},
    }
    (tmp_path / "overoptimization_shapes.json").write_text(json.dumps(content))
    pictures.overoptimization(tmp_path / "overoptimization_shapes.json", tmp_path)
    figure = plt.gcf()
    legends: list[Any] = [axes.get_legend() for axes in figure.axes]
    shown = [[text.get_text() for text in legend.get_texts()] for legend in legends]
    assert shown == [["few pairs", "clip"], ["few pairs", "clip"], ["verifier", "kl", "early stop"], ["dragon"]]
    few_pairs: Any = figure.axes[0].get_lines()[0]
    assert [list(axis.round(6)) for axis in few_pairs.get_data()] == [[0.0, 2.0], [0.4, 0.6]]  # the mean of the seeds
    assert len(figure.axes[3].get_lines()) == 2 and figure.axes[3].get_xlabel() != figure.axes[1].get_xlabel()
    plt.close(figure)
    assert (tmp_path / "overoptimization.png").stat().st_size > 0
