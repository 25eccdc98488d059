"""Set rewards that are updated one member at a time."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from genalign.types import SetReward


class SetStatistic(Protocol):
    """The reward of a set of n samples as its members are replaced one by one; features are float64 on the CPU."""

    @property
    def value(self) -> float:
        """The reward of the set."""

    @property
    def resolution(self) -> float:
        """What the rewards of two sets that differ in one member must differ by to be told apart."""

    def swapped(self, index: int, new: Tensor) -> float:
        """What the reward would be with the features ``new`` (d,) at place ``index``; the set stays as it is."""

    def swap(self, index: int, new: Tensor) -> None:
        """Replace the member at ``index``."""

    def settle(self) -> None:
        """Make ``resolution`` as small as it gets, where it has grown by ``swap``."""


@runtime_checkable
class IncrementalReward(Protocol):
    """A ``SetReward`` that knows a cheaper way than scoring the set anew when one member is replaced."""

    def __call__(self, features: Tensor) -> float:
        """The reward of a set (n, d)."""

    def statistic(self, features: Tensor) -> SetStatistic:
        """The same of a set (n, d) that will change."""


def set_statistic(reward: SetReward, features: Tensor) -> SetStatistic:
    """The reward's own ``statistic`` of features (n, d), or else one that scores the whole set every time."""
    features = features.detach().cpu().double()
    return reward.statistic(features) if isinstance(reward, IncrementalReward) else Rescored(reward, features)


class Rescored:
    """A ``SetStatistic`` of any ``SetReward``, at the cost of one call per replacement tried."""

    def __init__(self, reward: SetReward, features: Tensor) -> None:
        self._reward, self._features = reward, features.clone()
        self._value = float(reward(self._features))

    @property
    def value(self) -> float:
        return self._value

    @property
    def resolution(self) -> float:
        return 1e-9 * abs(self._value)

    def swapped(self, index: int, new: Tensor) -> float:
        features = self._features.clone()
        features[index] = new
        return float(self._reward(features))

    def swap(self, index: int, new: Tensor) -> None:
        self._features[index] = new
        self._value = float(self._reward(self._features))

    def settle(self) -> None:
        """Nothing to do."""
