"""Automatic labels: comparisons judged by rewards, with chosen noise, or by judges of pairs.

All noise is drawn by hashes of the prompt, the samples' files, the annotator and the dimension, so labels are the
same in any order and after an interruption.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from genalign.diffusion.noise import derived_seed, seeded_uniform
from genalign.reward_learning.preferences import Judgment, Kind
from genalign.runtime.media import AUDIO_SUFFIXES, waveform_rate
from genalign.scoring.judge_orders import OneOrder, OneOrderJudge, both_orders
from genalign.scoring.score import NamedReward, score
from genalign.types import AnyCallable, Prompt

logger = logging.getLogger(__name__)

ItemKey = tuple[str, Path | bytes]
"""A sample of a prompt: the prompt's text, and the sample's file or bytes."""


class Labeler(Protocol):
    """Judges comparisons without a person."""

    @property
    def annotator_names(self) -> tuple[str, ...]:
        """The names under which it judges."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions in which it judges."""

    def label(
        self, comparisons: Sequence[Judgment], device: str = "cpu", dimensions: Collection[str] | None = None
    ) -> list[Judgment | None]:
        """Judge comparisons, each as its annotator.

        Args:
            comparisons: The comparisons, each with the name of its annotator.
            device: The torch device that the samples are on when they are scored.
            dimensions: Those of its dimensions in which it judges; None for all.

        Returns:
            The judgments, without the dimensions that cannot be judged; None where none can.

        Raises:
            ValueError: It does not give judgments of the kind of a comparison.
        """


@dataclass(frozen=True)
class LabelNoise:
    """Errors of a simulated annotator, each drawn by itself, in this order.

    Args:
        tie_margin: Largest difference of two scores that is a tie.
        ties: Probability that a decided pair is called a tie.
        flips: Probability that the worse sample of a decided pair is preferred, that a label is the opposite one, or
            that a rating is another grade, any of them alike.
        position_bias: Probability that the first sample of a pair is preferred in every dimension, whatever it is.
        seed: Seed of all draws.
    """

    tie_margin: float = 0.0
    ties: float = 0.0
    flips: float = 0.0
    position_bias: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ties", "flips", "position_bias"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"{name} is a probability, in [0, 1], not {vars(self)[name]}")
        if not 0 <= self.tie_margin < math.inf:
            raise ValueError(f"tie_margin must be a finite difference of scores, at least 0, not {self.tie_margin}")

    def preferred(self, difference: float, draw: Callable[[str], float]) -> float:
        """Return the share of the preference for the first of two samples: 1, 0, or 1/2 for a tie.

        Args:
            difference: The first sample's score less the second's.
            draw: Draws a number in [0, 1) by the name of an error.
        """
        if abs(difference) <= self.tie_margin or draw("tie") < self.ties:
            return 0.5
        return float((difference > 0) != (draw("flip") < self.flips))


@dataclass(frozen=True)
class SimulatedAnnotator:
    """How an annotator of ``RewardLabeler`` differs from the others.

    Args:
        taste: A reward whose scores are added in every dimension; null for none.
        weight: Weight of the taste.
        noise: The annotator's errors; null takes the labeler's.
    """

    taste: AnyCallable | None = None
    weight: float = 1.0
    noise: LabelNoise | None = None


@dataclass(frozen=True)
class RewardLabeler:
    """Labels by rewards, such as an embedded world's verifier: for experiments whose truth is known.

    Args:
        rewards: A reward by the name of each dimension, as in {"overall": ...}.
        noise: Errors of the annotators.
        annotators: The annotators by name, each with a taste or errors of its own; without any, one is named "reward".
        grades: Number of grades of ratings, from 1.
        low: The score at which the lowest grade begins; lower scores have it, too.
        high: The score at which the highest grade ends; higher scores have it, too.
        threshold: The least score of a sample whose label is 1.
    """

    rewards: dict[str, AnyCallable]
    noise: LabelNoise = LabelNoise()
    annotators: dict[str, SimulatedAnnotator] = field(default_factory=dict)
    grades: int = 5
    low: float = 0.0
    high: float = 1.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("labels need one reward or more: name it, as in rewards.overall")
        if self.grades < 2 or not self.low < self.high:
            raise ValueError(
                f"ratings need two grades or more, and low below high, not {self.grades} grades from {self.low} to"
                f" {self.high}"
            )

    @property
    def annotator_names(self) -> tuple[str, ...]:
        """The names of ``annotators``; "reward" where there are none."""
        return tuple(self.annotators) or ("reward",)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that it judges: the names of its ``rewards``."""
        return tuple(self.rewards)

    def label(
        self, comparisons: Sequence[Judgment], device: str = "cpu", dimensions: Collection[str] | None = None
    ) -> list[Judgment | None]:
        """Judge comparisons by the scores of their samples, in the dimensions that have a score of every sample.

        Raises ValueError for a ranking by an annotator with errors, which are of pairs.
        """
        items = _items(comparisons, device)
        names = self.dimensions if dimensions is None else dimensions
        columns = {name: _scores(name, reward, items) for name, reward in self.rewards.items() if name in names}
        tastes: dict[str, Mapping[ItemKey, float]] = {}
        for name, annotator in self.annotators.items():
            if annotator.taste is not None:
                own = {key: items[key] for one in comparisons if one.annotator == name for key in _keys(one)}
                tastes[name] = _scores(f"taste of {name}", annotator.taste, own)
        return [self._judged(comparison, columns, tastes) for comparison in comparisons]

    def _judged(
        self,
        comparison: Judgment,
        columns: Mapping[str, Mapping[ItemKey, float]],
        tastes: Mapping[str, Mapping[ItemKey, float]],
    ) -> Judgment | None:
        annotator = self.annotators.get(comparison.annotator or "", SimulatedAnnotator())
        noise, taste = annotator.noise or self.noise, tastes.get(comparison.annotator or "", {})
        if comparison.kind == "ranking" and replace(noise, seed=0) != LabelNoise():
            raise ValueError("label noise is of pairs, ratings and labels: rank without it, or judge pairs")
        digests = [sample.digest() for sample in comparison.samples]
        named = (comparison.annotator or "", comparison.prompt.text, *digests)
        always_first = _uniform(noise.seed, "position", *named) < noise.position_bias
        scores: dict[str, tuple[float, ...]] = {}
        for dimension, column in columns.items():
            values = [column[key] + annotator.weight * taste.get(key, 0.0) for key in _keys(comparison)]
            draw = lambda error, dimension=dimension: _uniform(noise.seed, error, dimension, *named)  # noqa: E731
            if all(map(math.isfinite, values)):
                scores[dimension] = self._answer(comparison.kind, values, noise, always_first, draw)
        return replace(comparison, scores=scores) if scores else None

    def _answer(
        self, kind: Kind, values: Sequence[float], noise: LabelNoise, always_first: bool, draw: Callable[[str], float]
    ) -> tuple[float, ...]:
        """Return what is said of samples in a dimension, by their scores and the errors that are drawn."""
        if kind == "pair":
            first = 1.0 if always_first else noise.preferred(values[0] - values[1], draw)
            return first, 1 - first
        if kind == "ranking":
            return tuple(values)
        return tuple(self._grade(kind, value, noise, draw) for value in values)

    def _grade(self, kind: Kind, value: float, noise: LabelNoise, draw: Callable[[str], float]) -> float:
        """Return the rating or label of a score."""
        flipped = draw("flip") < noise.flips
        if kind == "label":
            return float((value >= self.threshold) != flipped)
        share = (value - self.low) / (self.high - self.low)
        grade = 1 + min(max(math.floor(share * self.grades), 0), self.grades - 1)
        others = [other for other in range(1, self.grades + 1) if other != grade]
        return float(others[int(draw("grade") * len(others))] if flipped else grade)


@dataclass(frozen=True)
class JudgeLabeler:
    """Labels of pairs by judges, such as ``rewards.remote.vlm_judges.WrittenPairwiseJudge``, whose reasons are kept.

    A judge returns probabilities that the first sample is better, which are the shares of the preference. In both
    orders, a pair of which each order prefers another sample is a tie (``genalign.scoring.judge_orders.both_orders``).

    Args:
        judges: A judge of pairs by the name of each dimension, as in {"overall": ...}.
        both_orders: Ask in both orders, which costs twice as much; false asks in the order in which they are listed,
            and is for judges of your own that ask in both orders themselves.
        annotator: Name of the annotator.
    """

    judges: dict[str, AnyCallable]
    both_orders: bool = True
    annotator: str = "judge"

    def __post_init__(self) -> None:
        if not self.judges:
            raise ValueError("labels need one judge or more: name it, as in judges.overall")

    @property
    def annotator_names(self) -> tuple[str, ...]:
        """The one name under which all judges answer."""
        return (self.annotator,)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that it judges: the names of its ``judges``."""
        return tuple(self.judges)

    def label(
        self, comparisons: Sequence[Judgment], device: str = "cpu", dimensions: Collection[str] | None = None
    ) -> list[Judgment | None]:
        """Judge pairs, in the dimensions whose judge has an answer. Raises ValueError for another kind."""
        if other := next((one.kind for one in comparisons if one.kind != "pair"), None):
            raise ValueError(f"a judge of pairs gives no {other}: judge pairs")
        names = self.dimensions if dimensions is None else dimensions
        judges = [(name, judge) for name, judge in self.judges.items() if name in names]
        scores: list[dict[str, tuple[float, ...]]] = [{} for _ in comparisons]
        reasons: list[list[str]] = [[] for _ in comparisons]
        for (name, judge), batch in itertools.product(judges, _pairs_by_shape(comparisons, device)):
            places, left, right = batch
            answers = self._ask(name, judge, left, right, [comparisons[place].prompt for place in places])
            for place, preferred, reason in zip(places, answers.preferred.tolist(), answers.written, strict=True):
                if math.isfinite(preferred):
                    scores[place][name] = (preferred, 1 - preferred)
                if reason:
                    reasons[place].append(reason if len(self.judges) == 1 else f"{name}: {reason}")
        return [
            replace(comparison, scores=own, reason="\n\n".join(written) or None) if own else None
            for comparison, own, written in zip(comparisons, scores, reasons, strict=True)
        ]

    def _ask(self, name: str, judge: AnyCallable, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> OneOrder:
        """Ask a judge, and combine its answers and what it wrote in both orders."""
        first = _one_order(judge, left, right, prompts)
        if not self.both_orders:
            return first
        second = _one_order(judge, right, left, prompts)
        preferred, consistency = both_orders(first.preferred, second.preferred)
        if consistency.pairs:
            logger.log(
                logging.WARNING if consistency.share < 0.5 else logging.INFO,
                "the judge of %s prefers the same sample in both orders in %d of %d pairs, the others are ties;"
                " position bias %+.3f (0 is none, 0.5 is always the first)",
                *(name, consistency.consistent, consistency.pairs, consistency.bias),
            )
        written = [
            "\n\n".join(f"{order}: {text}" for order, text in (("in this order", a), ("in the other order", b)) if text)
            for a, b in zip(first.written, second.written, strict=True)
        ]
        return OneOrder(preferred, tuple(text or None for text in written))


def _pairs_by_shape(comparisons: Sequence[Judgment], device: str) -> list[tuple[list[int], Tensor, Tensor]]:
    """Stack the pairs whose samples have the same shapes: their numbers, and the first and second samples (n, ...)."""
    items = _items(comparisons, device)
    shapes: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, comparison in enumerate(comparisons):
        shapes.setdefault(tuple(items[key][1].shape for key in _keys(comparison)), []).append(place)
    batches = []
    for places in shapes.values():
        keys = [_keys(comparisons[place]) for place in places]
        left, right = (torch.stack([items[key][1] for key in side]) for side in zip(*keys, strict=True))
        batches.append((places, left, right))
    return batches


def _one_order(judge: AnyCallable, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> OneOrder:
    if isinstance(judge, OneOrderJudge):
        return judge.in_one_order(left, right, prompts)
    return OneOrder(judge(left, right, prompts).detach().float().cpu(), (None,) * len(prompts))


def unlabeled(
    comparisons: Iterable[Judgment],
    annotators: Sequence[str],
    kind: Kind | None = None,
    per_comparison: int | None = None,
    seed: int = 0,
) -> list[Judgment]:
    """List what annotators are to judge: of each comparison, by whom, without scores.

    Args:
        comparisons: Comparisons of two samples or more.
        annotators: The names of the annotators.
        kind: What is asked: "pair" asks about all pairs of a comparison's samples, "ranking" about all of them,
            "rating" and "label" about each; None asks what the comparison says.
        per_comparison: The number of annotators of a comparison, drawn by ``seed``; None for all.
        seed: Seed of the draw.

    Returns:
        Judgments without scores, each once.
    """
    tasks: dict[tuple[object, ...], Judgment] = {}
    for comparison in comparisons:
        names = list(annotators)
        if per_comparison is not None and per_comparison < len(names):
            digests = [sample.digest() for sample in comparison.samples]
            drawn = {name: derived_seed(seed, "annotators", comparison.prompt.text, *digests, name) for name in names}
            names = sorted(names, key=drawn.__getitem__)[:per_comparison]
        task_kind = kind or comparison.kind
        sizes = {"pair": 2, "ranking": len(comparison.samples)}
        for samples in itertools.combinations(comparison.samples, sizes.get(task_kind, 1)):
            for name in names:
                task = Judgment(comparison.prompt, samples, task_kind, annotator=name)
                tasks.setdefault(task_key(task), task)
    return list(tasks.values())


def task_key(judgment: Judgment) -> tuple[object, ...]:
    """Return what tells the judgments of a dataset apart: what was asked of whom, about which samples in any order."""
    samples = frozenset(sample.content for sample in judgment.samples)
    return judgment.kind, judgment.prompt.text, samples, judgment.annotator


def missing_dimensions(
    tasks: Iterable[Judgment], judgments: Iterable[Judgment], dimensions: Sequence[str]
) -> dict[tuple[str, ...], list[Judgment]]:
    """Group what is still to be judged by the dimensions in which it is.

    Args:
        tasks: What annotators are to judge, as ``unlabeled`` lists it.
        judgments: The judgments that were made; those of a task may be in different dimensions.
        dimensions: The dimensions in which each task is to be judged.

    Returns:
        The tasks by their missing dimensions, in order; those with all dimensions are left out.
    """
    judged: dict[tuple[object, ...], set[str]] = {}
    for judgment in judgments:
        judged.setdefault(task_key(judgment), set()).update(judgment.scores)
    groups: dict[tuple[str, ...], list[Judgment]] = {}
    for task in tasks:
        known = judged.get(task_key(task), ())
        if missing := tuple(name for name in dimensions if name not in known):
            groups.setdefault(missing, []).append(task)
    return groups


def sample_rate(judgments: Iterable[Judgment]) -> int | None:
    """Return the sample rate of the judged sounds in Hz, None for images. Raises ValueError where they differ."""
    contents = {sample.content for judgment in judgments for sample in judgment.samples}
    rates = {
        content: waveform_rate(content)
        for content in contents
        if isinstance(content, Path) and content.suffix.lower() in AUDIO_SUFFIXES
    }
    if not rates:
        return None
    by_rate = {rate: path for path, rate in rates.items()}
    if len(by_rate) > 1 or len(rates) < len(contents):
        kinds = [f"{path} at {rate} Hz" for rate, path in sorted(by_rate.items())]
        raise ValueError(
            f"the samples are not alike: {', '.join(kinds)}{'' if len(rates) == len(contents) else ', and images'}:"
            " give sounds of one sample rate, or images"
        )
    return next(iter(by_rate))


def _keys(comparison: Judgment) -> list[ItemKey]:
    return [(comparison.prompt.text, sample.content) for sample in comparison.samples]


def _items(comparisons: Sequence[Judgment], device: str) -> dict[ItemKey, tuple[Prompt, Tensor]]:
    """Read every sample of comparisons once, with its prompt."""
    items: dict[ItemKey, tuple[Prompt, Tensor]] = {}
    for comparison in comparisons:
        for key, sample in zip(_keys(comparison), comparison.samples, strict=True):
            if key not in items:
                items[key] = (comparison.prompt, sample.read().to(device))
    return items


def _scores(name: str, reward: AnyCallable, items: Mapping[ItemKey, tuple[Prompt, Tensor]]) -> dict[ItemKey, float]:
    """Score samples, those of one shape at once; NaN where the reward has none."""
    shapes: dict[torch.Size, list[ItemKey]] = {}
    for key, (_, sample) in items.items():
        shapes.setdefault(sample.shape, []).append(key)
    scores: dict[ItemKey, float] = {}
    for keys in shapes.values():
        prompts, samples = [items[key][0] for key in keys], torch.stack([items[key][1] for key in keys])
        column = score([NamedReward(name, reward)], samples, prompts)[:, 0]
        scores |= dict(zip(keys, column.tolist(), strict=True))
    return scores


def _uniform(seed: int, *parts: str) -> float:
    """Draw a number in [0, 1) by a name."""
    return float(seeded_uniform([derived_seed(seed, "label", *parts)]))
