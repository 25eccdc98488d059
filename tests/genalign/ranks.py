"""The work of the processes that `test_distributed` starts, and the files that they write."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from genalign.algorithms import few_step_recipes, pathwise_recipes, preference_recipes, recipe_changes, recipes
from genalign.algorithms.pathwise import Ascent
from genalign.algorithms.recipe import Lag, Recipe
from genalign.cli import main
from genalign.cli import train as train_module
from genalign.diffusion.hypernetwork import Hypernetwork
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import generate
from genalign.diffusion.sampling import Sampling
from genalign.metrics.vendi import vendi_score
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from genalign.runtime.fsdp import Sharding, full_tensor
from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog
from genalign.training.sampler import SampledBatch
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.training.trust_region import TrustRegion
from genalign.types import Prompt, PromptSet
from pipelines import SD3
from rewards.constrained import Constrained
from tests.genalign.training.toy_runs import Session, adversary, careless, channels, redness, seed_generators

PROMPTS = PromptSet("nine", tuple(Prompt(f"{number} circles", {"n": number}) for number in range(9)))
SETTINGS = TrainerSettings(
    rounds=2, prompts_per_round=8, group_size=2, batch_size=2, learning_rate=1e-3, max_grad_norm=1e3
)
ADAPTED = replace(SETTINGS, learning_rate="auto", trust_region=TrustRegion(initial_rate=1.0, probe=8))
SAMPLING = Sampling(num_steps=3, sigmas=(1.0, 0.6, 0.3))
BATCHES = 8
ANCHORED = Ascent(anchor=0.1)
"""Without an anchor each rank measures the distance of one part of a round alone, for the log."""


def seldom(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward with zero variance in most groups."""
    varied = torch.tensor([bool(prompt.metadata and prompt.metadata["n"] in (0, 1, 2)) for prompt in prompts])
    return torch.where(varied, redness(samples, prompts), 0.5)


def greenness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 1].flatten(1).mean(1)


class Channels(nn.Module):
    """A proxy: a weighted sum of a latent's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(16))

    def forward(self, latents: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores: Tensor = latents.flatten(2).mean(2) @ self.weight[: latents.shape[1]]
        return scores


@dataclass(frozen=True)
class Case:
    """A recipe, its reward, the adapter that is trained (None trains the whole network), and the settings."""

    recipe: Recipe
    reward: Callable[[], Any] = lambda: redness
    lora: Lora | None = Lora(rank=2)
    settings: TrainerSettings = SETTINGS

    def on_pool(self, folder: Path) -> Case:
        """Return the same case that learns from the pool ``folder``."""
        return replace(self, settings=replace(self.settings, data=str(folder)))


CASES: Mapping[str, Case] = {
    "trajectory": Case(recipes.flow_grpo(window=1, kl=0.01)),
    "matching": Case(recipes.nft(lag=Lag(slope=0.3))),
    "set": Case(recipes.dragon_set(vendi_score, channels, quality=0.5)),
    "adversarial": Case(recipes.adv_grpo(window=1), lambda: adversary((3, 64, 64), batch_size=6)),
    "seldom": Case(recipes.flow_grpo(window=1), lambda: seldom),
    "seldom matched": Case(recipes.awm(), lambda: seldom),
    "adapted rate": Case(recipes.flow_grpo(window=1, kl=0.01), settings=ADAPTED),
    "adapted rate matched": Case(recipes.nft(lag=Lag(slope=0.3)), settings=ADAPTED),
    "epochs": Case(recipes.flow_grpo(window=1), settings=replace(SETTINGS, epochs=2)),
    "recalibrated": Case(recipe_changes.with_recalibration(recipes.dense_grpo(window=1), step=0.3)),
    "reset": Case(recipe_changes.with_elastic_reset(recipes.nft(lag=Lag(slope=0.3)), every=1, decay=0.5)),
    "constrained": Case(
        recipes.flow_grpo(window=1),
        lambda: Constrained({"red": redness, "green": greenness}, {"red": -9.0, "green": 9.0}, 1.0),
    ),
    "balanced": Case(recipe_changes.with_gradient_balance(recipes.flow_grpo(window=1, kl=0.01), every=3)),
    "dynamic sampling": Case(recipe_changes.with_dynamic_sampling(recipes.flow_grpo(window=1)), lambda: seldom),
    "student": Case(few_step_recipes.rg_lcd(proxy=Channels, steps=4, ascent=ANCHORED)),
    "distribution matching": Case(few_step_recipes.distribution_matching(reward=0.1, fake_steps=2, ascent=ANCHORED)),
    "noise hypernetwork": Case(pathwise_recipes.noise_hypernetwork()),
    "hypernetwork": Case(recipes.flow_grpo(window=1, kl=0.01), lora=Lora(rank=2, hypernetwork=Hypernetwork(width=8))),
    "adaptive group size": Case(recipe_changes.with_adaptive_group_size(recipes.flow_grpo(window=1)), lambda: seldom),
}
WHOLE: Mapping[str, Case] = {  # the reference policy of the KL, and the old policy of the lag, are whole networks
    "whole trajectory": Case(recipes.flow_grpo(window=1, kl=0.01), lora=None),
    "whole matching": Case(recipes.nft(lag=Lag(slope=0.3)), lora=None),
}
OFFLINE: Mapping[str, Case] = {  # from a pool, which has the score; features are those of decoded samples
    "offline": Case(preference_recipes.dpo(draws=1)),
    "offline set": Case(recipes.dragon_set(vendi_score, channels, quality=0.5)),
}
SHARDED = ("trajectory", "matching", "seldom matched", "adapted rate", "reset")


@dataclass
class Recording:
    """Tensors by name, and rows of metrics, of a process's run."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    updates: int = 0

    def add_batch(self, number: int, batch: SampledBatch) -> None:
        """Record a batch of the first round."""
        inputs = batch.rollout.inputs
        self.tensors |= {
            f"batch.{number}.prompt": inputs.prompt,
            f"batch.{number}.noise": torch.tensor(inputs.noise_seeds),
            f"batch.{number}.steps": torch.tensor(inputs.step_seeds),
            f"batch.{number}.x": batch.rollout.x,
            f"batch.{number}.final": batch.rollout.final,
            f"batch.{number}.scores": batch.scores,
        }

    def add_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the gradients before an update."""
        for place, parameter in enumerate(optimizer.param_groups[0]["params"]):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.tensors[f"gradient.{self.updates}.{place}"] = full_tensor(gradient).clone()
        self.updates += 1

    def write(self, path: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path)
        path.with_suffix(".json").write_text(json.dumps(self.rows))


def _trainer(
    opened: SD3, case: Case, processes: ProcessGroup, sharding: Sharding | None, score_log: ScoreLog
) -> Trainer:
    pipeline, rewards = copy.deepcopy(opened), [NamedReward("one", case.reward())]
    if case.recipe.balance:
        rewards.append(NamedReward("other", greenness))
    policy = Policy(pipeline.denoiser, case.lora, processes=processes, sharding=sharding)
    return Trainer(pipeline, policy, score_log.logged(rewards), PROMPTS, case.recipe, case.settings, SAMPLING)


def recorded(
    opened: SD3, case: Case, processes: ProcessGroup = SINGLE_PROCESS, sharding: Sharding | None = None
) -> Recording:
    """Train two rounds, and return a recording of them."""
    trainer, recording = _trainer(opened, case, processes, sharding, ScoreLog()), Recording()
    original = trainer.sampler

    def sampler(*arguments: Any) -> list[SampledBatch]:
        batches = list(original(*arguments))
        if trainer.rounds_done == 0 and not recording.tensors:  # the batches as they are drawn first
            for number, batch in zip(processes.indices(BATCHES), batches, strict=True):
                recording.add_batch(number, batch)
        return batches

    trainer.sampler = sampler
    trainer.learner.optimizer.register_step_pre_hook(lambda optimizer, *_: recording.add_gradients(optimizer))
    for result in trainer.rounds():
        row = result.as_dict()
        row.pop("machine")
        recording.rows.append(row)
    states = [(name, tensor) for reward in trainer.trainable.values() for name, tensor in reward.tensors().items()]
    recording.tensors |= {f"head.{name}": tensor for name, tensor in states if name != "replay.samples"}
    return recording


LAGGING = Case(recipes.nft(lag=Lag(slope=0.3)), lambda: careless)


def resumed(
    opened: SD3, folder: Path, processes: ProcessGroup, sharding: Sharding | None, case: Case = LAGGING
) -> None:
    """Train two rounds without interruption, and two in two sessions, each with a checkpoint at the end."""

    def session(name: str, seed: int) -> Session:
        score_log = ScoreLog()
        seed_generators(seed)
        return Session(folder / name, _trainer(opened, case, processes, sharding, score_log), score_log)

    session("unbroken", processes.rank).go(2)
    session("broken", processes.rank).go(1)
    again = session("broken", 99)
    again.resume()
    again.go(2)


def _adapter(opened: SD3, folder: Path, processes: ProcessGroup) -> None:
    """Save the adapter of a sharded network."""
    pipeline = copy.deepcopy(opened)
    policy = Policy(pipeline.denoiser, Lora(rank=2), processes=processes, sharding=Sharding(processes.world_size))
    assert all(isinstance(parameter, DTensor) for parameter in pipeline.denoiser.parameters())
    with policy.averaged():
        state = policy.adapter_state()
    if processes.is_main:
        assert policy.config is not None
        pipeline.save_lora(folder / "lora", state, policy.config)


def saved_whole(
    opened: SD3, folder: Path, processes: ProcessGroup = SINGLE_PROCESS, sharding: Sharding | None = None
) -> None:
    """Train the whole network for two rounds; write its averaged weights, and samples of the average and reference."""
    trainer = _trainer(opened, WHOLE["whole trajectory"], processes, sharding, ScoreLog())
    for _ in trainer.rounds():
        pass
    trainer.save(folder)
    samples: dict[str, Tensor] = {}
    for name, weights in {"average": trainer.policy.averaged, "reference": trainer.policy.reference}.items():
        with weights():
            (samples[name],) = generate(trainer.pipeline, ["a circle"], [0], trainer.grid, trainer.guidance, 1)
    if processes.is_main:
        save_file(samples, folder / "samples.safetensors")


def become(rank: int, port: int, errors: Path, count: int = 2) -> dict[str, str]:
    """Make this process a rank, whose standard error goes to a file; return the launcher's variables."""
    torch.set_num_threads(1)
    variables = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= variables
    with errors.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    return variables


def work(rank: int, port: int, errors: Path, model: Path, pool: Path, folder: Path) -> None:
    """Write everything that the tests compare, as one of two processes."""
    with process_group(become(rank, port, errors), 15.0, 300.0) as processes:  # on a busy machine
        opened = SD3.load(model)
        for name, case in CASES.items():
            recorded(opened, case, processes).write(folder / f"{name}.{rank}.safetensors")
        for name in SHARDED:
            for again in (True, False):
                recording = recorded(opened, CASES[name], processes, Sharding(2, again))
                recording.write(folder / f"{name}.{'thrice' if again else 'twice'}.{rank}.safetensors")
        for name, case in OFFLINE.items():
            recorded(opened, case.on_pool(pool), processes).write(folder / f"{name}.{rank}.safetensors")
        resumed(opened, folder / "offline", processes, None, OFFLINE["offline"].on_pool(pool))
        resumed(opened, folder / "copies", processes, None)
        resumed(opened, folder / "divided", processes, Sharding(2))
        _adapter(opened, folder, processes)
        for name, case in WHOLE.items():
            recorded(opened, case, processes, Sharding(2)).write(folder / f"{name}.{rank}.safetensors")
        resumed(opened, folder / "whole", processes, Sharding(2), replace(LAGGING, lora=None))
        saved_whole(opened, folder / "whole", processes, Sharding(2))


reward_calls = itertools.count(1)
death: list[signal.Signals] = []


def deadly(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward whose fourth call sends its process the signal ``death``, if there is one."""
    if next(reward_calls) == 4:
        for number in death:
            os.kill(os.getpid(), number)
    return redness(samples, prompts)


def train(
    rank: int,
    port: int,
    errors: Path,
    arguments: Sequence[str],
    signals: Sequence[signal.Signals],
    variables: Mapping[str, str] = {},
) -> None:
    """Train as one of two processes, which miss a heartbeat after 20 s; the second has the ``signals``."""
    become(rank, port, errors)
    os.environ |= variables
    train_module.process_group = functools.partial(process_group, heartbeat=5.0, silence=20.0)
    death.extend(signals if rank == 1 else ())
    raise SystemExit(main.main(["train", *arguments]))
