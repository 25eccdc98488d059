"""Networks whose weights are divided among the processes: FSDP2, torch's ``fully_shard``, as `accelerate launch` is
told to ask for it.

accelerate itself turns every FSDP setting on a CPU silently into copies of the network; here its settings are carried
out by ``fully_shard``, on any device, or refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: scripts/configs/accelerate/zero2.yaml divides as ZeRO-2 does, by FSDP2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: choose FSDP2",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: leave it out, and see docs/scaling.md for what takes memory",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: set model.memory.checkpointing instead",
}


@dataclass(frozen=True)
class Sharding:
    """A network divided among ``processes``, one block at a time made whole for its part of a pass. ``again``: it is
    made whole anew for the backward pass (ZeRO-3), and not kept since the forward pass (ZeRO-2)."""

    processes: int
    again: bool = True

    def apply(self, network: nn.Module) -> None:
        """Divide ``network``, in place, by the blocks of its lists of blocks. Its parameters are others afterwards.

        Raises ValueError for weights that are not floating-point numbers: quantised ones.
        """
        if not all(parameter.is_floating_point() for parameter in network.parameters()):
            raise ValueError("quantised weights cannot be divided among processes: leave model.memory.quantization out")
        mesh = init_device_mesh(next(network.parameters()).device.type, (self.processes,))
        lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
        for module in [*(block for blocks in lists for block in blocks), network]:
            fully_shard(module, mesh=mesh, reshard_after_forward=self.again)


def asked_for(variables: Mapping[str, str], processes: int) -> Sharding | None:
    """What `accelerate launch` was told about FSDP; None for nothing. Raises ValueError for what is not to be had."""
    for name, told in _UNSUPPORTED.items():
        if _is_on(variables, name):
            raise ValueError(f"accelerate was asked for what genalign does not do by it, {told}")
    if variables.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ValueError("accelerate's mixed_precision is not used here: say no to it, and set model.autocast")
    if not _is_on(variables, "ACCELERATE_USE_FSDP"):
        return None
    if variables.get("FSDP_VERSION", "1") != "2":
        raise ValueError("only version 2 of FSDP is supported: set fsdp_version: 2 in accelerate's configuration")
    if processes < 2:
        raise ValueError("FSDP divides a network among processes, but there is one: start more, or leave it out")
    return Sharding(processes, variables.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def _is_on(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "false").lower() in ("true", "1")


def require_sharded(parameters: Sequence[Tensor]) -> None:
    """Raise ValueError where one is not divided: a run that asked for FSDP is not to go on without."""
    whole_ones = sum(not isinstance(parameter, DTensor) for parameter in parameters)
    if whole_ones:
        raise ValueError(
            f"FSDP was asked for, but {whole_ones} of {len(parameters)} trained tensors are not divided: leave FSDP out"
        )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is divided, a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, whole in every process, divided as ``like`` is, if it is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)


def put_away(network: nn.Module) -> None:
    """Have every part of a divided ``network`` made whole anew, after its weights have changed."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def lent(network: nn.Module, parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> Iterator[None]:
    """``tensors`` in place of the ``parameters`` of a divided ``network`` for a while. They are copied in and out: what
    is gathered from the processes is the memory that the parameters had when they were divided."""
    held = [parameter.detach().clone() for parameter in parameters]
    _copy(parameters, tensors)
    put_away(network)
    try:
        yield
    finally:
        _copy(parameters, held)
        put_away(network)


@torch.no_grad()
def _copy(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data.copy_(tensor)
