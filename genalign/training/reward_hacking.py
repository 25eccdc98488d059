"""Reward hacking, made visible: what a reward does not see, measured on fixed prompts and noises while training.

Every image or clip is compared with the one that the untrained model made from the same prompt and noise. Statistics of
pictures or sounds and rewards that are not trained on are read in units of the untrained samples' standard deviation,
variety (Vendi scores, arXiv 2210.02410) relative to the untrained one, and drift in units of the distance between two
samples of one prompt: so the same limits serve every model and reward. Nothing here reads a verifier or what a sample
was meant to show.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.metrics import audio, image
from genalign.metrics.intervals import Estimate, t_interval
from genalign.metrics.vendi import vendi_score
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.state import State
from genalign.types import FeatureFunction, Prompt, RewardFunction

logger = logging.getLogger(__name__)
Light = Literal["green", "amber", "red"]
Side = Literal["either", "fall", "rise"]
Statistics = Mapping[str, Callable[[Tensor], Tensor]]
OF_IMAGES: Statistics = {
    "saturation": image.saturation,
    "high frequencies": image.high_frequency,
    "grid": image.grid_energy,
}
OF_WAVEFORMS: Statistics = {
    "level": audio.level,
    "crest": audio.crest,
    "high frequencies": audio.high_frequency,
}


@dataclass(frozen=True)
class Limit:
    """From which shift on a light is amber, and red; the shift's 95% interval must lie beyond."""

    amber: float
    red: float

    def __post_init__(self) -> None:
        if not 0 < self.amber <= self.red:
            raise ValueError(f"limits must satisfy 0 < amber <= red, not {self.amber} and {self.red}")

    def light(self, shift: Estimate, side: Side) -> Light:
        """The light of a shift that is bad to one side or to either."""
        beyond = {"fall": -shift.high, "rise": shift.low, "either": max(shift.low, -shift.high)}[side]
        return "red" if beyond >= self.red else "amber" if beyond >= self.amber else "green"


@dataclass(frozen=True)
class Limits:
    """For image statistics and held-out rewards in standard deviations of untrained images, for variety in shares of
    the untrained, for drift in distances between two samples of a prompt, and for drift without gain in those less the
    held-out rewards' mean shift; ``kl`` in the training's own units, and unlit where it is None.

    Set in the shapes world on planted tastes for brightness and saturation, and on honest runs: docs/hacking.md.
    """

    statistics: Limit = Limit(0.25, 0.45)
    rewards: Limit = Limit(0.1, 0.25)
    variety_within: Limit = Limit(0.25, 0.4)
    variety_across: Limit = Limit(0.15, 0.25)
    drift: Limit = Limit(1.0, 1.5)
    drift_without_gain: Limit = Limit(0.15, 0.3)
    kl: Limit | None = None


@dataclass(frozen=True)
class Signal:
    """One reading of a panel: what it was of the untrained model and is now, and how far that is."""

    name: str
    before: float
    now: float
    shift: Estimate
    light: Light | None

    def __str__(self) -> str:
        return f"{self.name} {self.before:.3g} -> {self.now:.3g} (shift {self.shift.mean:+.2f})"


@dataclass(frozen=True)
class HackingReport:
    """All readings of one look."""

    signals: tuple[Signal, ...]

    @property
    def light(self) -> Light:
        """The worst of all."""
        lit = {signal.light for signal in self.signals}
        return "red" if "red" in lit else "amber" if "amber" in lit else "green"

    def of(self, light: Light) -> str:
        """The readings with one light, in words."""
        return ", ".join(str(signal) for signal in self.signals if signal.light == light)

    @property
    def alarm(self) -> str:
        """What is not green, the red first, in words; empty for nothing."""
        return "; ".join(f"{light}: {self.of(light)}" for light in ("red", "amber") if self.of(light))

    def as_list(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds of it."""
        return [asdict(signal) for signal in self.signals]

    @classmethod
    def from_list(cls, rows: Sequence[Mapping[str, Any]]) -> HackingReport:
        """The inverse of ``as_list``."""
        return cls(tuple(Signal(**{**row, "shift": Estimate(**row["shift"])}) for row in rows))


@dataclass(frozen=True)
class Measures:
    """What is read of a set of images or clips.

    ``rewards`` are held out: none of them is trained on. ``features`` give variety and drift, if there are any.
    ``shown`` are figures of a whole set that have no light, such as a verifier's entropy.
    """

    rewards: Mapping[str, RewardFunction] = field(default_factory=dict)
    features: FeatureFunction | None = None
    shown: Mapping[str, Callable[[Tensor, Sequence[Prompt]], float]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> PanelSnapshot:
        """Of images (N, 3, H, W) in [0, 1] or waveforms (N, C, L) in [-1, 1], and their prompts."""
        statistics = OF_IMAGES if samples.ndim == 4 else OF_WAVEFORMS
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        group = torch.tensor([texts.index(prompt.text) for prompt in prompts])
        return PanelSnapshot(
            group,
            {name: read(samples).double().cpu() for name, read in statistics.items()},
            {name: reward(samples, prompts).double().cpu() for name, reward in self.rewards.items()},
            None if self.features is None else F.normalize(self.features(samples).double().cpu(), dim=-1),
            {name: read(samples, prompts) for name, read in self.shown.items()},
        )


@dataclass(frozen=True)
class PanelSnapshot:
    """What was read of N images: (N,) each, features (N, d) of length 1, and figures of the whole set; ``group`` (N,)
    numbers their prompts."""

    group: Tensor
    statistics: Mapping[str, Tensor]
    rewards: Mapping[str, Tensor]
    features: Tensor | None
    shown: Mapping[str, float]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        shown = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.shown.items()}
        return (
            {"group": self.group}
            | with_prefix("statistics.", self.statistics)
            | with_prefix("rewards.", self.rewards)
            | ({} if self.features is None else {"features": self.features})
            | with_prefix("shown.", shown)
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PanelSnapshot:
        """The inverse of ``tensors``."""
        return cls(
            tensors["group"],
            without_prefix("statistics.", tensors),
            without_prefix("rewards.", tensors),
            tensors.get("features"),
            {name: float(value) for name, value in without_prefix("shown.", tensors).items()},
        )

    def by_prompt(self, values: Tensor) -> list[Tensor]:
        """Rows of ``values``, prompt by prompt."""
        return [values[self.group == number] for number in range(int(self.group.max()) + 1)]


def panel(before: PanelSnapshot, now: PanelSnapshot, kl: float, limits: Limits) -> HackingReport:
    """``now`` beside ``before``, of the same prompts and noises. ValueError where they are of different ones."""
    if not torch.equal(before.group, now.group):
        raise ValueError("looks at different prompts cannot be compared: take both with the same jobs")
    signals = [*_images(before, now, limits), *_features(before, now, limits), *_shown(before, now)]
    return HackingReport((*signals, _kl(kl, limits.kl)) if math.isfinite(kl) else tuple(signals))


def _images(before: PanelSnapshot, now: PanelSnapshot, limits: Limits) -> Iterator[Signal]:
    """Statistics and rewards, image by image."""
    kinds: tuple[tuple[Mapping[str, Tensor], Mapping[str, Tensor], Limit, Side], ...] = (
        (before.statistics, now.statistics, limits.statistics, "either"),
        (before.rewards, now.rewards, limits.rewards, "fall"),
    )
    for old, new, limit, side in kinds:
        for name, values in old.items():
            shift = _over_prompts(before.by_prompt(_in_spreads(values, new[name])))
            if shift is not None:
                yield Signal(name, _mean(values), _mean(new[name]), shift, limit.light(shift, side))
            else:
                logger.warning("%s could not be read of any two prompts, and has no light this time", name)


def _features(before: PanelSnapshot, now: PanelSnapshot, limits: Limits) -> Iterator[Signal]:
    """Variety and drift."""
    if before.features is None or now.features is None:
        return
    old, new = before.by_prompt(before.features), now.by_prompt(now.features)
    within = torch.tensor([[vendi_score(rows) for rows in side] for side in (old, new)], dtype=torch.float64)
    first, last = within.mean(1).tolist()
    shift = t_interval(((within[1] - within[0]) / first).tolist())
    yield Signal("variety within a prompt", first, last, shift, limits.variety_within.light(shift, "fall"))
    first, last = vendi_score(before.features), vendi_score(now.features)
    shift = _exactly(last / first - 1)
    yield Signal("variety across prompts", first, last, shift, limits.variety_across.light(shift, "fall"))
    apart = _mean(torch.stack([_distance_within(rows) for rows in old]))
    drift = (1 - (before.features * now.features).sum(1)) / max(apart, 1e-12)
    yield from _drifts(before, drift, _gains(before, now), limits)


def _drifts(before: PanelSnapshot, drift: Tensor, gains: Tensor, limits: Limits) -> Iterator[Signal]:
    """How far images have gone (N,), and how much of that the held-out rewards' ``gains`` (N,) do not pay for."""
    for name, values, limit in (
        ("drift of features", drift, limits.drift),
        ("drift without gain", drift - gains, limits.drift_without_gain),
    ):
        shift = _over_prompts(before.by_prompt(values))
        if shift is not None:
            yield Signal(name, 0.0, _mean(values), shift, limit.light(shift, "rise"))


def _gains(before: PanelSnapshot, now: PanelSnapshot) -> Tensor:
    """The mean over held-out rewards of their shifts (N,); NaN where there is none."""
    found = [_in_spreads(values, now.rewards[name]) for name, values in before.rewards.items()]
    return torch.stack(found).nanmean(0) if found else torch.full(before.group.shape, torch.nan, dtype=torch.float64)


def _in_spreads(old: Tensor, new: Tensor) -> Tensor:
    """Differences (N,) in standard deviations of ``old``."""
    return (new - old) / old[old.isfinite()].std().clamp(min=1e-12)


def _shown(before: PanelSnapshot, now: PanelSnapshot) -> Iterator[Signal]:
    for name, value in before.shown.items():
        if math.isfinite(value) and math.isfinite(now.shown[name]):
            yield Signal(name, value, now.shown[name], _exactly(now.shown[name] - value), None)


def _kl(kl: float, limit: Limit | None) -> Signal:
    shift = _exactly(kl)
    return Signal("KL", 0.0, kl, shift, limit.light(shift, "rise") if limit else None)


def _over_prompts(values: Sequence[Tensor]) -> Estimate | None:
    """The mean over prompts; None where fewer than two prompts have a finite value."""
    finite = [rows[rows.isfinite()] for rows in values]
    means = [float(rows.mean()) for rows in finite if len(rows)]
    return t_interval(means) if len(means) > 1 else None


def _exactly(value: float) -> Estimate:
    return Estimate(value, value, value, 1)


def _mean(values: Tensor) -> float:
    return float(values[values.isfinite()].mean()) if bool(values.isfinite().any()) else math.nan


def _distance_within(rows: Tensor) -> Tensor:
    """The mean of 1 - cosine over pairs of rows of length 1."""
    n = len(rows)
    return (1 - rows @ rows.T).sum() / (n * (n - 1))


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Actions:
    """What a red light does beside the line in the log.

    ``stop`` ends the run. ``raise_kl`` doubles the weight of the distance from the reference policy, to that value or
    more. ``keep_best`` writes the weights of the best look without a red light, by the mean shift of the held-out
    rewards, to the folder ``best``.
    """

    stop: bool = False
    raise_kl: float | None = None
    keep_best: bool = False

    def __post_init__(self) -> None:
        if self.raise_kl is not None and not self.raise_kl > 0:
            raise ValueError(f"raise_kl must be a positive weight, not {self.raise_kl}")


def due(rounds_done: int, every: int, last: bool) -> bool:
    """Whether a look every ``every`` rounds is due: after the first, and the last, too."""
    return rounds_done == 1 or rounds_done % every == 0 or last


class Guard:
    """``look`` reads the model as it is, first by ``begin`` before training. ``rewards`` names the held-out ones.
    ``stopped`` tells whether a red light has ended the run.

    Raises:
        ValueError: ``keep_best`` without a held-out reward.
    """

    def __init__(
        self, look: Callable[[], PanelSnapshot], rewards: tuple[str, ...], limits: Limits, actions: Actions, every: int
    ) -> None:
        if actions.keep_best and not rewards:
            raise ValueError("hacking.on_red.keep_best needs a reward to go by: name one in hacking.rewards")
        self.actions, self.every = actions, every
        self._look, self._rewards, self._limits = look, rewards, limits
        self._before: PanelSnapshot | None = None
        self._best = -math.inf
        self.stopped = False

    def begin(self) -> None:
        """Look at the untrained model."""
        self._before = self._look()

    def panel(self, rounds_done: int, last: bool, kl: float) -> HackingReport | None:
        """What is seen after a round; None where none is due."""
        if not due(rounds_done, self.every, last):
            return None
        if self._before is None:
            raise ValueError("there is nothing to compare with: call begin() before training")
        seen = panel(self._before, self._look(), kl, self._limits)
        if seen.alarm:
            logger.warning("round %d: the reward may be exploited: %s", rounds_done, seen.alarm)
        return seen

    def is_best(self, seen: HackingReport) -> bool:
        """Whether ``keep_best`` asks for these weights to be kept."""
        if not self.actions.keep_best or seen.light == "red":
            return False
        shifts = [signal.shift.mean for signal in seen.signals if signal.name in self._rewards]
        score = sum(shifts) / len(shifts) if shifts else -math.inf
        better, self._best = score > self._best, max(score, self._best)
        return better

    def state(self) -> State:
        """The look at the untrained model, the best score so far, and whether the run is over."""
        tensors = self._before.tensors() if self._before else {}
        return State(tensors, {"best": self._best if math.isfinite(self._best) else None, "stopped": self.stopped})

    def restore(self, state: State) -> None:
        """Put back what ``state()`` gave."""
        self._before = PanelSnapshot.from_tensors(state.tensors)
        self._best = -math.inf if state.numbers["best"] is None else state.numbers["best"]
        self.stopped = state.numbers["stopped"]
