"""What a network's passes hold in memory, measured by running them on torch's meta device: shapes without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Fused(torch.autograd.Function):
    """Attention as fused kernels keep it: query, key, value and output, nothing quadratic in the tokens. Its values are
    not computed.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = value.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    attended: Tensor = _Fused.apply(query, key, value)
    return attended


class FusedAttention(TorchFunctionMode):
    """Within it, ``scaled_dot_product_attention`` keeps what fused kernels keep; the meta device has none of them."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        called = _fused if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


@dataclass
class _Tally:
    """Bytes by storage: of what is kept, and of what is kept inside the block that is running."""

    own: set[int]
    kept: dict[int, int] = field(default_factory=dict)
    inside: dict[int, int] | None = None
    largest: int = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd keeps a tensor."""
        self._add(self.kept if self.inside is None else self.inside, tensor)
        return tensor

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A checkpointed block begins: its inputs are kept."""
        for tensor in _tensors([*args, *kwargs.values()]):
            self._add(self.kept, tensor)
        self.inside = {}

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """It ends: the rest is forgotten, and computed again when its turn comes."""
        self.largest = max(self.largest, sum((self.inside or {}).values()))
        self.inside = None

    def _add(self, where: dict[int, int], tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            where[storage._cdata] = storage.nbytes()


def kept_for_backward(network: nn.Module, run: Callable[[], Tensor], checkpointing: bool) -> int:
    """Bytes that autograd keeps of ``run``, a pass through ``network``: every saved storage once, weights left out.

    With ``checkpointing`` what it keeps at most: the inputs of all checkpointed blocks, what is saved outside of them,
    and what is saved within the largest of them.
    """
    tally = _Tally({tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())})
    blocks = list(checkpointed(network)) if checkpointing else []
    handles = [block.register_forward_pre_hook(tally.enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(tally.leave) for block in blocks]
    try:
        with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(tally.keep, lambda tensor: tensor):
            output = run()  # held until the sum is taken: a freed storage's identity can come again
        total = sum(tally.kept.values()) + tally.largest
        del output
        return total
    finally:
        for handle in handles:
            handle.remove()


def checkpointed(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks that diffusers computes again under gradient checkpointing: the entries of the module lists of modules
    that know the flag, down to the innermost.
    """
    for module in network.modules():
        if "gradient_checkpointing" in vars(module):
            lists = (child for child in module.children() if isinstance(child, nn.ModuleList))
            yield from (block for entries in lists for block in entries if not _knows_the_flag(block))


def _knows_the_flag(block: nn.Module) -> bool:
    return any("gradient_checkpointing" in vars(module) for module in block.modules())


@torch.no_grad()
def largest_layer(network: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the input and the output of the layer of ``network`` for which ``run`` has most of them."""
    found = [0]

    def measure(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(sum(tensor.nbytes for tensor in _tensors([*args, output])))

    handles = [layer.register_forward_hook(measure) for layer in network.modules() if not list(layer.children())]
    try:
        with FusedAttention():
            run()
        return max(found)
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: Sequence[object]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
