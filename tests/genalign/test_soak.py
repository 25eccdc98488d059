"""Ten thousand optimiser steps in one process hold no more at the end than at the beginning."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.dynamics import FlowSDE
from genalign.policy import Lora, Policy
from genalign.recipes import flow_grpo
from genalign.sampling import Sampling
from genalign.scoring import NamedReward
from genalign.training import Settings, Trainer
from genalign.types import Prompt, PromptSet
from pipelines import SD3

STEPS, ROUND = 10_000, 2


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes of memory, threads, open files and children."""

    memory: int
    threads: int
    files: int
    children: int

    @classmethod
    def now(cls) -> Held:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        files = len(list(Path("/proc/self/fd").iterdir()))
        return cls(pages * resource.getpagesize(), threading.active_count(), files, len(children))


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what Linux tells of a process")
def test_ten_thousand_steps_leave_nothing_behind(tiny_folder: Path) -> None:
    tiny = SD3.load(tiny_folder)
    settings = Settings(
        rounds=STEPS // ROUND,
        prompts_per_round=2,
        group_size=2,
        batch_size=2,
        updates_per_round=ROUND,
        learning_rate=1e-6,
    )
    prompts = PromptSet("two", (Prompt("a circle"), Prompt("two squares")))
    policy, rewards = Policy(tiny.denoiser, Lora(rank=2)), [NamedReward("red", redness, timeout=60.0)]
    recipe = flow_grpo(FlowSDE(0.7), window=1)
    trainer = Trainer(tiny, policy, rewards, prompts, recipe, settings, Sampling(2, (1.0, 0.5)))
    rounds = trainer.rounds()
    for _ in islice(rounds, settings.rounds // 10):  # caches and allocators fill up
        pass
    early = Held.now()
    results = list(rounds)
    late = Held.now()
    assert policy.updates == STEPS and torch.tensor([result.loss for result in results]).isfinite().all()
    assert late.memory < 1.02 * early.memory
    assert (late.threads, late.files, late.children) == (early.threads, early.files, early.children)
