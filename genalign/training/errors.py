"""The error that ends a training, apart from the loop, so that parsing settings need not load it."""

from __future__ import annotations


class TrainingStoppedError(RuntimeError):
    """A run stopped during its training: a reward failed too often, too many updates diverged, or no sample had credit.

    Its cause is the RewardError or DivergedError. The weights are saved, and the run can be resumed.
    """
