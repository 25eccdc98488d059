"""The properties that every credit is held to, one by one, over all credits.

To add a credit, add a case to ``CASES``: how it is made, its worked numbers, and the properties that it does not have,
each with the reason. A property that is listed there and holds after all fails the test, and so does one that fails by
another error than a failed comparison, or, where the credit refuses the scores, its refusal.

=====  =================================================================================================================
GP1    Permuting the samples permutes the credit.
GP2    Renaming the groups changes nothing.
GP3    A group does not change the credit of another group.
GP4    A NaN score gets exactly 0, and leaves the others as if the sample were absent.
GP5    A zero-variance group gets exactly 0.
GP6    A group of one gets exactly 0.
GP7    Where all scores are NaN, all credit is 0.
GP8    Scores times 1e6 and 1e-6 have finite credit, and some that is not 0.
GP9    The result is float32; the arithmetic within is float64, so that a large constant in the scores is no error.
GP10   A reward of weight 0 changes nothing.
part   A sample without the score of one reward gets exactly 0, and leaves the others as if it were absent.
shift  A constant for each group, added to its scores, changes nothing (a "contrastive reward" is such a constant).
ties   Samples of a group with equal scores get equal credit.
flat   Where no group has spread, credit is finite.
sign   A reward of negative weight counts as its negative with a positive one.
two    In groups of two credit is finite, and the sample that is better in all rewards at every step gets more.
=====  =================================================================================================================
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from genalign.algorithms import credit as sample_credit
from genalign.algorithms import multi_reward_credit, step_credit
from genalign.algorithms.credit import (
    BestAndWorst,
    BestOfNCredit,
    BestOnly,
    BetaNormalized,
    DifficultyWeighted,
    DrawnPreference,
    ExponentialWeights,
    GaussianRank,
    GroupRelative,
    HierarchicalPairs,
    LeaveOneOut,
    NormalizedSum,
    PlainReward,
    SetContrast,
    SpreadDiscounted,
    TaskNormalized,
    Thresholded,
    VirtualBest,
)
from genalign.algorithms.interfaces import Credit, RoundScores
from genalign.algorithms.multi_reward_credit import (
    AmongCorrect,
    CorrelationWeighted,
    Decorrelated,
    GatedBySuccess,
    LogTamed,
)
from genalign.algorithms.step_credit import RewardGain, TurningPoint, ValueAnchored
from rewards import combine
from rewards.combine import (
    DeviationPenalty,
    EnsembleCredit,
    NominalAndWorst,
    UncertaintyDiscount,
    VariancePenalty,
    median,
)

Columns = Sequence[Sequence[float]]
NAMES = ("first", "second", "reported")


def round_scores(*groups: Columns, tasks: Sequence[int] | None = None) -> RoundScores:
    """Scores of groups of samples, each with a score for each reward; all rewards weigh 1."""
    scores = torch.tensor([sample for group in groups for sample in group])
    group = torch.tensor([number for number, samples in enumerate(groups) for _ in samples])
    task = None if tasks is None else torch.tensor(tasks)[group]
    return RoundScores(scores, (1.0,) * scores.shape[1], group, task=task, names=NAMES[: scores.shape[1]])


def one_reward(*groups: Sequence[float], tasks: Sequence[int] | None = None) -> RoundScores:
    return round_scores(*[[[score] for score in group] for group in groups], tasks=tasks)


def steps_of_one_reward(table: Columns) -> RoundScores:
    """Scores R_0, ..., R_S (B, S + 1) of one group."""
    stepwise = torch.tensor(table)[:, :, None]
    return replace(one_reward([0.0] * len(table)), scores=stepwise[:, -1], stepwise=stepwise)


def near_half(features: Tensor) -> float:
    """A set reward that is no sum over samples: how near the mean of the first feature is to 1/2."""
    return -abs(float(features[:, 0].mean()) - 0.5)


@dataclass(frozen=True)
class Case:
    """A credit.

    Attributes:
        make: Make the credit for rewards in [0, scale], of which two of weight 1 count.
        worked: A credit, scores, and the credit's values by hand or from the reference's fixtures.
        exceptions: The properties that the credit does not have, and why.
        refusals: The properties whose scores the credit refuses, and the words with which it does.
        tolerance: The largest error of a worked number, beside the rounding of the result to float32.
    """

    make: Callable[[float], Credit]
    worked: tuple[Credit, RoundScores, list[float]]
    exceptions: Mapping[str, str] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-8


FOUR, GRPO = one_reward([1.0, 2.0, 3.0, 6.0]), [-1.06898783, -0.53449391, 0.0, 1.60348174]
RATES = one_reward([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0])
LEVELS = one_reward([0.0, 0.5, 2.0, 0.5, 0.0, 1.0, 0.5, 0.0])
SCALES = one_reward([0.0, 1.0], [0.0, 3.0], [0.0, 100.0], tasks=[0, 0, 1])
PAR = one_reward([0.2119414575, 0.3941418413, 0.6058581587, 0.9612808822])

# R_0, ..., R_4: the first two turn at step 1, the third at step 0, and the fourth nowhere
TURNS = [[0.3, 0.2, 0.45, 0.4, 0.6], [0.3, 0.5, 0.35, 0.25, 0.2], [0.3, 0.35, 0.4, 0.2, 0.5], [0.3, 0.3, 0.1, 0.4, 0.1]]
# R_0, which must not matter, and R_1, ..., R_3
VALUES = [[7.0, 0.2, 0.25, 0.5], [7.0, 0.3, 0.45, 0.4], [7.0, 0.1, 0.3, 0.2], [7.0, 0.25, 0.2, 0.6]]

TWO_REWARDS = round_scores([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1], [6.0, 0.3]])
THREE_REWARDS = round_scores([[1.0, 0.5, 2.0], [2.0, 0.25, 0.0], [3.0, 0.75, 1.0], [6.0, 0.0, 4.0]])
GLOBAL = dict.fromkeys(("GP3", "shift"), "divides by the standard deviation of all scores")
PARTS = "a missing score adds nothing: the sample has the credit of its other rewards"
PLAIN = "no normalization: PRDP takes the differences itself, and leaves out NaN"
SHARES = "weighs a step by its share of the trajectory's scores"
NEGATIVE = "use rewards of 0 or more with positive weights"
FLOOR = "the floor of the standard deviation is relative to the spread of all gains"
ROUNDED = 3e-7  # for scores such as 0.1, which float32 rounds
SETS = "a sample is judged with the others of its set, in the order of samples and prompts"

TAMED = {
    "GP3": "a reward is tamed by its relative spread in the round",
    **dict.fromkeys(("GP9", "shift", "sign"), "logarithm and relative spread depend on the level of the scores"),
}

CASES: dict[str, Case] = {
    "GroupRelative": Case(lambda scale: GroupRelative(), (GroupRelative(), FOUR, GRPO)),
    "GroupRelative, global": Case(
        lambda scale: GroupRelative("global"),
        (
            GroupRelative("global"),
            one_reward([1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.3]),
            [-1.02804136, -0.51402068, 0.0, 1.54206205, -0.02570103, -0.02570103, -0.02570103, 0.0771031],
        ),
        GLOBAL,
    ),
    "NormalizedSum": Case(
        lambda scale: NormalizedSum(),
        (NormalizedSum(), TWO_REWARDS, [-0.83899712, -0.56650126, -0.29400541, 1.69950379]),
        {"GP3": "normalized over the batch after the sum", "part": PARTS},
    ),
    "LeaveOneOut": Case(
        lambda scale: LeaveOneOut(),
        (LeaveOneOut(2.0), PAR, [2 * a for a in (-0.4418188365, -0.1988849916, 0.0834034317, 0.5573003964)]),
        tolerance=ROUNDED,
    ),
    "BestOfNCredit": Case(
        lambda scale: BestOfNCredit(2),
        (BestOfNCredit(3), FOUR, [0.0, 0.0, 0.17816464, 1.78164639]),
        GLOBAL,
    ),
    "BetaNormalized": Case(
        lambda scale: BetaNormalized(0.0, scale),
        (
            BetaNormalized(),
            RATES,
            [
                *(0.6729799779, -0.2243266593, -0.2243266593, -0.2243266593),
                *(0.4474371565, 0.4474371565, -0.4474371565, -0.4474371565),
                *(0.25152492, 0.25152492, 0.25152492, -0.75457476),
                *(0.0, 0.0, 0.0, 0.0),
            ],
        ),
        {
            "GP3": "weighs a group by the distribution of all groups' means",
            "part": PARTS,
            "shift": "weighs a group by its mean",
        },
        refusals=dict.fromkeys(("GP9", "sign"), r"outside \[0, 1\]: set low and high"),
    ),
    "VirtualBest": Case(
        lambda scale: VirtualBest(2 * scale),
        (
            VirtualBest(2.0),
            LEVELS,
            [
                *(-0.9085123823, -0.2795422715, 1.607368061, -0.2795422715),
                *(-0.9085123823, 0.3494278393, -0.2795422715, -0.9085123823),
            ],
        ),
        {
            "GP5": "a zero-variance group below the best possible score gets negative credit",
            "shift": "the best possible score is absolute",
        },
        refusals={"GP9": "is above best = 2: set best"},
    ),
    "GaussianRank": Case(
        lambda scale: GaussianRank(),
        # Phi^-1 of 1/8, 3/8, 5/8, 7/8; tied scores share the mean of the last two
        (GaussianRank(), one_reward([5.0, 7.0, 0.0, 7.0]), [-0.31863936, 0.73449437, -1.15034938, 0.73449437]),
    ),
    "TaskNormalized": Case(
        lambda scale: TaskNormalized(),
        # Variances (ddof 1) of the groups: 1/2 and 9/2 in one task, so that its scale is sqrt(5/2), and 5000
        (TaskNormalized(), SCALES, [-0.31620777, 0.31620777, -0.94862330, 0.94862330, -0.70710578, 0.70710578]),
        {"GP3": "the scale is that of all groups of a task"},
    ),
    "TaskNormalized by the task's mean": Case(
        lambda scale: TaskNormalized("task"),
        # Scores 0, 1, 0, 3 of the first task: mean 1, standard deviation sqrt(2)
        (TaskNormalized("task"), SCALES, [-0.70705678, 0.0, -0.70705678, 1.41411356, -0.70710578, 0.70710578]),
        {
            "GP3": "the mean is that of all groups of a task",
            "GP5": "a zero-variance group is compared with others of its task",
            "GP6": "a group of one is compared with others of its task",
            "shift": "groups are compared with each other",
        },
    ),
    "DifficultyWeighted": Case(
        lambda scale: DifficultyWeighted(GroupRelative()),
        # Success rates 1/4 and 1/2: weights exp(1/4) and exp(-1/4), and 1
        (
            DifficultyWeighted(LeaveOneOut()),
            one_reward([1, 0, 0, 0], [1, 1, 0, 0]),
            [math.exp(0.25), *[-math.exp(-0.25) / 3] * 3, *[2 / 3] * 2, *[-2 / 3] * 2],
        ),
        {
            "GP3": "a success is a score above the mean of the group and, in part, of its task",
            "shift": "a success is a score above a mean of several groups",
        },
    ),
    "SpreadDiscounted": Case(
        lambda scale: SpreadDiscounted(GroupRelative()),
        # Standard deviations 1/2 and 3/2, whose root mean square is sqrt(5)/2; the third group has none
        (
            SpreadDiscounted(LeaveOneOut(), 2.0),
            one_reward([0, 1], [0, 3], [1, 1]),
            [sign * size * math.exp(-2 * size / 5**0.5) for size in (1, 3) for sign in (-1, 1)] + [0.0, 0.0],
        ),
        {"GP3": "the spread is relative to that of all groups"},
    ),
    "SpreadDiscounted without any spread": Case(
        lambda scale: SpreadDiscounted(VirtualBest(2 * scale)),
        # Scores 1, 1, 1 and a virtual 2: mean 5/4, standard deviation (ddof 1) 1/2, and nothing to discount
        (SpreadDiscounted(VirtualBest(2.0)), one_reward([1.0, 1.0, 1.0]), [-0.25 / (0.5 + 1e-6)] * 3),
        {
            "GP3": "the spread is relative to that of all groups",
            "GP5": "a zero-variance group below the best possible score gets negative credit",
            "shift": "the best possible score is absolute",
        },
        refusals={"GP9": "is above best = 2: set best"},
    ),
    "RewardGain": Case(
        lambda scale: RewardGain(2.0),
        (
            RewardGain(0.01),
            replace(FOUR, stepwise=torch.stack([torch.zeros(4, 1), FOUR.scores], dim=1)),
            GRPO,
        ),
        {"GP3": FLOOR},
    ),
    "TurningPoint": Case(
        lambda scale: TurningPoint(floor=0.0),
        (
            TurningPoint(floor=0.0),
            steps_of_one_reward(TURNS),
            [
                *(-1.2689983418, 1.5264927829, -0.1990113227, 0.6975769821),
                *(1.499725313, -1.0639192123, -0.464359753, -0.375618375),
                *(0.1153634856, 0.2312867853, -0.9950566136, 1.1268551249),
                *(-0.3460904568, -0.6938603558, 1.6584276893, -1.448813732),
            ],
        ),
        {
            "GP1": "of equal turning points the first are balanced",
            "GP3": "turning points are balanced over the round",
            "ties": "of equal turning points the first are balanced",
        },
        tolerance=ROUNDED,
    ),
    "TurningPoint, not balanced": Case(
        lambda scale: TurningPoint(balanced=False, floor=2.0),
        (
            TurningPoint(balanced=False, floor=0.0),
            steps_of_one_reward(TURNS),
            [  # the gains of step 0 are -0.1, 0.2, 0.2, 0
                *(-1.3461143888, 1.5264927829, -0.1990113227, 0.6975769821),
                *(0.9615102777, -1.0639192123, -0.464359753, -0.375618375),
                *(0.9615102777, 0.2312867853, -0.9950566136, 1.1268551249),
                *(-0.5769061666, -0.6938603558, 1.6584276893, -1.448813732),
            ],
        ),
        {"GP3": FLOOR},
        tolerance=ROUNDED,
    ),
    "ValueAnchored": Case(
        lambda scale: ValueAnchored(),
        (
            ValueAnchored(),
            steps_of_one_reward(VALUES),
            [
                *(0.0216270396, 0.1466290141, 0.3744457591),
                *(1.5127998476, 1.1207815515, -0.0905314743),
                *(-2.1056902531, -1.9486933751, -0.752598902),
                *(0.5897884505, 0.4582899491, 0.9434174179),
            ],
        ),
        dict.fromkeys(("GP9", "shift"), SHARES),
        refusals={"sign": NEGATIVE},
        tolerance=ROUNDED,
    ),
    "ValueAnchored by the lowest score": Case(
        lambda scale: ValueAnchored(reduction="min"),
        (
            ValueAnchored(reduction="min"),
            steps_of_one_reward(VALUES),
            [  # the lowest scores that follow: (0.2, 0.25, 0.5), (0.3, 0.4, 0.4), (0.1, 0.2, 0.2), (0.2, 0.2, 0.6)
                *(0.0, -0.1202469083, 0.8001314642),
                *(1.155449771, 1.8277530062, -0.1842727009),
                *(-0.8473298321, -0.9138765031, -1.8242997385),
                *(0.0, -0.4569382516, 2.1283496949),
            ],
        ),
        dict.fromkeys(("GP9", "shift"), SHARES),
        refusals={"sign": NEGATIVE},
        tolerance=ROUNDED,
    ),
    "ValueAnchored with an anchor": Case(
        lambda scale: ValueAnchored(anchor=0.1),
        (
            ValueAnchored(anchor=0.1),
            steps_of_one_reward(VALUES),
            [
                *(0.1234349214, 0.2190428072, 0.4113915719),
                *(1.654672246, 1.2086913326, -0.0690933323),
                *(-2.0356348076, -1.8916636721, -0.7426979119),
                *(0.7013650463, 0.531109098, 0.9912897584),
            ],
        ),
        {
            **dict.fromkeys(("GP9", "shift"), SHARES),
            "GP5": "the anchor is absolute: a zero-variance group gets credit",
            "GP6": "the anchor is absolute: a group of one gets credit",
        },
        refusals={"sign": NEGATIVE},
        tolerance=ROUNDED,
    ),
    "CorrelationWeighted": Case(
        lambda scale: CorrelationWeighted(),
        (
            CorrelationWeighted(),
            round_scores([[1.0, 2.0, 3.0], [2.0, 4.0, 1.0], [3.0, 6.0, 2.0], [6.0, 12.0, 0.0]]),
            [1.3277746197, -0.8192174925, 0.5932419209, -1.1017990482],
        ),
        {"GP3": "divides by the standard deviation of all advantages"},
    ),
    "LogTamed": Case(
        lambda scale: LogTamed(),
        (LogTamed(), TWO_REWARDS, [-1.200905225, -0.4375127518, 0.1041228276, 1.5342951493]),
        TAMED,
    ),
    "LogTamed, global": Case(
        lambda scale: LogTamed(std="global"),
        (
            LogTamed(std="global"),
            # The relative spreads are 0.544 and 0.447, so that the first reward is tamed
            round_scores([[1.0, 0.1], [2.0, 0.1], [3.0, 0.1], [6.0, 0.3]], [[2.0, 0.2], [4.0, 0.2]]),
            [-1.3814014743, -0.5032709891, 0.1197725054, 1.7648999581, -0.553156787, 0.553156787],
        ),
        TAMED,
    ),
    "AmongCorrect": Case(
        lambda scale: AmongCorrect("first", threshold=scale / 2),
        (
            AmongCorrect("first"),
            round_scores([[1, 0.2], [1, 0.6], [0, 0.9], [1, 0.4], [0, 0.1], [0, 0.5], [1, 0.4], [0, 0.3]]),
            [0.5758357593, 1.4237643207, *(0.99980004 * sign for sign in (-1, 1, -1, -1, 1, -1))],
        ),
        dict.fromkeys(("GP9", "shift"), "being right is an absolute score"),
    ),
    "GatedBySuccess": Case(
        lambda scale: GatedBySuccess("first", threshold=scale / 2),
        (
            GatedBySuccess("first"),
            # Sums 2, 4, 0, 2 of mean 2 and standard deviation sqrt(2); then the rule alone, of mean 1/4 and sqrt(3)/4
            round_scores([[1, 1], [1, 3], [0, 0], [0, 2]], [[1, 0], [0, 7], [0, 1], [0, 5]]),
            [0.0, 2 / (2**0.5 + 1e-4), -2 / (2**0.5 + 1e-4), 0.0]
            + [part / (3**0.5 / 4 + 1e-4) for part in (0.75, -0.25, -0.25, -0.25)],
        ),
        dict.fromkeys(("GP9", "shift"), "success is an absolute score"),
    ),
    "Decorrelated": Case(
        lambda scale: Decorrelated(GroupRelative(), ["reported"]),
        (
            Decorrelated(PlainReward(), ["second"]),
            replace(
                round_scores(
                    [[1.0, 0.3], [-1.0, 0.1], [0.5, 0.25], [-0.5, 0.05]],
                    [[0.8, 0.4], [-0.2, 0.35], [-0.9, 0.2], [0.3, 0.3]],
                ),
                weights=(1.0, 0.0),
            ),
            [
                *(0.1067961165, -0.4640776699, -0.0359223301, 0.3932038835),
                *(0.1747572816, -0.467961165, -0.0961165049, 0.3893203883),
            ],
        ),
        {
            "GP3": "the slope is that of all groups",
            "GP10": "the nuisance is a reward of weight 0",
        },
        tolerance=ROUNDED,
    ),
    "PlainReward": Case(
        lambda scale: PlainReward(),
        (PlainReward(), TWO_REWARDS, [1.1, 2.1, 3.1, 6.3]),
        dict.fromkeys(("GP4", "GP5", "GP6", "GP7", "GP9", "part", "shift"), PLAIN),
    ),
    "BestAndWorst": Case(
        lambda scale: BestAndWorst(),
        (BestAndWorst(), one_reward([2.0, 6.0, 1.0], [3.0, 3.0, 3.0]), [0.0, 1.0, -1.0, 0.0, 0.0, 0.0]),
        dict.fromkeys(("GP1", "ties"), "among equal scores the first counts"),
    ),
    "BestOnly": Case(
        lambda scale: BestOnly(),
        (BestOnly(), one_reward([2.0, 6.0, 1.0], [3.0, 3.0, 1.0]), [0.0, 1.0, 0.0, 0.5, 0.5, 0.0]),
        dict.fromkeys(("GP5", "GP6"), "the best is imitated, however it compares"),
    ),
    "ExponentialWeights": Case(
        lambda scale: ExponentialWeights(),
        (
            ExponentialWeights(),
            one_reward([0.2, 0.9, 0.9, -0.3]),
            [0.709970604909, 1.42970522786, 1.42970522786, 0.430618939372],
        ),
        dict.fromkeys(("GP5", "GP6"), "a regression weighs all samples, with mean 1"),
        tolerance=ROUNDED,
    ),
    "Thresholded": Case(
        lambda scale: Thresholded(0.5 * scale),
        (Thresholded(0.5), one_reward([0.25, 0.5, 0.75]), [-1.0, 1.0, 1.0]),
        dict.fromkeys(("GP5", "GP6", "GP9", "shift"), "the threshold is fixed"),
    ),
    "HierarchicalPairs": Case(
        lambda scale: HierarchicalPairs(1),
        (
            HierarchicalPairs(2),
            replace(  # hybrid rewards of 0.25, 0.875, 0.604 and 0.333, and of 0.4 and 0.6 with a deviation of 0.1
                round_scores(
                    [[0.3, 0.1, 3.0], [0.2, 0.4, 4.0], [0.25, 0.3, 3.5], [0.1, 0.2, 2.0]],
                    [[0.0, 0.6, 0.0], [0.6, 0.0, 1.0], [0.4, 1.0, 0.0], [1.0, 0.4, 1.0]],
                ),
                weights=(-0.25, 0.25, 0.5),
            ),
            [  # fixture F28, and +-w_inter of the second group
                *(-1.06149888702, 1.46375109684, 0.8827201271, -0.8827201271),
                *(-0.927327440486, 0.927327440486, -0.927327440486, 0.927327440486),
            ],
        ),
        {
            **dict.fromkeys(("GP1", "ties"), "among equal scores the first counts"),
            "GP3": "a prompt counts by its spread, beside the mean of all",
            **dict.fromkeys(("GP4", "part"), "a group with a missing score is not ranked"),
        },
        tolerance=ROUNDED,
    ),
    "SetContrast": Case(
        lambda scale: SetContrast(near_half),
        (
            SetContrast(near_half),
            replace(one_reward([0.0] * 4), features=torch.tensor([[0.0], [1.0], [3.0], [0.0]])),
            [1.0, 1.0, -1.0, -1.0],  # of the sets with one of samples 0 and 2 and one of 1 and 3, {0, 1} is the nearest
        ),
        {
            **dict.fromkeys(("GP1", "GP2", "GP3", "GP4", "GP5", "part", "ties", "two"), SETS),
            **dict.fromkeys(("GP9", "shift"), "this set reward has a fixed target"),
        },
        refusals={"GP7": "needs 2 pairs of samples or more"},
    ),
    "EnsembleCredit": Case(
        lambda scale: EnsembleCredit(),
        (EnsembleCredit(), TWO_REWARDS, [-0.88343483, -0.40773460, -0.40773460, 1.69890404]),
    ),
    "EnsembleCredit by the variance": Case(
        lambda scale: EnsembleCredit(VariancePenalty(0.5, ddof=0)),
        (
            EnsembleCredit(VariancePenalty(0.5, ddof=0)),
            TWO_REWARDS,
            [-0.8434626373, -0.5429887304, -0.3146934287, 1.7011447964],
        ),
    ),
    "EnsembleCredit by the variance, as published to train": Case(
        lambda scale: EnsembleCredit(VariancePenalty()),
        (
            EnsembleCredit(VariancePenalty()),
            THREE_REWARDS,
            [-0.2503704279, -1.5221418699, 0.7320669821, 1.0404453157],
        ),
        tolerance=ROUNDED,
    ),
    "EnsembleCredit by the deviation": Case(
        lambda scale: EnsembleCredit(DeviationPenalty(0.5)),
        (
            EnsembleCredit(DeviationPenalty()),
            THREE_REWARDS,
            [-0.1332375883, -1.3668625892, 1.4517166686, 0.0483835089],
        ),
        tolerance=ROUNDED,
    ),
    "EnsembleCredit by the median": Case(
        lambda scale: EnsembleCredit(median),
        (EnsembleCredit(median), THREE_REWARDS, [-0.1583018405, -1.0870941894, -0.3814446564, 1.6268406863]),
        tolerance=ROUNDED,
    ),
    "EnsembleCredit by the mean and the worst": Case(
        lambda scale: EnsembleCredit(NominalAndWorst()),
        (
            EnsembleCredit(NominalAndWorst(0.25)),
            THREE_REWARDS,
            [-0.2529616544, -1.0700140944, 1.6395177133, -0.3165419646],
        ),
        tolerance=ROUNDED,
    ),
    "UncertaintyDiscount": Case(
        lambda scale: UncertaintyDiscount(GroupRelative()),
        (
            UncertaintyDiscount(GroupRelative(), 2.0),
            # Members 1, -1, 1, -1 and 1, -1, -1, 1 but for the 1e-4 beside their standard deviations 1 and 2
            round_scores([[2.0, 9.0], [0.0, 5.0], [2.0, 5.0], [0.0, 9.0]]),
            [
                part / (5**0.5 + 1e-4) * math.exp(-abs(1 / 1.0001 + sign * 2 / 2.0001))
                for part, sign in ((3, -1), (-3, -1), (-1, 1), (1, 1))
            ],
        ),
    ),
}


@pytest.mark.parametrize("module", [sample_credit, step_credit, multi_reward_credit, combine])
def test_every_credit_has_a_case(module: ModuleType) -> None:
    """A credit is a class that is called with the scores of a round."""
    calls = {
        value: inspect.signature(inspect.getattr_static(value, "__call__")).parameters.values()
        for _, value in inspect.getmembers(module, inspect.isclass)
        if value.__module__ == module.__name__
    }
    own = {value for value, arguments in calls.items() if "RoundScores" in {each.annotation for each in arguments}}
    own -= {DrawnPreference}  # of pairs of a reference and a generated sample alone: test_group_losses has its numbers
    assert own and own <= {type(case.make(1.0)) for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_worked_numbers(name: str) -> None:
    credit, scores, expected = CASES[name].worked
    values = credit(scores)
    assert values.dtype == torch.float32
    assert values.flatten().tolist() == pytest.approx(expected, rel=2**-23, abs=CASES[name].tolerance)


SIZE = 8


def example(scale: float = 1.0, offset: float = 0.0, levels: int = 16) -> RoundScores:
    """A round of three groups of eight and two tasks: two rewards with ties in [0, scale], and one of weight 0."""
    generator = torch.Generator().manual_seed(3)
    # float32 holds them beside the offset
    steps = torch.randint(0, levels + 1, (3 * SIZE, 3, 3), generator=generator) / levels
    return of_steps(scale * steps + offset, torch.arange(3).repeat_interleave(SIZE))


def of_steps(stepwise: Tensor, group: Tensor) -> RoundScores:
    """A round with scores of every stored state (B, S + 1, K), the last ones being the samples', also as features."""
    final = stepwise[:, -1]
    return RoundScores(final, (1.0, 1.0, 0.0), group, stepwise, final[:, :2], task=group // 2, names=NAMES)


def change(scores: RoundScores, rows: Tensor | slice, values: Tensor | float) -> RoundScores:
    """Set the scores of some samples, at every step, to ``values``."""
    assert scores.stepwise is not None
    stepwise = scores.stepwise.clone()
    stepwise[rows] = values
    return of_steps(stepwise, scores.group)


def select(scores: RoundScores, rows: Tensor) -> RoundScores:
    assert scores.stepwise is not None
    return of_steps(scores.stepwise[rows], scores.group[rows])


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def zero(credit: Tensor) -> None:
    assert torch.equal(credit, torch.zeros_like(credit))


def permutation(case: Case) -> None:
    credit, generator = case.make(1.0), torch.Generator().manual_seed(0)
    for scores in (example(), *[example(levels=4)] * 3):
        order = torch.randperm(len(scores.group), generator=generator)
        close(credit(select(scores, order)), credit(scores)[order])


def renaming(case: Case) -> None:
    credit, scores = case.make(1.0), example()
    close(credit(replace(scores, group=torch.tensor([7, 40, 2])[scores.group])), credit(scores))


def independence(case: Case) -> None:
    credit = case.make(1.0)
    values = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.125, 0.125, 0.75]).view(SIZE, 1, 1)
    rising = values * torch.tensor([0.0, 0.5, 1.0]).view(3, 1)
    first, second = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])
    for scores in (example(), example(levels=4)):
        for other in (rising, 1 - rising, (1 - rising) * first, (1 - rising) * second):
            close(credit(change(scores, slice(SIZE, 2 * SIZE), other))[:SIZE], credit(scores)[:SIZE])


def missing(case: Case) -> None:
    credit, scores = case.make(1.0), example()
    check_absent(credit, math.nan)
    assert scores.stepwise is not None
    for step in (1, -1):
        one_reward_missing = scores.stepwise.clone()
        one_reward_missing[5, step, 1] = math.nan
        assert bool(credit(of_steps(one_reward_missing, scores.group)).isfinite().all())


def missing_in_part(case: Case) -> None:
    for reward in (0, 1):
        check_absent(case.make(1.0), torch.zeros(3).index_fill(0, torch.tensor(reward), math.nan))


def check_absent(credit: Credit, values: Tensor | float) -> None:
    """Check that two samples with these scores get 0, and the others what they get without them."""
    scores, rows = example(), torch.tensor([1, 12])
    others = torch.ones(len(scores.group), dtype=torch.bool).index_fill(0, rows, False)
    result = credit(change(scores, rows, values))
    zero(result[rows])
    close(result[others], credit(select(scores, others)))


def no_spread(case: Case) -> None:
    credit, scores = case.make(1.0), example()
    values = credit(change(scores, slice(SIZE), torch.tensor([0.1, 0.3, 0.7])))
    zero(values[:SIZE])
    assert bool((values[SIZE:] != 0).any())
    zero(case.make(1.0)(change(scores, slice(None), 0.3)))


def group_of_one(case: Case) -> None:
    """Among groups of two, and the last one."""
    values = case.make(1.0)(of_pairs(first=1))
    zero(values[:1])
    zero(values[-1:])


def groups_of_two(case: Case) -> None:
    credit = case.make(1.0)
    values = credit(of_pairs(first=2))
    assert bool(values.isfinite().all()) and bool((values != 0).any())
    rewards = torch.tensor([1.0, 1.0, 0.0])
    gains = torch.tensor([0.25, 0.0, 0.0, 0.5, 1.0, 0.0]).view(6, 1, 1) * rewards  # of both steps together
    stepwise = gains * torch.tensor([0.0, 0.5, 1.0]).view(3, 1)
    values = credit(of_steps(stepwise, torch.arange(6) // 2))
    assert bool(values.isfinite().all()) and bool((values[[0, 3, 4]] > values[[1, 2, 5]]).all())


def of_pairs(first: int) -> RoundScores:
    """The scores of the example in groups of two, of which the first has ``first`` samples."""
    stepwise = example().stepwise
    assert stepwise is not None
    return of_steps(stepwise, (torch.arange(len(stepwise)) + 2 - first) // 2)


def ties(case: Case) -> None:
    """Give the scores of each sample in turn to the next one of its group."""
    credit, scores = case.make(1.0), example()
    assert scores.stepwise is not None
    for row in range(len(scores.group)):
        following = row + 1 if (row + 1) % SIZE else row + 1 - SIZE
        values = credit(change(scores, torch.tensor([following]), scores.stepwise[row]))
        close(values[row], values[following])


def flat_round(case: Case) -> None:
    for score in (0.3, 0.0):
        values = case.make(1.0)(change(example(), slice(None), score))
        assert bool(values.isfinite().all())


def negative_weight(case: Case) -> None:
    """Of the second of the two rewards; the features stay as they are."""
    credit, scores = case.make(1.0), example()
    assert scores.stepwise is not None
    stepwise = scores.stepwise * torch.tensor([1.0, -1.0, 1.0])
    expected = credit(replace(scores, scores=stepwise[:, -1], stepwise=stepwise))
    close(credit(replace(scores, weights=(1.0, -1.0, 0.0))), expected)


def nothing_scored(case: Case) -> None:
    zero(case.make(1.0)(change(example(), slice(None), math.nan)))


def scaling(case: Case) -> None:
    for scale in (1e6, 1e-6):
        values = case.make(scale)(example(scale))
        assert bool(values.isfinite().all()) and bool((values != 0).any())


def precision(case: Case) -> None:
    credit = case.make(1.0)
    values = credit(example())
    assert values.dtype == torch.float32
    close(credit(example(offset=4096.0)), values)


def weightless_reward(case: Case) -> None:
    credit, scores = case.make(1.0), example()
    expected, column = credit(scores), scores.scores[:, 2]
    assert scores.stepwise is not None
    for values in (torch.full_like(column, math.nan), 5.0 - column, torch.where(column > 0.5, math.nan, column)):
        stepwise = scores.stepwise.clone()
        stepwise[:, :, 2] = values[:, None]
        assert torch.equal(credit(of_steps(stepwise, scores.group)), expected)


def shift(case: Case) -> None:
    """Halve the scores, so that they have room within [0, 1], and add another constant in each group."""
    credit, scores = case.make(1.0), example(scale=0.5)
    assert scores.stepwise is not None
    baseline = torch.tensor([0.0, 0.25, 0.5])[scores.group]
    shifted = of_steps(scores.stepwise + baseline[:, None, None], scores.group)
    close(credit(shifted), credit(scores))


PROPERTIES: dict[str, Callable[[Case], None]] = {
    "GP1": permutation,
    "GP2": renaming,
    "GP3": independence,
    "GP4": missing,
    "GP5": no_spread,
    "GP6": group_of_one,
    "GP7": nothing_scored,
    "GP8": scaling,
    "GP9": precision,
    "GP10": weightless_reward,
    "part": missing_in_part,
    "shift": shift,
    "ties": ties,
    "flat": flat_round,
    "sign": negative_weight,
    "two": groups_of_two,
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
        if label not in case.refusals
    ]


@pytest.mark.parametrize(("name", "label"), _parameters())
def test_properties(name: str, label: str) -> None:
    PROPERTIES[label](CASES[name])


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [(name, label, message) for name, case in CASES.items() for label, message in case.refusals.items()],
)
def test_refusals(name: str, label: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PROPERTIES[label](CASES[name])


def test_exceptions_name_properties() -> None:
    for case in CASES.values():
        assert not case.exceptions.keys() & case.refusals.keys()
        assert case.exceptions.keys() | case.refusals.keys() <= PROPERTIES.keys()


@pytest.mark.parametrize("size", [3, 8, 10])
def test_the_sample_two_standard_deviations_below_the_mean_is_the_worst(size: int) -> None:
    """So pairs with a loser at mean - 2 std ("sweet spot") are those with the worst, in groups of up to 10 samples."""
    generator = torch.Generator().manual_seed(0)
    for power in (1.0, 3.0, 7.0):  # heavier and heavier tails
        scores = torch.randn(2000, size, dtype=torch.float64, generator=generator)
        scores = scores.sign() * scores.abs() ** power
        target = scores.mean(1) - 2 * scores.std(1, correction=0)
        nearest = (scores - target[:, None]).abs().argmin(1)
        assert torch.equal(nearest, scores.argmin(1))
    two_far_below = torch.cat([torch.tensor([-5.3, -4.7]), torch.zeros(18)])  # the next best of 20 is nearer
    target = two_far_below.mean() - 2 * two_far_below.std(correction=0)
    assert int((two_far_below - target).abs().argmin()) == 1
