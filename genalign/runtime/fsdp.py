"""Weights sharded over ranks: FSDP2, torch's ``fully_shard``, configured by the settings of `accelerate launch`.

On a CPU, accelerate silently replaces every FSDP setting by replicas of the network. Here ``fully_shard`` carries its
settings out on any device, or they are refused. ``torch.distributed.tensor``, which takes a second to import, is
imported where a network is sharded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: scripts/configs/accelerate/zero2.yaml shards as ZeRO-2 does, by FSDP2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: choose FSDP2",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: leave it out, and see docs/scaling.md for what takes memory",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: set model.memory.checkpointing instead",
}


@dataclass(frozen=True)
class Sharding:
    """FSDP2 over ``world_size`` ranks, which gathers one block at a time.

    With ``reshard_after_forward`` a block is gathered again for the backward pass (ZeRO-3) instead of being held since
    the forward pass (ZeRO-2).
    """

    world_size: int
    reshard_after_forward: bool = True

    def apply(self, network: nn.Module) -> None:
        """Shard ``network`` in place, block by block of its module lists; this replaces its parameters.

        Raises ValueError for quantized weights.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if not all(parameter.is_floating_point() for parameter in network.parameters()):
            raise ValueError("quantized weights cannot be sharded by FSDP: leave model.memory.quantization out")
        mesh = init_device_mesh(next(network.parameters()).device.type, (self.world_size,))
        lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
        for module in [*(block for blocks in lists for block in blocks), network]:
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard_after_forward)


def sharding_from_environment(variables: Mapping[str, str], world_size: int) -> Sharding | None:
    """Read the FSDP settings of `accelerate launch`; None without any. Raises ValueError for unsupported settings."""
    for name, advice in _UNSUPPORTED.items():
        if _is_on(variables, name):
            raise ValueError(f"accelerate's configuration has a setting that genalign does not support, {advice}")
    if variables.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ValueError("accelerate's mixed_precision is not used here: say no to it, and set model.autocast")
    if not _is_on(variables, "ACCELERATE_USE_FSDP"):
        return None
    if variables.get("FSDP_VERSION", "1") != "2":
        raise ValueError("only version 2 of FSDP is supported: set fsdp_version: 2 in accelerate's configuration")
    if world_size < 2:
        raise ValueError("FSDP shards a network over processes, but there is one: start more, or leave FSDP out")
    return Sharding(world_size, variables.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def _is_on(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "false").lower() in ("true", "1")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor; a collective if ``tensor`` is sharded."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard ``tensor``, of which every rank has all, in the way of ``like``; return it as it is if ``like`` is not."""
    if type(like) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)


def reshard(network: nn.Module) -> None:
    """Free the gathered weights of a sharded ``network``, so that changed weights are gathered anew."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def swapped_weights(
    network: nn.Module, parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Replace the ``parameters`` of a sharded ``network`` by ``tensors`` inside the context.

    They are copied in and out, because FSDP gathers from the memory that the parameters had when they were sharded.
    """
    saved = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def load(tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.data.copy_(tensor)
        reshard(network)

    load(tensors)
    try:
        yield
    finally:
        load(saved)
