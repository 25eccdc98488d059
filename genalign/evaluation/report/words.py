"""Numbers and names as the pages write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from genalign.metrics.intervals import Estimate

Mood = Literal["up", "down", "even"]
SHARES = frozenset({"strict", "partial", "relaxed"})  # scores in [0, 1], written in percent
_MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Three significant digits, with a real minus sign."""
    return f"{value:.3g}".replace("-", _MINUS)


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
    return f"{100 * value:.1f} %" if score in SHARES else number(value)


def signed(score: str, value: float) -> str:
    """A difference between two values of a score, in percentage points if it is a share."""
    return (f"{100 * value:+.1f}" if score in SHARES else f"{value:+.3g}").replace("-", _MINUS)


def interval(score: str, estimate: Estimate, write: Callable[[str, float], str]) -> str:
    """The confidence interval of an estimate: "0.1 to 0.3", or why there is none."""
    if not estimate.has_interval:
        return "no interval: a task has one prompt, give it two or more"
    return f"{write(score, estimate.low)} to {write(score, estimate.high)}"


def mood(low: float, high: float) -> Mood:
    """The direction of a difference from its interval; "even" if the interval contains zero."""
    return "up" if low > 0 else "down" if high < 0 else "even"
