"""Numbers, names and verdicts as the pages and the terminal write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from genalign.evaluation.paired import NewlyCorrect
from genalign.metrics.intervals import Estimate

Mood = Literal["up", "down", "even"]
SHARES = frozenset({"strict", "partial", "relaxed"})  # scores in [0, 1], written in percent
MIN_PROMPTS = 20  # with fewer, no verdict
NO_EFFECT, SMALL_EFFECT = 0.01, 0.1  # effect sizes below which a gain is none, and below which it is small
_MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Three significant digits, with a real minus sign and a letter for thousands, as in "80.8k"."""
    return count(value).replace("-", _MINUS)


def percent(value: float) -> str:
    """A share in [0, 1] in percent: 0.125 is "12.5 %"."""
    return f"{100 * value:.3g} %"


def count(value: float) -> str:
    """A count in at most three digits and a letter: 1234567 is "1.23M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def memory_size(n_bytes: float) -> str:
    """A number of bytes: 3221225472 is "3.2 GB"."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """A time in two units: 3725 seconds are "1 h 2 min"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plain(name: str) -> str:
    """A name with spaces for underscores: color_attr is "color attr"."""
    return name.replace("_", " ")


def titled(text: str) -> str:
    """A text with a capital first letter and the rest as it is: "HPSv2" stays, "clip" is "Clip"."""
    return text[:1].upper() + text[1:]


def call_words(call: str) -> str:
    """The ledger's name of a call in words: "nfe" is "NFE", the evaluations of the denoiser."""
    name, backward, _ = call.partition(" backward")
    kind, _, reward = name.partition("/")
    if backward:
        target = {"nfe": "the denoiser", "decode": "the decoder"}.get(kind, f"reward {plain(reward)}")
        return f"backward passes of {target}"
    return {"nfe": "NFE", "decode": "decoded samples"}.get(kind, f"calls of reward {plain(reward)}")


def scored(score: str, value: float) -> str:
    """The value of a score, in percent if it is a share."""
    return f"{100 * value:.1f} %".replace("-", _MINUS) if score in SHARES else number(value)


def signed(score: str, value: float) -> str:
    """A difference between two values of a score, in percentage points if it is a share."""
    text = f"{100 * value:.1f}".replace("-", _MINUS) if score in SHARES else number(value)
    return text if text.startswith(_MINUS) else f"+{text}"


def possible(score: str, estimate: Estimate, least: float) -> Estimate:
    """The estimate with the interval of a share cut to [``least``, 1]: 0 for a value, -1 for a gain."""
    if score not in SHARES or not estimate.has_interval:
        return estimate
    return replace(estimate, low=max(estimate.low, least), high=min(estimate.high, 1.0))


def interval(score: str, estimate: Estimate, write: Callable[[str, float], str]) -> str:
    """The confidence interval of an estimate: "0.1 to 0.3", or why there is none; that of a share stays possible."""
    if not estimate.has_interval:
        return estimate.no_interval
    estimate = possible(score, estimate, least=0.0 if write is scored else -1.0)
    return f"{write(score, estimate.low)} to {write(score, estimate.high)}"


def gain_label(score: str) -> str:
    """The heading of a column of gains, with the unit of a share."""
    return "gain in points" if score in SHARES else "gain"


def mood(low: float, high: float) -> Mood:
    """The direction of a difference from its interval; "even" if the interval contains zero."""
    return "up" if low > 0 else "down" if high < 0 else "even"


def gain_mood(gain: Estimate) -> Mood:
    """The direction of a paired gain; "even" without an interval, and from too few prompts for a verdict."""
    return mood(gain.low, gain.high) if gain.has_interval and gain.n >= MIN_PROMPTS else "even"


@dataclass(frozen=True)
class Verdict:
    """What a difference amounts to, in words; its mood says whether it is good news."""

    text: str
    mood: Mood = "even"


def gain_verdict(gain: Estimate, effect: float) -> Verdict:
    """Judge a paired gain over ``gain.n`` prompts by its interval and its effect size (``paired.effect_sizes``)."""
    size = f", effect size {number(effect)}" if math.isfinite(effect) else ""
    if gain.n < MIN_PROMPTS:
        return Verdict(f"no verdict from {prompts(gain.n)}, at least {MIN_PROMPTS} needed{size}")
    if gain.mean == 0 or abs(effect) < NO_EFFECT:
        return Verdict(f"no change{size}")
    if not gain.has_interval:
        return Verdict(f"no verdict, {gain.no_interval}{size}")
    direction = gain_mood(gain)
    adjective = "small" if abs(effect) < SMALL_EFFECT else "clear"
    nouns = {"up": f"a {adjective} improvement", "down": f"a {adjective} regression", "even": "no clear change"}
    return Verdict(f"{nouns[direction]}{size}", direction)


def gained_tasks(score: str, tasks: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Say in how many tasks the interval of a score's gain is above 0, and in which."""
    gained = [plain(task) for task, gains in tasks.items() if gains[score].has_interval and gains[score].low > 0]
    names = f" ({', '.join(gained)})" if gained else ""
    return f"{plain(score)}: the interval of the gain is above 0 in {len(gained)} of {len(tasks)} tasks{names}"


def newly_correct_words(right: NewlyCorrect) -> str:
    """Say how many samples became correct, and in how many of them content was corrected and not noise removed."""
    if not right.pairs:
        return "no sample became correct"
    return (
        f"of the {right.pairs} samples that became correct, {right.recognized} ({percent(right.share)}) had nothing"
        " unknown to the verifier before: their content was corrected, not noise removed"
    )


def trend_verdict(start: Estimate, end: Estimate, units: int, change: str) -> Verdict:
    """Judge a change between two passes: clear if their intervals do not overlap.

    Args:
        start: The estimate at the start.
        end: The estimate at the end.
        units: The number of prompts that speak.
        change: The change in words: its size in the score's own unit.
    """
    if units < MIN_PROMPTS:
        return Verdict(f"{change}: no verdict from {prompts(units)}, at least {MIN_PROMPTS} needed")
    if start.mean == end.mean:
        return Verdict("no change")
    if not (start.has_interval and end.has_interval):
        return Verdict(f"{change}: no verdict, {(end if start.has_interval else start).no_interval}")
    direction = mood(end.low - start.high, end.high - start.low)
    nouns = {"up": "a clear rise", "down": "a clear fall", "even": "no clear change"}
    return Verdict(f"{change}: {nouns[direction]}", direction)


def prompts(n: int) -> str:
    """A number of prompts: "1 prompt", "24 prompts"."""
    return f"{n} prompt{'' if n == 1 else 's'}"


def seeds_words(value: Estimate, form: str) -> str:
    """A mean over training seeds with its interval by a format specification; of one seed without."""
    return f"{value.mean:{form}} (one seed)" if value.n == 1 else value.text(form)
