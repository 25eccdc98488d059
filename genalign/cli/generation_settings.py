"""Settings of every command that generates and scores samples: prompts, rewards and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from genalign.cli.model_settings import Model
from genalign.diffusion.sampling import Sampling
from genalign.types import AnyCallable


@dataclass(frozen=True)
class RewardChoice:
    """A reward and how it is called.

    Args:
        function: Import path of a function, or of a class with callable objects, as in rewards.clip.ClipReward, or
            rewards.combine.WeightedSum for a sum of others.
        weight: Weight in the sum of rewards; 0 only reports the score.
        score_batch: Number of samples that are scored per call; null scores a whole batch.
        timeout: Seconds after which a call counts as failed; null waits forever.
    """

    function: AnyCallable
    weight: float = 1.0
    score_batch: int | None = None
    timeout: float | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The samples that a command generates and scores.

    Args:
        output: Folder to write.
        model: The generator.
        prompts: A .txt file with one prompt per line, a GenEval .jsonl file, a dataset
            (hf://datasets/owner/name:split#column), or a split of a world, as in shapes:train.
        rewards: Named rewards.
        sampling: Sampling settings.
    """

    output: str
    model: Model
    prompts: str
    rewards: dict[str, RewardChoice] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=lambda: Sampling(20))


def require_positive(settings: object, *names: str) -> None:
    """Raise ValueError if one of the named settings is neither null nor at least 1."""
    for name in names:
        value = vars(settings)[name]
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def require_rewards(rewards: Mapping[str, RewardChoice]) -> None:
    """Raise ValueError unless there is a reward, and every name is a string."""
    if not rewards:
        raise ValueError(
            "rewards is empty: name at least one, as in --rewards.strict.function rewards.shapes.ShapesReward"
        )
    if wrong := [name for name in rewards if not isinstance(name, str)]:  # YAML reads no as False, and 1 as a number
        raise ValueError(f'rewards has the name {wrong[0]}, as YAML reads it: put the name in quotes, as in "no":')
