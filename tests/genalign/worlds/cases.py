"""Cases for the verifiers of both worlds: scenes or clips, with the metadata that they are checked against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from genalign.types import Metadata
from genalign.worlds import shapes, tones
from genalign.worlds.shapes.verifier import verify as verify_shapes
from genalign.worlds.tones.verifier import verify as verify_tones
from genalign.worlds.verification import Verification

Corruption = Callable[[Tensor, np.random.Generator], Tensor]
RENDER_AND_VERIFY: dict[type, Any] = {
    shapes.Scene: (shapes.render, verify_shapes),
    tones.Clip: (tones.render, verify_tones),
}


@dataclass(frozen=True)
class Case:
    drawing: Any  # a Scene or a Clip
    metadata: Metadata


def true_cases(world: Any, sample: Callable[..., Any], per_task: int, seed: int) -> list[Case]:
    """Drawings by ``sample`` of seen and held-out prompts of each task, in equal numbers per task."""
    rng = np.random.default_rng(seed)
    cases = []
    seen, held_out = world.prompts("iid").by_task(), world.prompts("comp").by_task()
    for task, group in seen.items():
        pool = [prompt.metadata for prompt in (*group, *held_out.get(task, ()))]
        for index in rng.integers(len(pool), size=per_task):
            cases.append(Case(sample(pool[index], rng), pool[index]))
    return cases


def untouched(samples: Tensor, rng: np.random.Generator) -> Tensor:
    return samples


def verifications(cases: list[Case], corruption: Corruption) -> list[Verification]:
    render, verify = RENDER_AND_VERIFY[type(cases[0].drawing)]
    samples = corruption(render([case.drawing for case in cases]), np.random.default_rng(0))
    return verify(samples, [case.metadata for case in cases])


def strict_rate(cases: list[Case], corruption: Corruption) -> float:
    return strict_share(verifications(cases, corruption))


def strict_share(verified: list[Verification]) -> float:
    return float(np.mean([verification.strict for verification in verified]))


class Verified(dict[Corruption, list[Verification]]):
    """The verifications of the same cases under each corruption, which several tests read."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases

    def __missing__(self, corruption: Corruption) -> list[Verification]:
        self[corruption] = verifications(self.cases, corruption)
        return self[corruption]
