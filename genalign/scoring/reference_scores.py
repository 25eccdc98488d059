"""Scores of samples of the model before training, by prompt, in a file that says which model, prompts and rewards.

``genalign reward references`` writes the file; rewards that compare a sample with those before training read it, such
as ``rewards.shaped.PreferenceAsReward``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from genalign.runtime.files import write_json
from genalign.runtime.text_files import read_json
from genalign.types import RewardFunction

_COMMAND = "genalign reward references --config FILE --output {path}"

ScoresByPrompt = Mapping[str, Sequence[float]]
"""The scores of samples of each prompt, by its text."""


@runtime_checkable
class ReferencedReward(Protocol):
    """A reward that compares the scores of another with those of samples before training.

    ``reference_file`` is the file of these; None where they are part of its configuration.
    """

    @property
    def reward(self) -> RewardFunction: ...

    @property
    def reference_file(self) -> str | None: ...


@dataclass(frozen=True)
class RewardScores:
    """The scores of samples by one reward, which ``reward`` describes in JSON types."""

    reward: Any
    scores: ScoresByPrompt


@dataclass(frozen=True)
class ReferenceScores:
    """Scores of samples of a model before training.

    Attributes:
        base: What identifies the model, in JSON types; its name is under "model".
        prompts: The name of the prompt set.
        rewards: The scores by each reward.
    """

    base: Mapping[str, Any]
    prompts: str
    rewards: tuple[RewardScores, ...]

    def save(self, path: Path) -> None:
        """Write the file that ``load`` reads, as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. Raises FileNotFoundError, and ValueError for another file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no reference scores in {path}: write them with {_COMMAND.format(path=path)}")
        stored = read_json(Path(path))
        try:
            rewards = tuple(RewardScores(part["reward"], dict(part["scores"])) for part in stored["rewards"])
            return cls(dict(stored["base"]), str(stored["prompts"]), rewards)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has no reference scores: write them with {_COMMAND.format(path=path)}") from error

    def by(self, reward: Any, path: str | Path) -> ScoresByPrompt:
        """Return the scores by the reward with this description.

        Raises ValueError, which names ``path`` and its rewards, for another one.
        """
        for part in self.rewards:
            if part.reward == _in_json(reward):
                return part.scores
        available = ", ".join(json.dumps(part.reward) for part in self.rewards)
        raise ValueError(
            f"{path} has scores by {available}, and none by {json.dumps(_in_json(reward))}: {_again(path)}"
        )

    def require_base(self, base: Mapping[str, Any], path: str | Path) -> None:
        """Raise ValueError, which names both models and what differs, unless the samples are of the model ``base``.

        Its name, under "model", may differ.
        """
        wanted = _in_json(base)
        differing = [
            f"{name} is {json.dumps(self.base.get(name))} there and {json.dumps(value)} here"
            for name, value in wanted.items()
            if name != "model" and self.base.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{path} has the scores of the base model {self.base.get('model')}, and this run starts from"
                f" {wanted['model']}: {', '.join(differing)}: {_again(path)}"
            )

    def require_prompts(self, texts: Iterable[str], path: str | Path) -> None:
        """Raise ValueError, which names the prompt set of the file, unless every reward has scores of these prompts."""
        wanted = set(texts)
        for part in self.rewards:
            if missing := sorted(wanted - part.scores.keys()):
                raise ValueError(
                    f"{path} has the scores of the prompt set {self.prompts!r}, which lacks {len(missing)} of this"
                    f" run's prompts, such as {missing[0]!r}: {_again(path)}"
                )


def scores_by_prompt(scores: Tensor, prompts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Group scores (B,) by the text of their prompt, without those that are not finite.

    Raises ValueError for a prompt of which no sample could be scored.
    """
    grouped: dict[str, list[float]] = {str(prompt): [] for prompt in prompts}
    for prompt, score in zip(prompts, scores.detach().float().cpu().tolist(), strict=True):
        if math.isfinite(score):
            grouped[str(prompt)].append(score)
    for text, own in grouped.items():
        if not own:
            raise ValueError(f"no sample of {text!r} could be scored: sample it again")
    return {text: tuple(own) for text, own in grouped.items()}


def _again(path: str | Path) -> str:
    return f"write it again with {_COMMAND.format(path=path)}"


def _in_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
