"""``genalign compare-evaluations``, and the report at the end of every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext, print_estimates
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.folder import EvaluationFolder
from genalign.evaluation.paired import ModelComparison, compare_models
from genalign.evaluation.report import write_evaluation
from genalign.evaluation.report.evaluation_page import cost_words, set_differences
from genalign.evaluation.report.words import gain_verdict, prompts
from genalign.runtime.files import without_infinities, write_json


@dataclass(frozen=True)
class CompareEvaluations:
    """Two finished evaluations with equal protocols, compared sample by sample.

    Args:
        before: Folder of the first model's evaluation.
        after: Folder of the second model's evaluation, in which comparison.json and report.html are written.
    """

    before: str
    after: str


def compare_evaluations_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign compare-evaluations BEFORE AFTER``."""
    if len(arguments) > 1 and not any(word.startswith("-") for word in arguments[:2]):
        arguments = ["--before", arguments[0], "--after", *arguments[1:]]
    settings, _ = parsing.parse(CompareEvaluations, arguments, "compare-evaluations")
    report_evaluation(Path(settings.after), Path(settings.before))
    return 0


def report_evaluation(folder: Path, against: Path | None = None) -> None:
    """Print the scores of a finished evaluation, compare it with another model's, and write its page.

    Raises FileNotFoundError for an unfinished evaluation, ValueError for one of another protocol.
    """
    evaluation = load_evaluation(folder)
    earlier = load_evaluation(against) if against else None
    comparison = compare_models(earlier, evaluation) if earlier else None
    print_estimates(evaluation)
    for name, value in evaluation.sets.items():
        print(f"{name}: {value.value:.4g} (a score of the set of all {value.n} samples, without an interval)")
    places = {"before": against, "after": folder}
    costs = {when: EvaluationFolder(place).cost() for when, place in places.items() if place}
    if against and earlier and comparison:
        _print_comparison(against.resolve().name, comparison, sets := set_differences(earlier, evaluation))
        content = without_infinities({**asdict(comparison), "sets": sets, "cost": costs})
        write_json(folder / "comparison.json", {"against": str(against), **content})
    for when, cost in costs.items():
        if cost:
            print(f"cost of {places[when]}: {cost_words(cost)}")
    print(f"report: {write_evaluation(folder, against)}")


def _print_comparison(other: str, comparison: ModelComparison, sets: Mapping[str, float | None]) -> None:
    """Print the gain and the win rate of every score over the evaluation ``other``."""
    for name, gain in comparison.gain.items():
        wins, verdict = comparison.wins[name], gain_verdict(gain, comparison.effects[name])
        print(
            f"{name} against {other}: {gain.text('+.3f')} on {prompts(gain.n)}, {verdict.text}; prompts won"
            f" {wins.rate.text('.1%')}, ties {wins.ties:.1%} as half"
        )
    for name, difference in sets.items():
        words = "not comparable, as the sets differ in size" if difference is None else f"{difference:+.4g}"
        print(f"{name} against {other}: {words}")
