"""Tables are made from result files, and stale ones are noticed."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.benchmarks.method_comparisons import at_equal_cost
from scripts.benchmarks.results_tables import fill

HEAD = {"claim": "It rises", "command": "make proofs", "machine": "2 cores", "date": "2026-01-01", "commit": "abc"}


def test_rows_and_figures(tmp_path: Path) -> None:
    row = {"name": "flow", "metric": "strict", "mean": 0.12, "low": 0.1, "high": 0.14, "n": 960}
    (tmp_path / "one.json").write_text(json.dumps({**HEAD, "kind": "gain", "rows": [row]}))
    figure = {"name": "speed", "metric": "images/s", "mean": 12.5, "low": 12.0, "high": 13.25, "n": 15}
    few = figure | {"name": "peak", "low": None, "high": None, "n": 3}
    (tmp_path / "two.json").write_text(json.dumps({**HEAD, "kind": "measurement", "rows": [figure, few]}))
    text = "a\n<!-- results:one -->\nold\n<!-- /results -->\nb\n<!-- results:two -->\n<!-- /results -->\n"
    new = fill(text, tmp_path)
    assert "| flow | strict | +0.120 | +0.100 to +0.140 | 960 |" in new
    assert (
        "| speed | images/s | 12.5 | 12 to 13.2 | 15 |" in new
        and "`make proofs`, 2 cores, 2026-01-01, commit abc." in new
    )
    assert "| peak | images/s | 12.5 | none: under 5 repeats | 3 |" in new
    assert "old" not in new and new.startswith("a\n") and fill(new, tmp_path) == new


def test_searches_by_budget(tmp_path: Path) -> None:
    best, pruning = {"2": [0.5, 0.25], "4": [0.75, 0.5]}, {"2": [0.6, 0.3], "4": [0.8, 0.5]}
    found = {
        "budgets": [2, 4],
        "tolerance": 0.05,
        "curves": {"best_of_n": best, "pruning": pruning},
        "shares": {"best_of_n": {"2": 1.0, "4": 1.0}, "pruning": {"2": 0.96, "4": 0.94}},
        "cost_of_best_of_32": {"pruning": 0.61},
        "curves.nfe": {"pruning": pruning},
        "shares.nfe": {"pruning": {"2": 0.5, "4": 1.0}},
        "cost_of_best_of_32.nfe": {"pruning": None},
    }
    (tmp_path / "one.json").write_text(json.dumps(found))
    new = fill("<!-- curves:one -->\n<!-- /curves -->\n", tmp_path)
    seconds, nfe = new.split("| search, at equal NFE | 2 | 4 | cost of best-of-32 |")
    assert "| best_of_n | 0.500 / 0.250 | 0.750 / 0.500 |  |" in seconds
    assert "| pruning | 0.600 / 0.300 | 0.800 / 0.500\\* | 61% |" in seconds
    assert "| pruning | 0.600 / 0.300\\* | 0.800 / 0.500 | not reached |" in nfe
    assert "\\* spends under 95% of the budget." in nfe


def test_live_searches(tmp_path: Path) -> None:
    row = {"search": "reno", "unit": "nfe", "budget": 8, "scores": {"selection": 0.5, "strict": 0.25}}
    cost = {"nfe": 140.0, "seconds": 0.5, "share": 0.875}
    (tmp_path / "one.json").write_text(json.dumps({"tolerance": 0.05, "live": [{**row, **cost}]}))
    new = fill("<!-- live:one -->\n<!-- /live -->\n", tmp_path)
    assert "| nfe | 8 | reno | 0.500 | 0.250 | 140 | 0.50 | 87.5%\\* |" in new


def test_methods_at_equal_cost(tmp_path: Path) -> None:
    """The better one by seconds comes first; who is ahead is said for each cost."""

    def runs(nfe: int, *ends: float) -> dict[str, list[list[float]]]:
        return {
            str(seed): [[nfe, 60.0, 0.2, 0.1, 0.3], [3 * nfe, 120.0, end, end - 0.1, end + 0.1]]
            for seed, end in enumerate(ends)
        }

    equal = at_equal_cost({"fast": runs(100, 0.4, 0.402), "slow": runs(50, 0.3, 0.302)})
    (tmp_path / "one.json").write_text(json.dumps({"equal": equal}))
    new = fill("<!-- equal:one -->\n<!-- /equal -->\n", tmp_path)
    assert "| name | strict at 120 s of training | rise | fast is ahead by | strict at 150 NFE | rise | slow is" in new
    assert "| fast | 0.401 (0.388 to 0.414) | +0.100 |  | 0.250 (0.247 to 0.253) | " in new
    assert "| slow | 0.301 (0.288 to 0.314) | +0.050 | +0.100 (+0.094 to +0.106) | 0.301 " in new


def test_predictors_of_gains_and_the_picture(tmp_path: Path) -> None:
    """The measure that orders the gains most clearly comes first, whatever its sign."""
    taus = {
        "nuisances/brightness": {"mean": -0.75, "low": -0.9, "high": -0.5},
        "accuracy/without ties": {"mean": 0.5, "low": None, "high": None},
    }
    measures = {"predictors": taus, "rewards": [{"reward": name, "seed": seed} for name in "ab" for seed in (1, 2)]}
    (tmp_path / "one.json").write_text(json.dumps({"claim": "It turns", "measures": measures}))
    new = fill("<!-- predictors:one -->\n<!-- /predictors -->\n<!-- plot:one -->\n<!-- /plot -->\n", tmp_path)
    rows = [line for line in new.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| nuisances: brightness | -0.75 (-0.90 to -0.50) |",
        "| accuracy: without ties | +0.50 (none to none) |",
    ]
    assert "over the 2 rewards, each with all of its seeds." in new
    assert "<!-- plot:one -->\n![It turns](images/overoptimization.png)\n<!-- /plot -->\n" in new


def test_a_table_that_was_not_measured_is_empty(tmp_path: Path) -> None:
    empty = "a\n<!-- results:none -->\n<!-- /results -->\nb\n<!-- plot:none -->\n<!-- /plot -->\n"
    assert fill(empty, tmp_path) == fill(empty.replace("<!-- /", "an earlier table\n<!-- /"), tmp_path) == empty
