"""What the processes of ``test_processes`` do, and what they write of it."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from genalign.algorithms import recipes
from genalign.algorithms.recipes import Lag, Recipe
from genalign.cli.resume import EncoderCache
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.metrics.vendi import vendi_score
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from genalign.runtime.fsdp import Sharding, full_tensor
from genalign.runtime.state import Generators, PerRankState
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.checkpointing import Checkpoints, CheckpointWriter
from genalign.training.sampler import Sampled
from genalign.training.trainer import Trainer, TrainerSettings
from genalign.types import Prompt, PromptSet
from pipelines import SD3
from rewards.adversarial import AdversarialReward, DiscriminatorSettings, PatchWeights
from rewards.backbones.reference_images import ImageTensor, ReferencePool

PROMPTS = PromptSet("nine", tuple(Prompt(f"{number} circles", {"n": number}) for number in range(9)))
SETTINGS = TrainerSettings(
    rounds=2, prompts_per_round=8, group_size=2, batch_size=2, learning_rate=1e-3, max_grad_norm=1e3
)
SAMPLING = Sampling(num_steps=3, sigmas=(1.0, 0.6, 0.3))
BATCHES = 8


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1) - samples[:, 1:].flatten(1).mean(1)


def seldom(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Most groups have no spread."""
    asked = torch.tensor([bool(prompt.metadata and prompt.metadata["n"] in (0, 1, 2)) for prompt in prompts])
    return torch.where(asked, redness(samples, prompts), 0.5)


def careless(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Draws from a generator that nobody seeds."""
    return redness(samples, prompts) + 0.01 * torch.rand(len(samples))


def channels(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


def adversary() -> AdversarialReward:
    pool = ReferencePool(ImageTensor(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))))
    learning = DiscriminatorSettings(steps_per_update=2, batch_size=6, replay=6, learning_rate=1e-2)
    return AdversarialReward(channels, pool, weights=PatchWeights(1.0, 0.0), learning=learning)


@dataclass(frozen=True)
class Case:
    """A recipe and the reward that it is run with."""

    recipe: Recipe
    reward: Callable[[], Any] = lambda: redness


CASES: Mapping[str, Case] = {
    "trajectory": Case(recipes.flow_grpo(window=1, kl=0.01)),
    "matching": Case(recipes.nft(lag=Lag(slope=0.3))),
    "set": Case(recipes.dragon_set(vendi_score, channels, quality=0.5)),
    "adversarial": Case(recipes.adv_grpo(window=1), adversary),
    "seldom": Case(recipes.flow_grpo(window=1), lambda: seldom),
    "seldom matched": Case(recipes.awm(), lambda: seldom),
}
SHARDED = ("trajectory", "matching", "seldom matched")


@dataclass
class Seen:
    """What a process had of a run: tensors by name, and the rows of its metrics."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    updates: int = 0

    def batch(self, number: int, part: Sampled) -> None:
        """Of the first round."""
        start = part.rollout.inputs
        self.tensors |= {
            f"batch.{number}.prompt": start.prompt,
            f"batch.{number}.noise": torch.tensor(start.noise_seeds),
            f"batch.{number}.steps": torch.tensor(start.step_seeds),
            f"batch.{number}.x": part.rollout.x,
            f"batch.{number}.final": part.rollout.final,
            f"batch.{number}.scores": part.scores,
        }

    def gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Before an update."""
        for place, parameter in enumerate(optimizer.param_groups[0]["params"]):
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.tensors[f"gradient.{self.updates}.{place}"] = full_tensor(found).clone()
        self.updates += 1

    def write(self, path: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path)
        path.with_suffix(".json").write_text(json.dumps(self.rows))


def _trainer(
    opened: SD3, case: Case, processes: ProcessGroup, sharding: Sharding | None, score_log: ScoreLog
) -> Trainer:
    pipeline, reward = copy.deepcopy(opened), NamedReward("one", case.reward())
    policy = Policy(pipeline.denoiser, Lora(rank=2), processes=processes, sharding=sharding)
    return Trainer(pipeline, policy, score_log.logged([reward]), PROMPTS, case.recipe, SETTINGS, SAMPLING)


def watched(
    opened: SD3, case: Case, processes: ProcessGroup = SINGLE_PROCESS, sharding: Sharding | None = None
) -> Seen:
    """Two rounds."""
    trainer, seen = _trainer(opened, case, processes, sharding, ScoreLog()), Seen()
    make = trainer.sampler

    def sampler(*arguments: Any) -> list[Sampled]:
        parts = list(make(*arguments))
        for number, part in zip(processes.indices(BATCHES), parts, strict=True) if trainer.rounds_done == 0 else ():
            seen.batch(number, part)
        return parts

    trainer.sampler = sampler  # type: ignore[assignment]  # it is called as one is
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.gradients(optimizer))
    for result in trainer.rounds():
        row = result.as_dict()
        row.pop("machine")
        seen.rows.append(row)
    seen.tensors |= {f"head.{n}": t for r in trainer.trainable.values() for n, t in r.tensors().items()}
    return seen


def _session(
    opened: SD3, folder: Path, processes: ProcessGroup, sharding: Sharding | None
) -> tuple[Trainer, CheckpointWriter]:
    score_log = ScoreLog()
    case = Case(recipes.nft(lag=Lag(slope=0.3)), lambda: careless)
    trainer = _trainer(opened, case, processes, sharding, score_log)
    parts = {
        "trainer": trainer,
        "texts": EncoderCache(trainer.pipeline.pipeline),
        "generators": PerRankState(Generators(), processes),
    }
    return trainer, CheckpointWriter(Checkpoints(folder, processes=processes), parts, score_log)


def _go(trainer: Trainer, keeper: CheckpointWriter, rounds: int) -> None:
    for _ in trainer.rounds():
        keeper.after(trainer.rounds_done, last=False)
        if trainer.rounds_done == rounds:
            return


def resumed(opened: SD3, folder: Path, processes: ProcessGroup, sharding: Sharding | None) -> None:
    """Two rounds at once, and two with another process's life between them, each with a checkpoint at the end."""
    torch.manual_seed(processes.rank)
    _go(*_session(opened, folder / "unbroken", processes, sharding), 2)
    torch.manual_seed(processes.rank)
    _go(*_session(opened, folder / "broken", processes, sharding), 1)
    torch.manual_seed(99)
    trainer, keeper = _session(opened, folder / "broken", processes, sharding)
    checkpoint = keeper.checkpoints.latest()
    assert checkpoint is not None and checkpoint.rounds == 1
    keeper.resume(checkpoint)
    _go(trainer, keeper, 2)


def _adapter(opened: SD3, folder: Path, processes: ProcessGroup) -> None:
    """A divided network's adapter by name, saved and put on."""
    pipeline = copy.deepcopy(opened)
    policy = Policy(pipeline.denoiser, Lora(rank=2), processes=processes, sharding=Sharding(processes.world_size))
    assert all(isinstance(parameter, DTensor) for parameter in pipeline.denoiser.parameters())
    with policy.averaged():
        state = policy.adapter_state()
    if processes.is_main:
        assert policy.config is not None
        pipeline.save_lora(folder / "lora", state, policy.config)


def work(rank: int, port: int, model: Path, folder: Path) -> None:
    """All that the tests compare, by one of two processes."""
    torch.set_num_threads(1)
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= variables
    with (folder / f"said.{rank}").open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    with process_group(variables, 15.0, 300.0) as processes:  # on a busy machine
        opened = SD3.load(model)
        for name, case in CASES.items():
            watched(opened, case, processes).write(folder / f"{name}.{rank}.safetensors")
        for name in SHARDED:
            for again in (True, False):
                seen = watched(opened, CASES[name], processes, Sharding(2, again))
                seen.write(folder / f"{name}.{'thrice' if again else 'twice'}.{rank}.safetensors")
        resumed(opened, folder / "copies", processes, None)
        resumed(opened, folder / "divided", processes, Sharding(2))
        _adapter(opened, folder, processes)
