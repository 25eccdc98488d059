"""Numbers as a reader wants them."""

from __future__ import annotations

from collections.abc import Callable

from genalign.metrics.intervals import Estimate

SHARES = frozenset({"strict", "partial", "relaxed"})  # scores in [0, 1], written in per cent
_MINUS = "\N{MINUS SIGN}"


def number(value: float) -> str:
    return f"{value:.3g}".replace("-", _MINUS)


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def count(value: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def size(n_bytes: float) -> str:
    """3221225472 as 3.2 GB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """3725 as 1 h 2 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plain(name: str) -> str:
    """color_attr as color attr."""
    return name.replace("_", " ")


def scored(score: str, value: float) -> str:
    """The value of a score."""
    return f"{100 * value:.1f} %" if score in SHARES else number(value)


def signed(score: str, value: float) -> str:
    """A difference of a score, of a share in points."""
    return (f"{100 * value:+.1f}" if score in SHARES else f"{value:+.3g}").replace("-", _MINUS)


def interval(score: str, estimate: Estimate, write: Callable[[str, float], str]) -> str:
    return f"{write(score, estimate.low)} to {write(score, estimate.high)}"


def mood(low: float, high: float) -> str:
    """What an interval of a gain says: "up", "down", or "even" where it holds zero."""
    return "up" if low > 0 else "down" if high < 0 else "even"
