"""Optimizer states as named tensors, gathered and sharded with the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from genalign.runtime.fsdp import full_tensor, shard_like


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter slots, full tensors, as ``"<parameter index>.<slot>"``.

    Nested slots get one more dotted part. Hyperparameters are not included.
    """
    return {name: full_tensor(torch.as_tensor(value)) for name, value in _flat(optimizer.state_dict()["state"])}


def _flat(slots: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in slots.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", value


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the slots that ``optimizer_tensors`` returned."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        index, *inner, slot = name.split(".")
        slots = state.setdefault(int(index), {})
        for key in inner:
            slots = slots.setdefault(key, {})
        slots[slot] = shard_like(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
