"""The first screen of a run's report: did it work, what got worse, and what did it cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from genalign.evaluation.evaluate import Evaluation
from genalign.evaluation.paired import newly_correct
from genalign.evaluation.report.reading import Comparison, Row, Run, rounds_done
from genalign.evaluation.report.words import (
    MIN_PROMPTS,
    SHARES,
    Mood,
    call_words,
    count,
    duration,
    gain_mood,
    gain_verdict,
    gained_tasks,
    interval,
    memory_size,
    newly_correct_words,
    number,
    percent,
    plain,
    prompts,
    scored,
    signed,
    titled,
    trend_verdict,
)
from genalign.metrics.intervals import Estimate, t_interval
from genalign.training.reward_hacking import HackingReport

_MAX_SHARE = 0.5  # of clipped updates and of groups without signal, above which a round teaches little


@dataclass(frozen=True)
class Statement:
    """A sentence of the first screen; its mood says whether it is good news."""

    text: str
    mood: Mood = "even"


@dataclass(frozen=True)
class Change:
    """One measure at its start and at its end, as the headline and the statements write it."""

    title: str
    start: str
    end: str
    verdict: str
    detail: str
    mood: Mood

    @property
    def statement(self) -> Statement:
        """The whole change as one sentence."""
        return Statement(f"{self.title}: {self.start} → {self.end}, {self.verdict} ({self.detail}).", self.mood)


def subject(config: Mapping[str, Any]) -> str:
    """What was trained, by what, and on what, in one line; empty for a run without a configuration."""
    model, recipe = (config.get("model") or {}).get("path"), (config.get("recipe") or {}).get("class_path")
    parts = {
        "": model,
        "trained by ": recipe and str(recipe).rpartition(".")[2],
        "rewards: ": ", ".join(
            plain(name) for name, settings in (config.get("rewards") or {}).items() if settings.get("weight", 1.0)
        ),
        "prompts: ": config.get("prompts"),
    }
    return " · ".join(f"{words}{value}" for words, value in parts.items() if isinstance(value, str) and value)


def main_score(names: Collection[str]) -> str:
    """The score that ranks first: strict accuracy if it is measured, else the first one."""
    return "strict" if "strict" in names else next(iter(names))


def did_it_work(run: Run) -> list[Change]:
    """The change of every score and of the training reward, the most telling one first."""
    changes = []
    if run.before and run.after and run.comparison:
        main = main_score(run.comparison.overall)
        scores = sorted(run.comparison.overall, key=lambda name: name != main)
        changes += [_gain(score, run, run.before, run.after, run.comparison) for score in scores]
    held_out = [row for row in run.rows if row.get("held_out")]
    if len(held_out) > 1:
        span = f"round {rounds_done(held_out[0])} to {rounds_done(held_out[-1])}"
        suite = f" on {run.prompts['held_out']['suite']}" if "held_out" in run.prompts else ""
        for score, last in held_out[-1]["held_out"].items():
            if first := held_out[0]["held_out"].get(score):
                start, end = Estimate.from_dict(first), Estimate.from_dict(last)
                title = f"During training, {plain(score)} score{suite}"
                changes.append(_trend(title, score, start, end, f"{span}, {prompts(end.n)}", end.n))
    rewards = _reward_changes(run)
    return changes + ([change for change in rewards if change.title == "Training reward"] or rewards)


def what_improved(run: Run) -> list[str]:
    """A sentence on the tasks that gained, and one on whether the samples that became correct were noise before."""
    if run.comparison is None:
        return []
    tasks, right = run.comparison.tasks, newly_correct(run.comparison.pairs)
    sentences = [gained_tasks(main_score(run.comparison.overall), tasks)] if len(tasks) > 1 else []
    sentences += [newly_correct_words(right)] if right else []
    return [f"{titled(sentence)}." for sentence in sentences]


def about_prompts(run: Run) -> list[str]:
    """What is known of the evaluated prompts: whether they are trained on, and which suites are different ones."""
    sentences, sections = [], {"before_after": "before and after training", "held_out": "during training"}
    for section, when in sections.items():
        if facts := run.prompts.get(section):
            overlap, n = facts["also_trained"], facts["prompts"]
            learned = f"{overlap} of them are trained on: scores of these say nothing about new prompts"
            fact = learned if overlap else "none of them is trained on"
            sentences.append(f"Measured {when}: {facts['suite']}, a set of {prompts(n)}; {fact}.")
    if run.best:
        sentences.append(f"Evaluated after training: the weights after {run.best}.")
    hashes = {run.prompts[section]["suite_hash"] for section in sections if section in run.prompts}
    if len(hashes) > 1:
        sentences.append(
            "The headline and the held-out curve are of different prompt sets: their values need not agree."
        )
    return sentences


def got_worse(run: Run) -> list[Statement]:
    """Everything that fell, failed or left its range, then the checks that passed."""
    changes = dict.fromkeys([*did_it_work(run), *_reward_changes(run)])
    statements = [change.statement for change in changes if change.mood == "down"]
    if run.comparison:
        statements += _task_losses(run.comparison)
        main = main_score(run.comparison.overall)
        task, gain = min(((t, s[main]) for t, s in run.comparison.tasks.items()), key=lambda item: item[1].mean)
        statements.append(Statement(f"Lowest gain of a task: {plain(task)}, {main} score {_signed_gain(main, gain)}."))
    if run.rows:
        statements += [_hacking(run.rows), *_failures(run.rows), *_ranges(run)]
    statements.sort(key=lambda statement: statement.mood != "down")
    if not statements or statements[0].mood != "down":
        statements.insert(0, Statement("Nothing got clearly worse." if changes else "Nothing is measured yet."))
    return statements


def cost(run: Run) -> dict[str, str]:
    """The resources that the run used so far, by name."""
    if not run.rows:
        return {}
    last, machine, environment = run.rows[-1], run.rows[-1]["machine"], run.environment
    accelerator, cores, processes = (environment.get(name) for name in ("accelerator", "cores", "processes"))
    started, finished = environment.get("started", {}).get("date"), environment.get("finished")
    facts = {}
    if started and finished:
        wall = datetime.fromisoformat(finished) - datetime.fromisoformat(started)
        facts["wall-clock, evaluations included"] = duration(wall.total_seconds())
    facts |= {
        "training time": duration(machine["seconds"]),
        "time per round": duration(machine["seconds"] / len(run.rows)),
        "rounds": count(len(run.rows)),
        "samples": count(last["samples"]),
        "NFE": count(last["nfe"]),
        **{call_words(call): count(n) for call, n in last.get("calls", {}).items() if call != "nfe"},
        "peak memory": memory_size(machine["peak_memory_bytes"]),
    }
    if evaluated := sum(len(part.records) for part in (run.before, run.after) if part):
        facts["evaluation samples"] = count(evaluated)
    if accelerator or cores:
        device = accelerator or f"{cores} CPU cores"
        facts["machine"] = f"{processes} processes, {device}" if processes and processes > 1 else device
    if started:
        facts["started"] = f"{datetime.fromisoformat(started):%Y-%m-%d %H:%M} UTC"
    if "genalign" in environment:
        facts["genalign"] = environment["genalign"]
    return facts


def missing(run: Run) -> list[str]:
    """A sentence on each part that the run does not have, and why, if its configuration says so."""
    off = " (before_after is null)" if run.config.get("before_after", "") is None else ""
    never = " (held_out.every is 0)" if run.config.get("held_out", {}).get("every") == 0 else ""
    evaluations = {
        (False, False): f"The model was not evaluated before and after training{off}: no gain is measured.",
        (True, False): "The evaluation after training is missing: the gain is not known yet.",
        (False, True): "The evaluation before training is missing: the gain is not known.",
    }
    sentences = {
        "No training round is recorded yet.": not run.rows,
        f"The run is not finished: {run.unfinished} are recorded. It was interrupted or stopped, or is still running. "
        f"Resume an interrupted run with: genalign train --resume {run.folder}": run.unfinished,
        evaluations.get((bool(run.before), bool(run.after)), ""): True,
        f"Before and after are shown without a gain: {run.incomparable}.": run.incomparable,
        f"No held-out prompts were evaluated during training{never}.": not any(r.get("held_out") for r in run.rows),
    }
    return [sentence for sentence, applies in sentences.items() if sentence and applies]


def _gain(score: str, run: Run, before: Evaluation, after: Evaluation, comparison: Comparison) -> Change:
    """The paired gain of one score; the title says what is measured, and on how many prompts."""
    gain, unit = comparison.overall[score], " points" if score in SHARES else ""
    verdict = gain_verdict(gain, comparison.effects.get(score, math.inf))
    name = f"{titled(plain(score))} {'accuracy' if score == 'strict' else 'score'}"
    trained = run.prompts.get("before_after", {}).get("also_trained", 0)
    warning = f", {trained} of them trained on" if trained else ""
    return Change(
        f"{name} on {prompts(gain.n)} of {before.protocol.suite}{warning}",
        scored(score, before.overall[score].mean),
        scored(score, after.overall[score].mean),
        f"{signed(score, gain.mean)}{unit}: {verdict.text}",
        f"{f'95 % interval of the gain {interval(score, gain, signed)}{unit}, ' if gain.has_interval else ''}from"
        f" {len(comparison.pairs)} pairs of samples of {prompts(comparison.prompts)}",
        verdict.mood,
    )


def _trend(title: str, score: str, start: Estimate, end: Estimate, span: str, units: int) -> Change:
    """The change of a measure during training, of which ``units`` prompts speak."""
    unit = " points" if score in SHARES else ""
    verdict = trend_verdict(start, end, units, f"{signed(score, end.mean - start.mean)}{unit}")
    detail = span
    if start.has_interval and end.has_interval:
        detail += f"; 95 % intervals {interval(score, start, scored)} and {interval(score, end, scored)}"
    return Change(title, scored(score, start.mean), scored(score, end.mean), verdict.text, detail, verdict.mood)


def _reward_changes(run: Run) -> list[Change]:
    """The changes of the training reward and of each reward, from the first fifth of the rounds to the last.

    The scores of a reward that is trained along are not comparable over rounds: it and the sum are left out. Such a
    reward records metrics of its own.
    """
    rows = run.rows
    last = rows[-1] if rows else {}
    metrics = tuple(last.get("metrics", {}))
    names = [n for n in last.get("rewards", {}) if not any(metric.startswith(f"{n}/") for metric in metrics)]
    series = {f"Reward {plain(name)}": (name, [row["rewards"].get(name) for row in rows]) for name in names}
    if len(names) == len(last.get("rewards", {})):
        series = {"Training reward": ("", [row["reward"] for row in rows]), **series}
    size, changes = max(3, len(rows) // 5), []
    distinct = run.prompts.get("training", {}).get("prompts", math.inf)
    per_round = run.config.get("training", {}).get("prompts_per_round") or MIN_PROMPTS
    speaking = int(min(distinct, size * per_round))
    for title, (name, column) in series.items():
        values = [value for value in column if value is not None]
        if len(values) >= 2 * size:
            span = f"mean of the first and last {size} rounds"
            changes.append(_trend(title, name, t_interval(values[:size]), t_interval(values[-size:]), span, speaking))
        elif values:
            start, end = scored(name, values[0]), scored(name, values[-1])
            changes.append(Change(title, start, end, "no verdict", "too few rounds for an interval", "even"))
    return changes


def _task_losses(comparison: Comparison) -> list[Statement]:
    """The tasks of enough prompts in which the gain of a score is below zero with its whole interval."""
    return [
        Statement(f"{titled(plain(name))} score of task {plain(task)}: {_signed_gain(name, gain)}.", "down")
        for task, scores in comparison.tasks.items()
        for name, gain in scores.items()
        if gain_mood(gain) == "down"
    ]


def _signed_gain(score: str, gain: Estimate) -> str:
    change = f"{signed(score, gain.mean)}{' points' if score in SHARES else ''}"
    return f"{change} ({interval(score, gain, signed)}; {prompts(gain.n)})"


def _hacking(rows: Sequence[Row]) -> Statement:
    """The status of the last reward-hacking report."""
    checks = [
        (rounds_done(row), HackingReport.from_list(row["reward_hacking"])) for row in rows if row.get("reward_hacking")
    ]
    if not checks:
        return Statement("Reward hacking was not monitored (reward_hacking.every is 0).")
    alarms = [done for done, report in checks if report.alarm]
    history = f"{len(alarms)} of {len(checks)} checks raised an alarm"
    if alarms:
        history += f", the first after round {alarms[0]}"
    if alarm := checks[-1][1].alarm:
        return Statement(f"The reward may be exploited: {alarm}. {titled(history)}.", "down")
    return Statement(f"The last check for reward hacking is green; {history}.")


def _failures(rows: Sequence[Row]) -> list[Statement]:
    """The rewards that failed and the updates that were skipped, over all rounds."""
    failed = sum(row.get("failed_rewards", 0) for row in rows)
    skipped = sum(row.get("skipped_updates", 0) for row in rows)
    statements = []
    if failed:
        share = percent(failed / rows[-1]["samples"])
        statements.append(Statement(f"Rewards failed on {failed} of {rows[-1]['samples']} samples ({share}).", "down"))
    if skipped:
        statements.append(Statement(f"{skipped} updates were skipped: their gradient was not finite.", "down"))
    return statements or [Statement("No reward failed, and no update was skipped.")]


def _ranges(run: Run) -> list[Statement]:
    """Clip fraction, groups without signal and KL in the last tenth of the rounds, against their limits."""
    limit = ((run.config.get("reward_hacking") or {}).get("limits") or {}).get("kl") or {}
    checks = [
        ("clip_fraction", "clip fraction", percent, _MAX_SHARE, "lower training.trust_region.target"),
        ("zero_std_share", "groups without signal", percent, _MAX_SHARE, "use prompts or rewards that differ more"),
        ("kl", "KL to the reference", number, limit.get("amber", math.inf), "raise the method's kl weight"),
    ]
    statements, unremarkable = list[Statement](), []
    for key, label, write, most, advice in checks:
        values = [row[key] for row in run.rows[-max(1, len(run.rows) // 10) :] if row.get(key) is not None]
        if not values:
            continue
        mean = math.fsum(values) / len(values)
        if mean > most:
            text = f"{titled(label)} is {write(mean)} in the last rounds, above {write(most)}: {advice}."
            statements.append(Statement(text, "down"))
        else:
            unremarkable.append(f"{label} {write(mean)}")
    if unremarkable:
        statements.append(Statement(f"In the last rounds: {', '.join(unremarkable)}."))
    return statements
