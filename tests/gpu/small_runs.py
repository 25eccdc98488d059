"""Small runs of tiny checkpoints on a device, alone or as one of two processes.

``GENALIGN_TEST_DEVICE=cpu make test-gpu`` runs the tests on the CPU, except for what needs a GPU's libraries.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from genalign.runtime.fsdp import Sharding, full_tensor
from genalign.scoring.score import NamedReward
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines.base import DiffusersPipeline
from tests.pipelines.tiny_checkpoints import FAMILIES

DEVICE = os.environ.get("GENALIGN_TEST_DEVICE", "cuda")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="there is no CUDA device: GENALIGN_TEST_DEVICE=cpu runs the tests on the CPU",
    ),
]
"""The marks of a test that runs on ``DEVICE``."""

PROMPTS = PromptSet.of(["a red circle", "two blue squares"])
SETTINGS = TrainerSettings(
    rounds=2, prompts_per_round=2, group_size=4, batch_size=4, updates_per_round=1, learning_rate=1e-3
)


def places(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward of a sample's place in its batch, which rounding of the samples does not change."""
    return torch.linspace(-1, 1, len(samples))


def opened(
    name: str, folder: Path, device: str, dtype: torch.dtype = torch.float32, **options: Any
) -> DiffusersPipeline:
    """Open a tiny checkpoint of a family."""
    family = FAMILIES[name]
    return family.ours.load(folder, device=device, dtype=dtype, **{**family.options, **options})


def trained_policy(
    pipeline: DiffusersPipeline, processes: ProcessGroup = SINGLE_PROCESS, sharding: Sharding | None = None
) -> Policy:
    """A policy whose adapter has an effect: the second matrix of a new one is zero, where the first has no gradient."""
    policy = Policy(pipeline.denoiser, Lora(rank=4, alpha=4), processes=processes)
    for parameter in policy.parameters:
        values = torch.empty(parameter.shape)
        torch.nn.init.normal_(values, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data.copy_(values)
    if sharding is None:
        return policy
    return Policy(pipeline.denoiser, None, has_adapter=True, processes=processes, sharding=sharding)


def trainer_of(pipeline: DiffusersPipeline, policy: Policy, settings: TrainerSettings = SETTINGS) -> Trainer:
    """A trainer by Flow-GRPO, with one trained step."""
    rewards = [NamedReward("places", places)]
    return Trainer(
        pipeline, policy, rewards, PROMPTS, flow_grpo(window=1), settings, Sampling(num_steps=3, guidance=1.0)
    )


class Recorder(torch.optim.SGD):
    """An optimizer that records the gradients instead of following them."""

    gradient = torch.empty(0)

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # no closure is given
        parts = [full_tensor(p.grad).flatten() for g in self.param_groups for p in g["params"] if p.grad is not None]
        self.gradient = torch.cat(parts).double().cpu()


def first_gradient(trainer: Trainer) -> tuple[Tensor, float]:
    """The gradient of a run's first update, and the largest log-ratio of samples that have just been drawn."""
    trainer.learner.optimizer = recorder = Recorder(trainer.policy.parameters, lr=1e-9)
    result = next(trainer.rounds())
    assert result.skipped_updates == 0
    return recorder.gradient, result.log_ratio_max


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two gradients."""
    return float((a @ b) / (a.norm() * b.norm()))


def as_rank(rank: int, port: int, folder: Path, model: Path, device: str, dtype: torch.dtype, shard: bool) -> None:
    """Make the first update as one of two processes, and write what they are compared by."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    variables = {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= variables
    with (folder / f"error.{rank}").open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    with process_group(variables, 15.0, 300.0) as processes:
        pipeline = opened("sd3", model, device, dtype)
        policy = trained_policy(pipeline, processes, Sharding(2) if shard else None)
        gradient, log_ratio = first_gradient(trainer_of(pipeline, policy))
        found: Mapping[str, Any] = {
            "device": str(pipeline.device),
            "on the first GPU": torch.cuda.memory_allocated(0) if device == "cuda" else 0,
            "log_ratio": log_ratio,
            "gradient": gradient.tolist(),
        }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
