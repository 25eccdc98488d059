"""A small network sharded over four processes on the CPU, as two nodes of two, against one process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from genalign.cli.model_settings import Model
from genalign.cli.train import _sharding
from genalign.diffusion.policy import Lora, Policy, WeightSnapshot
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from genalign.runtime.fsdp import Sharding, compute_dtype, full_tensor, gathered_state, sharding_from_environment
from genalign.training.settings import TrainerSettings
from tests.genalign.ranks import become
from tests.http_servers import free_port

RANKS = 4


class Blocks(nn.Module):
    """Three linear blocks, of a size that four ranks cannot share evenly, and a buffer of another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)).to(dtype)
            self.head = nn.Linear(6, 1, dtype=dtype)
        self.register_buffer("scale", torch.ones(6, dtype=torch.float64))

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) + x
        output: Tensor = self.head(x * self.scale.to(x.dtype))
        return output


CASES: Mapping[str, tuple[Lora | None, torch.dtype]] = {
    "whole": (None, torch.float32),
    "whole bf16": (None, torch.bfloat16),
    "adapter": (Lora(rank=2, targets=("0", "1", "2")), torch.float32),
    "adapter bf16": (Lora(rank=2, targets=("0", "1", "2")), torch.bfloat16),  # float32 adapters on a bfloat16 base
}
MESHES = {"flat": Sharding(RANKS), "hybrid": Sharding(RANKS, replicas=2), "zero2": Sharding(RANKS, False, replicas=2)}


def trained(name: str, processes: ProcessGroup = SINGLE_PROCESS, sharding: Sharding | None = None) -> dict[str, Tensor]:
    """Make three updates on each rank's rows; return the first gradients, the weights and outputs."""
    lora, dtype = CASES[name]
    network = Blocks(dtype)
    policy = Policy(network, lora, ema_decay=0.5, processes=processes, sharding=sharding)
    rows = torch.linspace(-2, 2, RANKS * 2 * 6).view(RANKS, 2, 6)
    own = rows if processes == SINGLE_PROCESS else rows[processes.rank][None]
    optimizer, tensors = torch.optim.AdamW(policy.parameters, lr=0.01), dict[str, Tensor]()
    for update in range(3):
        for part in own:
            loss = network(part.to(compute_dtype(network))).float().square().sum()
            with torch.no_grad(), policy.reference():  # as a KL, between the forward and the backward pass
                network(part.to(compute_dtype(network)))
            loss.backward()
        policy.sum_gradients()
        if update == 0:
            gradients = [full_tensor(p.grad) for p in policy.parameters if p.grad is not None]
            tensors |= {f"gradient.{place}": gradient.clone() for place, gradient in enumerate(gradients)}
        optimizer.step()
        optimizer.zero_grad()
        policy.update_average()
    tensors |= {f"weight.{place}": full_tensor(p.detach()).clone() for place, p in enumerate(policy.parameters)}
    if sharding:
        assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in policy.parameters)
        assert compute_dtype(network) == dtype and network.scale.dtype == torch.float64
    x = rows.flatten(0, 1).to(compute_dtype(network))
    with torch.no_grad():
        tensors["now"] = network(x).float()
        with policy.reference(), policy.averaged():  # an averaged policy within another context
            tensors["averaged within"] = network(x).float()
        with policy.averaged():
            tensors["averaged"] = network(x).float()
        with policy.reference():
            tensors["reference"] = network(x).float()
        tensors["now again"] = network(x).float()
    assert torch.equal(tensors["now"], tensors["now again"])
    state = gathered_state(network)
    if processes.is_main:
        tensors |= {f"state.{key}": tensor for key, tensor in state.items()}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def work(rank: int, port: int, folder: Path) -> None:
    """Train every case on every mesh, as one of four processes."""
    with process_group(become(rank, port, folder / f"error.{rank}", RANKS), 15.0, 300.0) as processes:
        for name in CASES:
            for mesh, sharding in MESHES.items():
                tensors = trained(name, processes, sharding)
                if processes.is_main:
                    save_file(tensors, folder / f"{name}.{mesh}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the results of four processes."""
    folder, context = tmp_path_factory.mktemp("four"), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.genalign.runtime.test_fsdp", "peft"])
    port = free_port()
    started = [context.Process(target=work, args=(rank, port, folder)) for rank in range(RANKS)]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
    assert [process.exitcode for process in started] == [0] * RANKS, (folder / "error.0").read_text()
    return folder


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nodes_that_shard_for_themselves_learn_what_one_process_does(folder: Path, name: str) -> None:
    results = {mesh: load_file(folder / f"{name}.{mesh}.safetensors") for mesh in MESHES}
    low = CASES[name][1] == torch.bfloat16
    alone = trained(name)
    if low and CASES[name][0] is None:  # one process trains it in float32
        expected, tolerance = trained("whole"), 0.05
    else:
        expected, tolerance = alone, 0.02 if low else 1e-5
    for result in results.values():
        gradients = [key for key in expected if key.startswith("gradient.")]
        ours, theirs = (torch.cat([tensors[key].flatten() for key in gradients]) for tensors in (result, expected))
        assert distance(ours, theirs) < tolerance
        outputs = ["now", "averaged", "averaged within", "reference"]
        assert max(distance(result[key], expected[key]) for key in outputs) < max(tolerance, 1e-4)
        assert distance(result["averaged"], result["now"]) > 1e-3 < distance(result["reference"], result["averaged"])
    keys = [key for key in results["flat"] if key.startswith(("gradient.", "weight."))]
    hybrid, flat = (torch.cat([results[mesh][key].flatten() for key in keys]) for mesh in ("hybrid", "flat"))
    assert distance(hybrid, flat) < (1e-2 if low else 1e-5)
    assert all(torch.equal(results["hybrid"][key], results["zero2"][key]) for key in keys)


@pytest.mark.slow
def test_the_state_of_a_sharded_network_is_gathered_on_rank_0(folder: Path) -> None:
    state = {k: t for k, t in load_file(folder / "whole bf16.hybrid.safetensors").items() if k.startswith("state.")}
    expected = Blocks(torch.float32).state_dict()
    assert state.keys() == {f"state.{name}" for name in expected}
    assert all(state[f"state.{name}"].shape == tensor.shape for name, tensor in expected.items())


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PARALLELISM = FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


def sizes(**numbers: int) -> dict[str, str]:
    return PARALLELISM | {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in numbers.items()}


@pytest.mark.parametrize(
    ("variables", "processes", "replicas"),
    [
        (FSDP | {"LOCAL_WORLD_SIZE": "8"}, 8, 1),
        (FSDP | {"LOCAL_WORLD_SIZE": "8"}, 32, 4),
        (FSDP | {"LOCAL_WORLD_SIZE": "1"}, 4, 1),  # nodes of one GPU shard over all of them
        (sizes(dp_replicate=1, dp_shard=16) | {"LOCAL_WORLD_SIZE": "8"}, 16, 1),
        (sizes(dp_replicate=4, dp_shard=4) | {"LOCAL_WORLD_SIZE": "8"}, 16, 4),
    ],
)
def test_every_node_shards_a_copy_unless_accelerate_says_otherwise(
    variables: dict[str, str], processes: int, replicas: int
) -> None:
    assert sharding_from_environment(variables, processes) == Sharding(processes, replicas=replicas)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (sizes(dp_replicate=2, dp_shard=4), "2 x dp_shard_size 4 for 16 processes: their product must be"),
        (sizes(dp_replicate=16, dp_shard=1), "dp_shard_size at least 2"),
        (sizes(dp_shard=8, tp=2), "parallelism_config_tp_size is 2"),
    ],
)
def test_other_parallelism_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharding_from_environment(variables, 16)


@pytest.mark.parametrize(
    ("setting", "message"), [("halve", "on_out_of_memory halve"), ("stop", "different numbers of")]
)
def test_what_shards_cannot_train_is_refused(monkeypatch: pytest.MonkeyPatch, setting: Any, message: str) -> None:
    for name, value in (FSDP | {"LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ProcessGroup, "all_gather_object", lambda self, value: [value, 1])  # the other's node has 8
    settings = Mock(lora=None, model=Model("sd"), training=TrainerSettings(on_out_of_memory=setting))
    with pytest.raises(ValueError, match=message):
        _sharding(settings, ProcessGroup(0, 12))


def test_a_snapshot_on_another_device_is_copied_in_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Blocks(torch.float32)
    policy, x = Policy(network, None), torch.ones(1, 6)
    first, snapshot = network(x), policy.snapshot()
    addresses = [parameter.data_ptr() for parameter in policy.parameters]
    monkeypatch.setattr(WeightSnapshot, "is_elsewhere", True)  # there is one device here
    with torch.no_grad():
        policy.parameters[0].add_(1)
    now = network(x)
    with policy.using(snapshot):
        assert torch.equal(network(x), first)
        assert [parameter.data_ptr() for parameter in policy.parameters] == addresses
    assert torch.equal(network(x), now) and not torch.equal(now, first)
    now.sum().backward()  # of a graph from before the context
