"""The properties that every combination of rewards of single samples is held to, one by one, over all combinations.

To add a combination, add a case to ``CASES``: how it is made, its worked numbers, and the properties that it does not
have, each with the reason. A property that is listed there and holds after all fails the test.

=====  =================================================================================================================
NaN    A sample that a member could not score has score NaN, and the others keep theirs.
flat   Where all samples score alike by each member, all have the same score, and it is finite.
ties   Samples with equal scores by all members have equal scores.
alone  A sample scores the same alone and in any batch, in any order.
two    Of two samples the one that is better by all members scores no lower, and higher in one of a few pairs.
shift  A constant, added to the scores and to what the combination compares them with, adds a multiple of itself.
=====  =================================================================================================================

Ensembles that need whole groups are credits: ``tests/genalign/algorithms/test_credit_properties.py`` has their table.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
from torch import Tensor

from genalign.types import Prompt, RewardFunction
from rewards import combine, shaped
from rewards.combine import (
    DirectionalCorrection,
    Gate,
    HarmonicMean,
    MeanMinusVariance,
    Product,
    Standardized,
    TextRelativeReward,
    WeightedSum,
    WorstCase,
)
from rewards.shaped import Calibrated, Ceiling, LogSigmoidCentered, PreferenceAsReward, Residualized

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Column:
    """A reward that reads a number of its sample."""

    place: int

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return samples[:, self.place]


@dataclass(frozen=True)
class Case:
    """A combination of the rewards ``A`` and ``B``.

    Attributes:
        make: Make it for scores that a constant was added to.
        worked: A combination, the scores of samples by A and B, and the combination's scores by hand or from fixtures.
        adds: The multiple of the constant that it adds to a score.
        members: The number of rewards that it combines: A alone, or both.
        exceptions: The properties that it does not have, and why.
        tolerance: The largest error of a worked number, beside the rounding of the result to float32.
    """

    make: Callable[[float], RewardFunction]
    worked: tuple[RewardFunction, Rows, list[float]]
    adds: float = 0.0
    members: int = 2
    exceptions: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-8


A, B = Column(0), Column(1)
EXAMPLE = torch.tensor([[0.25, 0.5], [0.75, 0.25], [0.5, 1.0], [1.0, 0.75], [0.5, 0.5], [0.25, 1.25]])
PAIRS = [([0.25, 0.25], [0.5, 4.0]), ([0.5, 0.5], [1.0, 0.75]), ([0.25, 1.0], [0.75, 1.25])]  # the better one second
BASE = (0.5, 0.75, 1.0)
RATIO = "scores have a zero of their own"

CASES: dict[str, Case] = {
    "WeightedSum": Case(
        lambda constant: WeightedSum([A, B], [0.75, 0.5]),
        (WeightedSum([A, B], [2.0, -0.5]), [[1.0, 4.0], [0.5, -2.0]], [0.0, 2.0]),
        adds=1.25,
    ),
    "Product": Case(
        lambda constant: Product([A, B]),
        (Product([A, B]), [[0.5, 0.25], [2.0, 3.0], [0.0, 7.0]], [0.125, 6.0, 0.0]),
        exceptions={"shift": RATIO},
    ),
    "HarmonicMean": Case(
        lambda constant: HarmonicMean([A, B]),
        (HarmonicMean([A, B], [3.0, 1.0]), [[0.5, 0.25], [2.0, 1.0]], [0.4, 1.6]),  # 4 / (6 + 4) and 4 / (1.5 + 1)
        exceptions={"shift": RATIO},
    ),
    "WorstCase": Case(
        lambda constant: WorstCase([A, B]), (WorstCase([A, B]), [[0.5, 0.25], [-2.0, 3.0]], [0.25, -2.0]), adds=1.0
    ),
    "MeanMinusVariance": Case(
        lambda constant: MeanMinusVariance([A, B], 2.0),
        (MeanMinusVariance([A, B], 0.1, ddof=1), [[1.0, 3.0], [2.0, 2.0]], [1.8, 2.0]),  # variance 2 of 1 and 3
        adds=1.0,
        exceptions={"two": "a member that is far ahead of the other adds to the variance"},
    ),
    "Standardized": Case(
        lambda constant: Standardized(A, 0.5 + constant, 0.25),
        (Standardized(A, 0.5, 0.25), [[1.0, 0.0], [0.25, 0.0]], [2.0, -1.0]),
        members=1,
    ),
    "Gate": Case(
        lambda constant: Gate(A, B, 0.5 + constant, otherwise=constant),
        (Gate(A, B, 0.5, otherwise=-1.0), [[3.0, 0.5], [3.0, 0.25]], [3.0, -1.0]),
        adds=1.0,
        exceptions={"NaN": "a closed gate does not ask for the missing score"},
    ),
    "PreferenceAsReward": Case(
        lambda constant: PreferenceAsReward(A, [level + constant for level in BASE]),
        (
            PreferenceAsReward(A, [0.5, 1.5, 2.5]),
            [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [5.0, 0.0]],
            [0.2119414575, 0.3941418413, 0.6058581587, 0.9612808822],
        ),
        members=1,
    ),
    "Calibrated": Case(
        lambda constant: Calibrated(A, [level + constant for level in BASE]),
        (Calibrated(A, [1.0, 2.0, 2.0, 3.0]), [[0.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]], [0.0, 0.5, 0.875, 1.0]),
        members=1,
    ),
    "Calibrated, tilted": Case(
        lambda constant: Calibrated(A, [level + constant for level in BASE], tilt=-10.0),
        (
            Calibrated(A, [1.0, 2.0, 2.0, 3.0], tilt=10.0),
            [[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]],
            [math.exp(-10), math.exp(-5), 1.0],
        ),
        members=1,
    ),
    "LogSigmoidCentered": Case(
        lambda constant: LogSigmoidCentered(A, 0.5 + constant, scale=3.0),
        (
            LogSigmoidCentered(A, 1.0, scale=2.0),
            [[1.0, 0.0], [3.0, 0.0], [-19.0, 0.0]],
            [-math.log(2), -math.log1p(math.exp(-4)), -40.0],
        ),
        members=1,
        tolerance=1e-7,  # computed in float32
    ),
    "LogSigmoidCentered by prompt": Case(
        lambda constant: LogSigmoidCentered(A, {"a": 0.5 + constant}),
        (LogSigmoidCentered(A, {"a": 2.0}), [[2.0, 0.0]], [-math.log(2)]),
        members=1,
        tolerance=1e-7,
    ),
    "Ceiling": Case(
        lambda constant: Ceiling(A, 0.75 + constant),
        (Ceiling(A, 2.0), [[1.0, 0.0], [5.0, 0.0]], [1.0, 2.0]),
        adds=1.0,
        members=1,
    ),
    "Residualized": Case(
        lambda constant: Residualized(A, B, 0.5, 0.75 + constant),
        (Residualized(A, B, 0.5, 1.0), [[2.0, 3.0], [1.0, 1.0]], [1.0, 1.0]),
        adds=1.0,
        exceptions={"two": "more of the nuisance counts against a sample"},
    ),
}


def scored(reward: RewardFunction, samples: Tensor) -> Tensor:
    scores = reward(samples, [Prompt("a")] * len(samples))
    assert scores.shape == (len(samples),) and scores.dtype == torch.float32
    return scores


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("module", [combine, shaped])
def test_every_combination_has_a_case(module: ModuleType) -> None:
    """A combination is a class that is called with samples and prompts."""
    calls = {
        value: list(inspect.signature(inspect.getattr_static(value, "__call__")).parameters)
        for _, value in inspect.getmembers(module, inspect.isclass)
        if value.__module__ == module.__name__
    }
    own = {value for value, arguments in calls.items() if arguments == ["self", "samples", "prompts"]}
    own -= {DirectionalCorrection, TextRelativeReward}  # of the encoder of one reward: test_combine has their numbers
    assert own and own <= {type(case.make(0.0)) for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_worked_numbers(name: str) -> None:
    reward, rows, expected = CASES[name].worked
    assert scored(reward, torch.tensor(rows)).tolist() == pytest.approx(expected, rel=2**-23, abs=CASES[name].tolerance)


def missing(case: Case) -> None:
    reward = case.make(0.0)
    expected = scored(reward, EXAMPLE)
    for member in range(case.members):
        samples = EXAMPLE.clone()
        samples[1, member] = math.nan
        scores = scored(reward, samples)
        assert scores.isnan().tolist() == [False, True, False, False, False, False]
        assert torch.equal(scores[~scores.isnan()], expected[~scores.isnan()])


def without_spread(case: Case) -> None:
    scores = scored(case.make(0.0), torch.full((4, 2), 0.5))
    assert bool(scores.isfinite().all()) and bool((scores == scores[0]).all())


def ties(case: Case) -> None:
    """Give the scores of each sample in turn to the next one."""
    for row in range(len(EXAMPLE)):
        following = (row + 1) % len(EXAMPLE)
        samples = EXAMPLE.clone()
        samples[following] = EXAMPLE[row]
        scores = scored(case.make(0.0), samples)
        assert scores[row] == scores[following]


def any_batch(case: Case) -> None:
    reward = case.make(0.0)
    expected = scored(reward, EXAMPLE)
    order = torch.tensor([3, 5, 0, 2, 1, 4])
    close(scored(reward, EXAMPLE[order]), expected[order])
    for size in (1, 2):
        close(torch.cat([scored(reward, part) for part in torch.split(EXAMPLE, size)]), expected)


def pairs(case: Case) -> None:
    gains = [float(scored(case.make(0.0), torch.tensor(pair)).diff()) for pair in PAIRS]
    assert min(gains) >= 0 and max(gains) > 0


def shift(case: Case) -> None:
    constant = 2.0
    expected = scored(case.make(0.0), EXAMPLE) + case.adds * constant
    close(scored(case.make(constant), EXAMPLE + constant), expected)


PROPERTIES: dict[str, Callable[[Case], None]] = {
    "NaN": missing,
    "flat": without_spread,
    "ties": ties,
    "alone": any_batch,
    "two": pairs,
    "shift": shift,
}


def _parameters() -> list[object]:
    return [
        pytest.param(
            name,
            label,
            marks=[pytest.mark.xfail(strict=True, raises=AssertionError, reason=case.exceptions[label])]
            if label in case.exceptions
            else [],
        )
        for name, case in CASES.items()
        for label in PROPERTIES
    ]


@pytest.mark.parametrize(("name", "label"), _parameters())
def test_properties(name: str, label: str) -> None:
    PROPERTIES[label](CASES[name])


def test_exceptions_name_properties() -> None:
    assert {label for case in CASES.values() for label in case.exceptions} <= PROPERTIES.keys()
