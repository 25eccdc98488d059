"""Rewards that share the answers of one judge: each is one of its grades.

Judges with several grades are ``rewards.remote.vlm_judges.WrittenRubricJudge`` and ``RubricJudge``, or any other
``DimensionJudge``, such as a network with several heads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from genalign.types import Prompt

_REMEMBERED = 4096  # samples of a judge with a grade that was not read yet


class DimensionJudge(Protocol):
    """A judge that grades a sample by several names at once. Judges that are equal share their answers."""

    def dimensions(self, samples: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """Grade samples (B, ...) by every name, always the same ones, (B,) each; NaN where there is no grade."""


@dataclass(frozen=True)
class DimensionReward:
    """One grade of a judge, as a reward with its own name and weight.

    Rewards of equal judges ask once about a sample, whichever of them comes first: an answer is held, for up to 4096
    samples, until every one of them has read its grade. A grade that was read is asked for anew. The judges of a
    configuration are equal if their settings are.
    """

    judge: DimensionJudge
    dimension: str

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,), float32 on the CPU; NaN where the answer has no such grade.

        Raises ValueError for a dimension that is no name of the judge.
        """
        if len(samples) != len(prompts):
            raise ValueError(f"there must be one prompt per sample, not {len(prompts)} for {len(samples)}")
        keys = [_key(sample, prompt) for sample, prompt in zip(samples.detach().cpu(), prompts, strict=True)]
        answers = _answers_of(self.judge)
        with answers.lock:  # another reward of this judge waits, and reads this one's answers
            unread = answers.unread
            new = {key: row for row, key in enumerate(keys) if self.dimension not in unread.get(key, {})}
            if new:
                rows = list(new.values())
                with torch.no_grad():
                    columns = self.judge.dimensions(samples[rows].detach(), [prompts[row] for row in rows])
                if self.dimension not in columns:
                    raise ValueError(f"the judge has no {self.dimension!r}: choose from {', '.join(columns)}")
                for place, key in enumerate(new):
                    unread[key] = {name: float(column[place]) for name, column in columns.items()}
                    unread.move_to_end(key)
            scores = torch.tensor([unread[key][self.dimension] for key in keys])
            for key in dict.fromkeys(keys):
                del unread[key][self.dimension]
                if not unread[key]:
                    del unread[key]
            while len(unread) > _REMEMBERED:
                unread.popitem(last=False)
        return scores


@dataclass
class _Answers:
    """The grades of one judge that were not read yet, by sample and prompt."""

    judge: DimensionJudge
    lock: threading.Lock = field(default_factory=threading.Lock)
    unread: OrderedDict[bytes, dict[str, float]] = field(default_factory=OrderedDict)


_JUDGES: list[_Answers] = []
_JUDGES_LOCK = threading.Lock()


def _answers_of(judge: DimensionJudge) -> _Answers:
    """Return the answers of a judge, shared by all rewards of equal judges in this process."""
    with _JUDGES_LOCK:
        for answers in _JUDGES:
            if answers.judge == judge:
                return answers
        _JUDGES.append(_Answers(judge))
        return _JUDGES[-1]


def _key(sample: Tensor, prompt: Prompt) -> bytes:
    """Identify a sample (...) on the CPU and its prompt."""
    described = json.dumps([list(sample.shape), prompt.text, prompt.metadata], sort_keys=True, default=str)
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    digest.update(sample.float().contiguous().numpy().data)
    return digest.digest()
