"""A log of the scores since the last checkpoint, which a resumed run reads in place of calling the rewards.

A remote reward is not called again, and need not return the same scores twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from genalign.runtime.state import Generators
from genalign.scoring.score import NamedReward
from genalign.types import Prompt, RewardFunction, TrainableReward

logger = logging.getLogger(__name__)


class ScoreLog:
    """Scores of reward calls by the reward's name, the exact samples, and their prompts.

    A call with a sample that could not be scored is not logged: it is worth calling again. Nor is a call that drew from
    the global random generators, which a checkpoint restores: it returns the same again, and has to draw.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._loaded: defaultdict[str, deque[list[float]]] = defaultdict(deque)

    def record_to(self, path: Path) -> None:
        """Append the scores of later calls to the file ``path``."""
        self._path = path

    def load(self, paths: Iterable[Path]) -> None:
        """Read scores to return, each once, instead of calling the rewards; incomplete lines are ignored."""
        for path in paths:
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
                with contextlib.suppress(json.JSONDecodeError):
                    call = json.loads(line)
                    self._loaded[call["key"]].append(call["scores"])

    def logged(self, rewards: Sequence[NamedReward]) -> list[NamedReward]:
        """Wrap ``rewards`` so that their scores are logged; a trainable reward is resumed by its own state."""
        return [
            reward
            if isinstance(reward.function, TrainableReward)
            else replace(reward, function=self._wrap(reward.name, reward.function))
            for reward in rewards
        ]

    def _wrap(self, name: str, function: RewardFunction) -> RewardFunction:
        def call(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            if self._path is None or samples.requires_grad:
                return function(samples, prompts)
            described = [name, list(samples.shape), [[prompt.text, prompt.metadata] for prompt in prompts]]
            digest = hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=16)
            digest.update(samples.detach().float().cpu().contiguous().numpy().tobytes())
            key = digest.hexdigest()
            if self._loaded.get(key):
                return torch.tensor(self._loaded[key].popleft())
            before = Generators().position()
            scores = function(samples, prompts)
            if Generators().position() == before and isinstance(scores, Tensor) and bool(scores.isfinite().all()):
                line = json.dumps({"key": key, "scores": scores.detach().float().cpu().tolist()})
                try:
                    with self._path.open("a", encoding="utf-8") as file:
                        file.write(f"\n{line}\n")  # after an incomplete line of a killed process
                except OSError as error:
                    logger.warning("the log of scores cannot be written (%s): none until the next checkpoint", error)
                    self._path = None
            return scores

        return call
