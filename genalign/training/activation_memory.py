"""The memory that a network's passes need, measured by running them on torch's meta device: shapes without values."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _FusedAttentionFunction(torch.autograd.Function):
    """Attention that saves what fused kernels save: query, key, value, output. Its values are not computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = value.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


class FusedAttention(TorchFunctionMode):
    """A context in which ``scaled_dot_product_attention`` saves what fused kernels save; the meta device has none."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
        return _FusedAttentionFunction.apply(named["query"], named["key"], named["value"])


def saved_activations(network: nn.Module, run: Callable[[], Tensor], checkpointing: bool) -> int:
    """Bytes that autograd saves during ``run``, a forward pass of ``network``: each storage once, without weights.

    With ``checkpointing`` this is the peak of the backward pass: the inputs of all checkpointed blocks, everything
    saved outside of them, and everything saved within the largest of them.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    outside: dict[int, int] = {}  # bytes by storage
    blocks: list[dict[int, int]] = [{}]
    saving = outside

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saving[storage._cdata] = storage.nbytes()
        return tensor

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal saving
        for tensor in _tensors([*args, *kwargs.values()]):
            save(tensor)
        saving = {}
        blocks.append(saving)

    def leave(module: nn.Module, args: object, output: object) -> None:
        nonlocal saving
        saving = outside

    with contextlib.ExitStack() as hooks:
        for block in checkpointed_blocks(network) if checkpointing else ():
            hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(leave))
        with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = run()  # alive until the sum is taken: the address of a freed storage may be used again
        total = sum(outside.values()) + max(sum(inside.values()) for inside in blocks)
        del output
        return total


def checkpointed_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks that diffusers recomputes under gradient checkpointing, down to the innermost.

    They are the entries of the module lists of every module that has the flag ``gradient_checkpointing``.
    """
    for module in network.modules():
        if "gradient_checkpointing" in vars(module):
            for block in itertools.chain(*(child for child in module.children() if isinstance(child, nn.ModuleList))):
                if not any("gradient_checkpointing" in vars(inner) for inner in block.modules()):
                    yield block


@torch.no_grad()
def largest_layer(network: nn.Module, run: Callable[[], Tensor]) -> int:
    """The most bytes that the input and output of one layer of ``network`` take during ``run``."""
    sizes = [0]

    def measure(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in _tensors([*args, output])))

    with contextlib.ExitStack() as hooks, FusedAttention():
        for layer in network.modules():
            if not list(layer.children()):
                hooks.enter_context(layer.register_forward_hook(measure))
        run()
    return max(sizes)


def _tensors(values: Sequence[object]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
