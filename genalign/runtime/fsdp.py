"""Weights sharded over ranks: FSDP2, torch's ``fully_shard``, configured by the settings of `accelerate launch`.

On a CPU, accelerate silently replaces every FSDP setting by replicas of the network. Here ``fully_shard`` carries its
settings out on any device, or they are refused. ``torch.distributed.tensor``, which takes a second to import, is
imported where a network is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genalign.runtime.blocks import blocks_of

_PARALLELISM = ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")

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
    the forward pass (ZeRO-2). With several ``replicas``, each group of world_size / replicas consecutive ranks shards
    a copy of the network of its own, and only gradients travel between the groups (hybrid sharding): one per node.
    """

    world_size: int
    reshard_after_forward: bool = True
    replicas: int = 1

    def apply(self, network: nn.Module, master_weights: bool = False) -> None:
        """Shard ``network`` in place, block by block of its module lists; this replaces its parameters.

        With ``master_weights`` the shards become float32, and blocks are gathered in the network's dtype: gradients
        are reduced in float32 (``MixedPrecisionPolicy``). Raises ValueError for quantized weights.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import DTensor

        weights = list(network.parameters())
        if not all(parameter.is_floating_point() for parameter in weights):
            raise ValueError("quantized weights cannot be sharded by FSDP: leave model.memory.quantization out")
        sizes: tuple[int, ...] = (self.world_size,)
        names: tuple[str, ...] = ("shard",)
        if self.replicas > 1:
            sizes, names = (self.replicas, self.world_size // self.replicas), ("replicate", "shard")
        mesh, dtype = init_device_mesh(weights[0].device.type, sizes, mesh_dim_names=names), weights[0].dtype
        precision = MixedPrecisionPolicy()
        if master_weights and dtype != torch.float32:  # inputs are cast by the pipeline, which spares the timesteps
            precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            setattr(network, _COMPUTE_DTYPE, dtype)
        for module in [*blocks_of(network), network]:
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard_after_forward, mp_policy=precision)
        if master_weights:
            untyped: Any = network
            untyped._apply(lambda tensor: tensor.float() if isinstance(tensor, DTensor) else tensor)


_COMPUTE_DTYPE = "_genalign_compute_dtype"


def compute_dtype(network: nn.Module) -> torch.dtype:
    """Return the dtype that ``network`` computes in: that of its weights, or of the weights that FSDP gathers."""
    dtype: torch.dtype = getattr(network, _COMPUTE_DTYPE, None) or cast(Any, network).dtype
    return dtype


def unsharded_class(network: nn.Module) -> Any:
    """Return the class of a sharded ``network`` before ``fully_shard`` changed it."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))


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
    reshard_after_forward = variables.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    return Sharding(world_size, reshard_after_forward, _replicas(variables, world_size))


def _replicas(variables: Mapping[str, str], world_size: int) -> int:
    """Read accelerate's parallelism_config; without it, there is one replica per node. Raises ValueError."""
    if not _is_on(variables, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        local = int(variables.get("LOCAL_WORLD_SIZE", world_size))
        return world_size // local if local > 1 and world_size % local == 0 else 1
    sizes = {name: int(variables.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")) for name in _PARALLELISM}
    for name in ("TP", "CP", "SP"):
        if sizes[name] > 1:
            raise ValueError(
                f"accelerate's parallelism_config_{name.lower()}_size is {sizes[name]}, but networks are only sharded"
                " (dp_shard_size) and replicated (dp_replicate_size): set it to 1"
            )
    replicas, shards = sizes["DP_REPLICATE"], sizes["DP_SHARD"]
    if replicas * shards != world_size or shards < 2:
        raise ValueError(
            f"accelerate's parallelism_config has dp_replicate_size {replicas} x dp_shard_size {shards} for"
            f" {world_size} processes: their product must be the number of processes, and dp_shard_size at least 2"
        )
    return replicas


def _is_on(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "false").lower() in ("true", "1")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor; a collective if ``tensor`` is sharded."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return the full tensor to save it; a sharded one on the CPU of rank 0, and an empty tensor on other ranks.

    So one rank at a time holds a full tensor on its device, and one rank holds them all. A collective if it is sharded.
    """
    full = full_tensor(tensor)
    if full is tensor:
        return tensor
    return full.cpu() if dist.get_rank() == 0 else torch.empty(0, dtype=full.dtype)


def gathered_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a sharded ``network`` on rank 0, for which every rank must call this."""
    return {name: gathered(tensor) for name, tensor in network.state_dict().items()}


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, in the same memory, or the ``tensor`` itself; without gradients."""
    tensor = tensor.detach()
    if type(tensor) is Tensor:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_shards(local: Tensor, like: Tensor) -> Tensor:
    """Return the tensor, sharded as ``like``, of which ``local`` is this rank's shard, on any device."""
    if type(like) in (Tensor, nn.Parameter):
        return local
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        return local
    local = local.to(like.device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard ``tensor``, of which every rank has all, in the way of ``like``; return it as it is if ``like`` is not."""
    if type(like) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)


def reshard(network: nn.Module) -> None:
    """Free the gathered weights of a sharded ``network``, so changed weights are gathered again."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
