"""The weights of a run that score best on held-out prompts, with the estimate by which they were chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from genalign.diffusion.policy import Policy, WeightSnapshot
from genalign.metrics.intervals import Estimate
from genalign.runtime.files import write_json
from genalign.runtime.state import State
from genalign.scoring.score import NamedReward
from genalign.types import TrainableReward

HELD_OUT_FILE = "held_out.json"
"""The file, beside weights or an evaluation of them, that says how they were chosen."""


def deciding_weights(scores: Sequence[str], rewards: Sequence[NamedReward]) -> dict[str, float]:
    """Choose the held-out scores that decide which weights are best, and their weights in the sum.

    These are the rewards that are trained on, weighted as in training; if none of them is scored, the first score. A
    reward that is itself trained changes its scale every round, and never decides.

    Args:
        scores: The names of the held-out scores.
        rewards: The rewards of the run.
    """
    moving = {reward.name for reward in rewards if isinstance(reward.function, TrainableReward)}
    fixed = [name for name in scores if name not in moving]
    weights = {reward.name: reward.weight for reward in rewards if reward.weight and reward.name in fixed}
    weights = weights or dict.fromkeys(fixed[:1], 1.0)
    return weights if len(weights) > 1 else {name: math.copysign(1.0, weight) for name, weight in weights.items()}


def sum_name(weights: Mapping[str, float]) -> str:
    """Name a weighted sum of scores, as in "strict + 0.5 clip"."""
    parts = (name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
    return " + ".join(parts).replace("+ -", "- ")


@dataclass(frozen=True)
class HeldOutScores:
    """An evaluation on held-out prompts: the estimate of every score, and the one that decides.

    Args:
        overall: The estimates by name.
        prompts: The name of the prompt set.
        deciding: The name of the score, or of the sum of scores, that decides which weights are best; empty if none.
        decision: Its estimate.
    """

    overall: Mapping[str, Estimate]
    prompts: str = ""
    deciding: str = ""
    decision: Estimate | None = None


@dataclass(frozen=True)
class BestRound:
    """A round whose weights are the best so far, and the estimate by which they were chosen.

    Args:
        rounds: The number of rounds after which the run had these weights.
        score: The name of the score that decided.
        estimate: Its estimate on the held-out prompts, whose interval is over prompts. It is biased upward, as the
            round was selected by it.
        prompts: The name of the held-out prompts.
        evaluations: The number of evaluations so far.
    """

    rounds: int
    score: str
    estimate: Estimate
    prompts: str
    evaluations: int = 1

    def __str__(self) -> str:
        among = f"the best of {self.evaluations} evaluation{'' if self.evaluations == 1 else 's'}"
        score = f"{self.score} {self.estimate.text('.3f')}"
        return f"round {self.rounds}, {among} on held-out prompts ({self.prompts}): {score}"

    def same_weights(self, other: BestRound) -> bool:
        """Whether the same weights were chosen, by the same estimate, possibly among fewer evaluations."""
        return replace(self, evaluations=other.evaluations) == other

    def as_dict(self) -> dict[str, Any]:
        """Return the round and its estimate as JSON types."""
        return asdict(self) | {"estimate": self.estimate.as_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Restore the result of ``as_dict``."""
        return cls(**{**value, "estimate": Estimate.from_dict(value["estimate"])})

    def write(self, folder: Path) -> None:
        """Write held_out.json into a folder."""
        write_json(folder / HELD_OUT_FILE, self.as_dict())

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read held_out.json of a folder; None if there is none, as nothing was selected by held-out scores."""
        path = folder / HELD_OUT_FILE
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


class BestWeights:
    """The averaged weights of the round that scored best on held-out prompts, held on the CPU.

    Args:
        policy: The policy that is trained.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.round: BestRound | None = None
        self.snapshot: WeightSnapshot | None = None
        self.evaluations = 0

    def see(self, rounds: int, scores: HeldOutScores) -> bool:
        """Keep the averaged weights if they score above the best so far; return whether they do.

        Args:
            rounds: The number of rounds so far.
            scores: The evaluation of these weights.
        """
        if scores.decision is None:
            return False
        self.evaluations += 1
        best = self.round is None or scores.decision.mean > self.round.estimate.mean
        if best:
            self.round = BestRound(rounds, scores.deciding, scores.decision, scores.prompts)
            for tensor, average in zip(self._room().tensors, self.policy.average.tensors, strict=True):
                tensor.copy_(average)
        assert self.round is not None
        self.round = replace(self.round, evaluations=self.evaluations)
        return best

    def weights(self) -> AbstractContextManager[None]:
        """Run the network with the best weights within the context; before any evaluation, with the averaged ones."""
        return self.policy.averaged() if self.snapshot is None else self.policy.using(self.snapshot)

    def _room(self) -> WeightSnapshot:
        if self.snapshot is None:
            self.snapshot = WeightSnapshot(self.policy.parameters, on_cpu=True)
        return self.snapshot

    def state(self) -> State:
        """The best weights, gathered if they are sharded, and how they were chosen."""
        tensors = {} if self.snapshot is None else self.snapshot.state_dict()
        return State(tensors, {"round": self.round and self.round.as_dict(), "evaluations": self.evaluations})

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Restore the state of ``state()``."""
        self.evaluations = state.numbers["evaluations"]
        self.round = state.numbers["round"] and BestRound.from_dict(state.numbers["round"])
        if self.round is not None:
            self._room().load_state_dict(state.tensors)
