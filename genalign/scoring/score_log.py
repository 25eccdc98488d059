"""A log of the scores since the last checkpoint, which a resumed run reads in place of calling the rewards.

A remote reward is not called again, and need not return the same scores twice.
"""

from __future__ import annotations

import contextlib
import functools
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

_MULTIPLIERS = 0x1E3779B97F4A7C15, 0x2545F4914F6CDD1D  # odd, below 2^63


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
        @functools.wraps(function, assigned=(), updated=())  # score.parts looks inside
        def call(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            if self._path is None or samples.requires_grad:
                return function(samples, prompts)
            described = [name, list(samples.shape), [[prompt.text, prompt.metadata] for prompt in prompts]]
            digest = hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=16)
            digest.update(_fingerprint(samples.detach()))
            key = digest.hexdigest()
            if self._loaded.get(key):
                return torch.tensor(self._loaded[key].popleft())
            before = Generators().position()
            scores = function(samples, prompts)
            if Generators().position() == before and isinstance(scores, Tensor):
                values = scores.detach().float().cpu()
                if not bool(values.isfinite().all()):
                    return scores
                line = json.dumps({"key": key, "scores": values.tolist()})
                try:
                    with self._path.open("a", encoding="utf-8") as file:
                        file.write(f"\n{line}\n")  # after an incomplete line of a killed process
                except OSError as error:
                    logger.warning("the log of scores cannot be written (%s): none until the next checkpoint", error)
                    self._path = None
            return scores

        return call


def _fingerprint(samples: Tensor) -> bytes:
    """Identify samples (B, ...) by their bits in float32: all of them on a CPU, and 128 bits a sample of a GPU.

    A round's images are gigabytes, for each reward: on a GPU they stay there.
    """
    exact = samples.float().contiguous()
    if not exact.is_cuda:
        return exact.numpy().tobytes()
    return torch.stack([hash_bits(sample) for sample in exact]).cpu().numpy().tobytes()


def hash_bits(sample: Tensor) -> Tensor:
    """Hash the bits and places of float32 numbers as two integers (2,), on their device, whatever the order of sums.

    Each number is mixed with its place by rounds of multiply and xor-shift in 64 bits, and added up modulo 2^64.
    """
    bits = sample.flatten().view(torch.int32).long()
    place = torch.arange(len(bits), device=sample.device)
    sums = []
    for seed in _MULTIPLIERS:
        mixed = (bits ^ (place * seed)) * _MULTIPLIERS[0]
        for multiplier in _MULTIPLIERS:
            mixed = (mixed ^ (mixed >> 29)) * multiplier
        sums.append((mixed ^ (mixed >> 32)).sum())
    return torch.stack(sums)
