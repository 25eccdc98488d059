"""Write the tables of README.md and docs/*.md from docs/results/*.json.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->``; that of a comparison's runs between
``<!-- standings:NAME -->`` and ``<!-- /standings -->``, their standings at equal NFE and equal seconds between
``<!-- equal:NAME -->`` and ``<!-- /equal -->``, that of searches by budget between ``<!-- curves:NAME -->`` and
``<!-- /curves -->``, that of live searches between ``<!-- live:NAME -->`` and ``<!-- /live -->``, that of strategies at
equal cost between ``<!-- steering:NAME -->`` and ``<!-- /steering -->``, that of win rates between
``<!-- wins:NAME -->`` and ``<!-- /wins -->``, that of reward guards between ``<!-- guards:NAME -->`` and
``<!-- /guards -->``, that of credits between ``<!-- credits:NAME -->`` and ``<!-- /credits -->``, that of which
measures of rewards predict the gain between ``<!-- predictors:NAME -->`` and ``<!-- /predictors -->``, and the picture
of over-optimized rewards, which ``pictures.py`` draws, between ``<!-- plot:NAME -->`` and ``<!-- /plot -->``. What has
no result file stays empty. With ``--check`` nothing is written, and the exit status is 1 where a page is stale.
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
    r"(?P<begin><!-- (?P<kind>results|standings|equal|curves|live|steering|wins|guards|credits|predictors|plot)"
    r":(?P<name>\w+) -->\n).*?(?P<end><!-- /(?P=kind) -->)",
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
    """Tabulate searches by budget, in samples' cost, at equal seconds and at equal NFE.

    A cell has the selection reward / the verifier's strict score. The last column gives the cost at which pruning
    reaches the selection reward of best-of-32, as a fraction of the cost of best-of-32.
    """
    least, lines = 1 - result["tolerance"], list[str]()
    for unit, suffix in (("seconds", ""), ("NFE", ".nfe")):
        heading = [f"search, at equal {unit}", *map(str, result["budgets"]), "cost of best-of-32"]
        lines += [*([""] if lines else []), f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
        reached = result[f"cost_of_best_of_32{suffix}"]
        for name, by_budget in result[f"curves{suffix}"].items():
            cells = []
            for budget, (selection, strict) in by_budget.items():
                spent = result[f"shares{suffix}"][name][budget]
                cells.append(f"{selection:.3f} / {strict:.3f}" + ("\\*" if spent < least else ""))
            share = reached.get(name)
            cells.append("" if name not in reached else "not reached" if share is None else f"{share:.0%}")
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*lines, "", f"\\* spends under {least:.0%} of the budget.", ""])


def live(result: dict[str, Any]) -> str:
    """Tabulate live searches by unit and budget: the scores of what they chose, and what a prompt took."""
    heading = ["at equal", "budget", "search", "selection reward", "strict", "NFE", "seconds", "of the budget"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    least = 1 - result["tolerance"]
    for row in result["live"]:
        cells = [row["unit"], str(row["budget"]), row["search"], *(f"{score:.3f}" for score in row["scores"].values())]
        share = f"{row['share']:.1%}" + ("\\*" if row["share"] < least else "")
        cells += [f"{row['nfe']:.0f}", f"{row['seconds']:.2f}", share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"\\* spends under {least:.0%} of the budget.", ""])


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
    heading = ["bench", "guard", "seeds", "strict without", "strict with", "difference (95% interval)"]
    heading += ["planted shift without", "planted shift with", "gain on honest rewards (95% interval)", "verdict"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for row in result["guards"]:
        name = row["arm"].replace("_", " ") + ("" if row["helps"] else "\\*")
        shifts = ["none planted" if shift is None else f"{shift:+.3f}" for shift in row["planted"]]
        strict = ["not measured" if gain is None else f"{gain:+.3f}" for gain in row["strict"]]
        cells = [row["bench"].replace("_", " "), name, str(row["seeds"]), *strict, _interval(row["difference"])]
        cells += [*shifts, _interval(row["honest_gain"]), row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    if not all(row["helps"] for row in result["guards"]):
        lines += ["", "\\* ought not to help: it does not see what is planted."]
    return "\n".join([*lines, ""])


def credits(result: dict[str, Any]) -> str:
    """Tabulate credits by bench: the gain in strict accuracy, and beside another credit."""
    heading = ["bench", "credit", "seeds", "gain in strict (95% interval)", "rises"]
    heading += ["beside", "difference (95% interval)"]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for row in result["credits"]:
        cells = [row["bench"], row["credit"].replace("_", " "), str(row["seeds"]), _interval(row["gain"])]
        cells += ["yes" if row["rises"] else "no", (row["compared_with"] or "").replace("_", " ")]
        cells.append(_interval(row["difference"]) if row["compared_with"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    note = "Of one seed an interval is over prompts alone, and says nothing about another seed."
    return "\n".join([*lines, "", note, ""])


def predictors(result: dict[str, Any]) -> str:
    """Tabulate how far measures of rewards order the gains of training on them, the clearest ones first."""
    taus = result["measures"]["predictors"].items()
    lines = ["| measure | Kendall's tau-b with the gain (95% interval) |", "|---|---|"]
    for name, tau in sorted(taus, key=lambda row: -abs(row[1]["mean"])):
        lines.append(f"| {name.replace('/', ': ', 1)} | {_interval(tau, '+.2f')} |")
    count = len({row["reward"] for row in result["measures"]["rewards"]})
    note = (
        "How far a measure of a reward orders the gains of training on it. Intervals are over the"
        f" {count} rewards, each with all of its seeds."
    )
    return "\n".join([*lines, "", note, ""])


def plot(result: dict[str, Any]) -> str:
    """The picture of a result of over-optimization, for pages in docs."""
    return f"![{result['claim']}](images/overoptimization.png)\n"


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
    "live": live,
    "steering": steering,
    "wins": wins,
    "guards": guards,
    "credits": credits,
    "predictors": predictors,
    "plot": plot,
}


def fill(text: str, results: Path) -> str:
    """``text`` with every marked table made anew; one without its result file, which was not measured, is empty."""

    def filled(match: re.Match[str]) -> str:
        path = results / f"{match['name']}.json"
        if not path.exists():
            return f"{match['begin']}{match['end']}"
        result = json.loads(path.read_text(encoding="utf-8"))
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
