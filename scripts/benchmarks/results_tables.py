"""Write the tables of README.md and docs/*.md from docs/results/*.json.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->``; that of a comparison's runs between
``<!-- standings:NAME -->`` and ``<!-- /standings -->``, their standings at equal NFE and equal seconds between
``<!-- equal:NAME -->`` and ``<!-- /equal -->``, that of searches by budget between ``<!-- curves:NAME -->`` and
``<!-- /curves -->``, that of strategies at equal cost between ``<!-- steering:NAME -->`` and ``<!-- /steering -->``,
that of win rates between ``<!-- wins:NAME -->`` and ``<!-- /wins -->``, and that of reward guards between
``<!-- guards:NAME -->`` and ``<!-- /guards -->``. With ``--check`` nothing is written, and the exit status is 1 where a
table is stale.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genalign.metrics.intervals import MIN_REPEATS

ROOT = Path(__file__).parents[2]
MARKED = re.compile(
    r"(?P<begin><!-- (?P<kind>results|standings|equal|curves|steering|wins|guards):(?P<name>\w+) -->\n)"
    r".*?(?P<end><!-- /(?P=kind) -->)",
    re.DOTALL,
)


def table(result: dict[str, Any]) -> str:
    """A result file as Markdown: its rows, and how they were made."""
    measured = result["kind"] == "measurement"
    heading = "value | 95% interval | repeats" if measured else "gain | 95% interval | prompts or runs"
    lines = [f"| name | metric | {heading} |", "|---|---|---|---|---|"]
    form, none = (".3g", f"none: under {MIN_REPEATS} repeats") if measured else ("+.3f", "none: a task of one prompt")
    for row in result["rows"]:
        interval = none if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}"
        lines.append(f"| {row['name']} | {row['metric']} | {row['mean']:{form}} | {interval} | {row['n']} |")
    rendered = (
        f"{result['claim']}. `{result['command']}`, {result['machine']}, {result['date']}, commit {result['commit']}."
    )
    return "\n".join([*lines, "", rendered, ""])


def standings(result: dict[str, Any]) -> str:
    """The runs of a comparison, the best first, with what else was read off them."""
    tasks = list(result["standings"][0]["tasks"])
    heading = ["name", "seeds", "strict", "partial", *tasks, "KL", "color entropy", "minutes", "NFE"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for row in result["standings"]:
        gains = [row["gain"], row["scores"]["partial"], *(row["tasks"][task] for task in tasks)]
        cells = [row["name"], str(row["seeds"]), *(f"{gain:+.3f}" for gain in gains), f"{row['kl']:.1e}"]
        cells += [
            f"{row['diversity']['color']:+.3f}",
            f"{row['minutes']:.1f}",
            f"{row.get('nfe', row.get('forwards')):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def equal(result: dict[str, Any]) -> str:
    """The methods at equal seconds of training, best first, and beside that at equal NFE."""
    costs = {"seconds": "{:.0f} s of training", "nfe": "{:.0f} NFE"}
    heading, columns = ["name"], {}
    for cost, words in costs.items():
        rows = result["equal"][cost]["recipes"]
        best = rows[0]["name"]
        behind = {row["second"]: row["words"] for row in result["equal"][cost]["differences"] if row["first"] == best}
        heading += [f"strict at {words.format(result['equal'][cost]['budget'])}", "rise", f"{best} is ahead by"]
        for row in rows:
            score, rise = row["score"], row["rise"]
            cells = [_interval(score, ".3f"), f"{rise['mean']:+.3f}", behind.get(row["name"], "")]
            columns.setdefault(row["name"], []).extend(cells)
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    lines += [f"| {' | '.join([name, *cells])} |" for name, cells in columns.items()]
    note = "Intervals are over seeds; the rise is that over the last quarter of the budget."
    return "\n".join([*lines, "", note, ""])


def curves(result: dict[str, Any]) -> str:
    """Tabulate searches by budget, in units of the cost of an image: selection reward / verifier's strict score.

    The last columns give the cost at which pruning reaches the selection reward of best-of-32, as a fraction of the
    cost of best-of-32 in seconds and in NFE.
    """
    heading = ["search", *map(str, result["budgets"]), "seconds of best-of-32", "NFE of best-of-32"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for name, by_budget in result["curves"].items():
        cells = [f"{selection:.3f} / {strict:.3f}" for selection, strict in by_budget.values()]
        for shares in (result["cost_of_best_of_32"], result["forwards_of_best_of_32"]):
            share = shares.get(name)
            cells.append("" if name not in shares else "not reached" if share is None else f"{share:.0%}")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*lines, ""])


def steering(result: dict[str, Any]) -> str:
    """Tabulate strategies at equal cost: the scores of the samples they chose, what they spent, and their settings."""
    heading = ["searched", "search", "budget", "searched reward", "strict", "clip", "size", "NFE", "of the budget"]
    heading += ["seconds", "settings"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    least = 1 - result["tolerance"]
    for row in result["steering"]:
        scores, reward = row["scores"], row["reward"]
        judges = ["" if name == reward or name not in scores else f"{scores[name]:.3f}" for name in ("strict", "clip")]
        share = f"{row['share']:.1%}" + ("\\*" if row["share"] < least else "")
        cells = [reward, row["arm"], str(row["budget"]), f"{scores[reward]:.3f}", *judges, f"{row['size']:.2f}"]
        cells += [f"{row['nfe']:.0f}", share, f"{row['seconds']:.2f}", row["setting"]]
        lines.append(f"| {' | '.join(cells)} |")
    if any(row["share"] < least for row in result["steering"]):
        lines += ["", "\\* the nearest size below; the next one costs more than the budget."]
    return "\n".join([*lines, ""])


def wins(result: dict[str, Any]) -> str:
    """Tabulate recipes as in DRAGON's table 1.

    A row holds the win rate of the trained reward, with the statistics of DRAGON's listening tests, and all rewards
    before / after training. Those statistics take trials for independent, and a prompt returns with every seed.
    """
    rewards = list(result["win_rates"][0]["rewards"])
    heading = ["name", "trained on", "win rate (a tie is half)", "95% lower bound without ties*", "p*", "trials"]
    heading += rewards
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for row in result["win_rates"]:
        won = row["wins"]
        trials = won["wins"] + won["losses"] + won["ties"]
        cells = [row["name"], row["target"], f"{won['rate']:.1%}", f"{won['low']:.1%}", f"{won['p_value']:.1e}"]
        cells += [str(trials), *("{before:.3g} / {after:.3g}".format(**row["rewards"][name]) for name in rewards)]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "\\* of the decided trials, as if all were independent; the same prompts come with every training seed, so that"
        " these figures are optimistic."
    )
    return "\n".join([*lines, "", note, ""])


def guards(result: dict[str, Any]) -> str:
    """Tabulate reward guards by bench: the gains in strict accuracy, the shifts of what is planted, and the verdict."""
    heading = ["bench", "guard", "strict without", "strict with", "difference (95% interval)", "planted shift without"]
    heading += ["planted shift with", "gain on honest rewards (95% interval)", "verdict"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for row in result["guards"]:
        name = row["arm"].replace("_", " ") + ("" if row["helps"] else "\\*")
        shifts = ["none planted" if shift is None else f"{shift:+.3f}" for shift in row["planted"]]
        cells = [row["bench"].replace("_", " "), name, *(f"{gain:+.3f}" for gain in row["strict"])]
        cells += [_interval(row["difference"]), *shifts, _interval(row["honest_gain"]), row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    if not all(row["helps"] for row in result["guards"]):
        lines += ["", "\\* ought not to help: it does not see what is planted."]
    return "\n".join([*lines, ""])


def _interval(estimate: dict[str, float | None] | None, form: str = "+.3f") -> str:
    """Write a mean with its interval; a bound that is None is not finite."""
    if estimate is None:
        return "not measured"
    bounds = ["none" if estimate[side] is None else f"{estimate[side]:{form}}" for side in ("low", "high")]
    return f"{estimate['mean']:{form}} ({' to '.join(bounds)})"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "results": table,
    "standings": standings,
    "equal": equal,
    "curves": curves,
    "steering": steering,
    "wins": wins,
    "guards": guards,
}


def fill(text: str, results: Path) -> str:
    """``text`` with every marked table made anew. Raises FileNotFoundError for a table without its result file."""

    def filled(match: re.Match[str]) -> str:
        result = json.loads((results / f"{match['name']}.json").read_text(encoding="utf-8"))
        rendered = TABLES[match["kind"]](result)
        return f"{match['begin']}{rendered}{match['end']}"

    return MARKED.sub(filled, text)


def main() -> int:
    """Write the tables into the pages of docs, or check them with --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = fill(old, ROOT / "docs" / "results")
        if new != old:
            stale.append(path)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{'stale' if options.check else 'wrote'}: {path.relative_to(ROOT)}")
    return int(bool(stale) and options.check)


if __name__ == "__main__":
    raise SystemExit(main())
