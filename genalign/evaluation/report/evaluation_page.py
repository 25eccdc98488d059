"""The page about an evaluation, alone or against that of another model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import EXTERNAL, Evaluation, SampleRecord, load_evaluation
from genalign.evaluation.geneval.upstream_results import VERIFIER
from genalign.evaluation.paired import ModelComparison, SamplePair, compare_models, pairs_by_gain
from genalign.evaluation.report import sections
from genalign.evaluation.report.html import write_page
from genalign.evaluation.report.reading import Comparison
from genalign.evaluation.report.samples import Drawing, drawing, fitting
from genalign.evaluation.report.sections import OVERALL, flattened
from genalign.evaluation.report.words import count, duration, gain_verdict, percent, plain

MAX_CARDS, PAIRS_OF_A_PROMPT = 12, 2


@dataclass(frozen=True)
class SampleCard:
    """A sample drawn, its record, and the reasons that scorers gave."""

    drawing: Drawing
    record: SampleRecord
    reasons: Sequence[str]

    @classmethod
    def of(cls, record: SampleRecord, folder: Path) -> SampleCard:
        """Draw a sample of the evaluation in a folder, with the reasons in its record's details."""
        details = [detail for detail in record.details.values() if isinstance(detail, Mapping)]
        reasons = [str(detail["reason"]) for detail in details if detail.get("reason")]
        return cls(drawing(folder, record.image, folder), record, reasons)


@dataclass(frozen=True)
class PromptCard:
    """A prompt with the mean of each score before and after, and some of its samples drawn in pairs."""

    prompt: str
    means: Mapping[str, tuple[float, float]]
    pairs: Sequence[tuple[Drawing, Drawing]]


def write_evaluation(folder: Path, against: Path | None = None) -> Path:
    """Write ``report.html`` into the folder of a finished evaluation, and return its path.

    Args:
        folder: The evaluation.
        against: The evaluation of another model, whose samples are set beside those of the same prompts and noises.

    Raises:
        FileNotFoundError: An evaluation is not finished.
        ValueError: The two evaluations cannot be compared.
    """
    evaluation = load_evaluation(folder)
    manifest, cost, benchmark = (_json(folder / f"{name}.json") for name in ("evaluation", "cost", "benchmark"))
    overall, main = evaluation.overall, evaluation.score_names[0]
    prompts = {(record.task, record.prompt) for record in evaluation.records}
    numbers = {"samples": count(len(evaluation.records)), "prompts": count(len(prompts))}
    if evaluation.failed:
        numbers["not scored"] = count(evaluation.failed)
    return write_page(
        folder / "report.html",
        "evaluation.html.j2",
        evaluation=evaluation,
        main=main,
        headline=overall[main],
        geneval=(folder / "results.jsonl").is_file(),
        original=evaluation.protocol.verifier == VERIFIER,
        external=evaluation.protocol.kernel == EXTERNAL,
        numbers=numbers | cost_facts(cost),
        tasks={**evaluation.tasks, OVERALL: overall},
        benchmark={name: "none" if value is None else f"{value:.4g}" for name, value in benchmark.items()},
        samples={} if against else _samples(folder, evaluation),
        model=_model_words(manifest, evaluation),
        hashes={name: manifest.get(name, "") for name in ("hash", "protocol_hash")},
        subject=flattened(manifest.get("subject", {})),
        protocol=flattened(evaluation.protocol.as_dict()),
        **_against(folder, evaluation, against),
    )


def cost_facts(cost: Mapping[str, float]) -> dict[str, str]:
    """Word the NFE and the seconds of an evaluation, those of them that are recorded."""
    facts = {"NFE": count(cost["nfe"])} if cost.get("nfe") else {}
    return facts | ({"time": duration(cost["seconds"])} if cost.get("seconds") else {})


def cost_words(cost: Mapping[str, float]) -> str:
    """Word the cost of an evaluation, as in "4.8k NFE, 12 s"; empty if none is recorded."""
    return ", ".join(f"{value} NFE" if name == "NFE" else value for name, value in cost_facts(cost).items())


def set_differences(before: Evaluation, after: Evaluation) -> dict[str, float | None]:
    """Subtract the scores of whole sets; None for sets of different size, on which most of these scores depend."""
    return {
        name: value.value - before.sets[name].value if value.n == before.sets[name].n else None
        for name, value in after.sets.items()
        if name in before.sets
    }


def _model_words(manifest: Mapping[str, Any], evaluation: Evaluation) -> str:
    """The model of an evaluation, its adapter and its sampling in one line; or the folder of samples from elsewhere."""
    subject, protocol = manifest.get("subject", {}), evaluation.protocol
    model = subject.get("model")
    if not isinstance(model, Mapping):
        return ""
    if protocol.kernel == EXTERNAL:
        return f"samples of {model['samples']}" if model.get("samples") else ""
    steps = f"{len(protocol.sigmas) - 1} steps by {protocol.kernel.removesuffix('()')}, guidance {protocol.guidance:g}"
    adapter = [f"adapter {subject['lora']}"] if subject.get("lora") else []
    return " · ".join([str(model.get("path")), *adapter, steps])


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _samples(folder: Path, evaluation: Evaluation) -> dict[str, list[SampleCard]]:
    """Draw the samples with the lowest and the highest first score, of every task in turn, as many as fit."""
    main, records = evaluation.score_names[0], evaluation.records
    scored = sorted((record for record in records if math.isfinite(record.scores[main])), key=lambda r: r.scores[main])
    half = len(scored) // 2
    lowest = [record for record in scored[:half] if record.scores[main] < scored[-1].scores[main]]
    highest = [record for record in reversed(scored[half:]) if record.scores[main] > scored[0].scores[main]]
    lists = {"Lowest scores": lowest, "Highest scores": highest} if lowest else {"Samples": scored}
    samples = {}
    for title, rows in lists.items():
        cards = (SampleCard.of(record, folder) for record in _in_turn(rows)[:MAX_CARDS])
        samples[title] = fitting(cards, lambda card: [card.drawing[0]])
    return samples


def _in_turn(records: Sequence[SampleRecord]) -> list[SampleRecord]:
    """Order records so that tasks, and the prompts of each, take turns."""
    tasks: dict[str, dict[str, list[SampleRecord]]] = {}
    for record in records:
        tasks.setdefault(record.task, {}).setdefault(record.prompt, []).append(record)
    turns = [[r for layer in zip_longest(*prompts.values()) for r in layer if r] for prompts in tasks.values()]
    return [record for layer in zip_longest(*turns) for record in layer if record]


def _against(folder: Path, after: Evaluation, other: Path | None) -> dict[str, Any]:
    """The template's values about the comparison with another model."""
    if other is None:
        return {"against": "", "sets": {name: (None, value, None) for name, value in after.sets.items()}}
    before = load_evaluation(other)
    comparison, pairs = compare_models(before, after), pairs_by_gain(before, after)
    tables = sections.tables(before, after, Comparison(comparison.gain, comparison.tasks, pairs))
    main = after.score_names[0]
    differences = set_differences(before, after)
    own, theirs = folder.resolve().name, other.resolve().name
    label = theirs if theirs != own else str(other)
    costs = {label: cost_words(_json(other / "cost.json")), own: cost_words(_json(folder / "cost.json"))}
    return {
        "against": label,
        "tables": {main: tables.pop(main), **tables},  # the score of the headline comes first
        "verdicts": _verdicts(comparison),
        "costs": {f"cost of {name}": words for name, words in costs.items() if words},
        "sets": {name: (before.sets.get(name), value, differences.get(name)) for name, value in after.sets.items()},
        "prompts": _prompt_cards(pairs, other, folder),
    }


def _prompt_cards(pairs: Sequence[SamplePair], before: Path, after: Path) -> list[PromptCard]:
    """Draw the prompts whose mean scores differ most, by the first score and then the next, as many as fit."""
    groups: dict[tuple[str, str], list[SamplePair]] = {}
    for pair in pairs:
        groups.setdefault((pair.before.task, pair.before.prompt), []).append(pair)
    cards = []
    for (_, prompt), group in groups.items():
        sides = [[pair.before.scores for pair in group], [pair.after.scores for pair in group]]
        means = {
            name: (_mean([scores[name] for scores in sides[0]]), _mean([scores[name] for scores in sides[1]]))
            for name in group[0].differences
        }
        cards.append((PromptCard(prompt, means, ()), group))
    ordered = sorted(cards, key=lambda item: [-abs(after - before) for before, after in item[0].means.values()])
    drawn = (
        replace(
            card,
            pairs=[
                (drawing(before, pair.before.image, after), drawing(after, pair.after.image, after))
                for pair in _telling(card, group)
            ],
        )
        for card, group in ordered[:MAX_CARDS]
    )
    return fitting(drawn, lambda card: [picture for pair in card.pairs for picture, _ in pair])


def _telling(card: PromptCard, pairs: Sequence[SamplePair]) -> Sequence[SamplePair]:
    """Select the pairs that differ most in the direction of the prompt; ``pairs`` are sorted by gain."""
    rises = next((after > before for before, after in card.means.values() if after != before), True)
    return pairs[::-1][:PAIRS_OF_A_PROMPT] if rises else pairs[:PAIRS_OF_A_PROMPT]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _verdicts(comparison: ModelComparison) -> dict[str, str]:
    """What the gain of each score amounts to, and how many prompts it wins."""
    facts: dict[str, str] = {}
    for name, gain in comparison.gain.items():
        facts[f"gain, {plain(name)}"] = gain_verdict(gain, comparison.effects[name]).text
        wins = comparison.wins[name]
        share = f"{percent(wins.rate.mean)} ({percent(wins.rate.low)} to {percent(wins.rate.high)})"
        ties = f"with the {percent(wins.ties)} that tie as half won"
        p_value = f"p = {wins.p_value:.3g}".replace(" ", "\N{NO-BREAK SPACE}")
        facts[f"prompts won, {plain(name)}"] = f"{share}, {ties}; sign test {p_value}"
    return facts
