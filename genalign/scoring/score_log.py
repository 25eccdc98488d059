"""Scores as they were given since the last checkpoint, so that a resumed run is given the same: a remote reward is not
asked again, and need not answer the same twice."""

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


class Journal:
    """Calls of rewards by what they were asked: the reward's name, the samples bit for bit, and their prompts.

    A call with a sample that could not be scored is not kept: it is worth asking again. Nor is one that drew from the
    process's generators, which a checkpoint puts back: it gives the same again, and has to draw.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._known: defaultdict[str, deque[list[float]]] = defaultdict(deque)

    def begin(self, path: Path) -> None:
        """Keep what comes in ``path``."""
        self._path = path

    def replay(self, paths: Iterable[Path]) -> None:
        """Give what was kept in ``paths``, each call once; a line that was cut off is left out."""
        for path in paths:
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
                with contextlib.suppress(json.JSONDecodeError):
                    call = json.loads(line)
                    self._known[call["key"]].append(call["scores"])

    def kept(self, rewards: Sequence[NamedReward]) -> list[NamedReward]:
        """``rewards``, their scores kept; one that is trained here gives the same again by itself."""
        return [
            reward
            if isinstance(reward.function, TrainableReward)
            else replace(reward, function=self._keeping(reward.name, reward.function))
            for reward in rewards
        ]

    def _keeping(self, name: str, function: RewardFunction) -> RewardFunction:
        def call(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            if self._path is None or samples.requires_grad:
                return function(samples, prompts)
            key = _key(name, samples, prompts)
            if self._known.get(key):
                return torch.tensor(self._known[key].popleft())
            before = Generators().position()
            scores = function(samples, prompts)
            if Generators().position() == before:
                self._keep(key, scores)
            return scores

        return call

    def _keep(self, key: str, scores: object) -> None:
        if self._path is None or not isinstance(scores, Tensor) or not bool(scores.isfinite().all()):
            return
        line = json.dumps({"key": key, "scores": scores.detach().float().cpu().tolist()})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")  # after whatever a killed process began to write
        except OSError as error:
            logger.warning("scores are not kept until the next checkpoint: %s", error)
            self._path = None


def _key(name: str, samples: Tensor, prompts: Sequence[Prompt]) -> str:
    asked = [name, list(samples.shape), [[prompt.text, prompt.metadata] for prompt in prompts]]
    found = hashlib.blake2b(json.dumps(asked, sort_keys=True, default=str).encode(), digest_size=16)
    found.update(samples.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
