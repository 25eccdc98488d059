"""The memory of a GPU, counted on torch's meta device, whose tensors have shapes and no values."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

aten = torch.ops.aten
_BLOCK = 512  # bytes that the allocator of CUDA rounds to
_IN_PLACE: list[Any] = []  # the form of the result of an operation that changes its first input
_HALF = (torch.float16, torch.bfloat16)
_LOWERED = {  # what autocast runs in its dtype on CUDA
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
}
_RAISED = {  # what autocast runs in float32 on CUDA
    *(F.layer_norm, F.group_norm, F.rms_norm, F.softmax, torch.softmax, Tensor.softmax, torch.exp, Tensor.exp),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.sum, Tensor.sum, torch.cumsum),
}


class CountedMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has not typed it
    """A context that counts the storages that live on the meta device, each rounded as the allocator of CUDA rounds it.

    A value that is read from the device is True or 1, and finite; a tensor that is copied from it is ones.

    Attributes:
        live: Bytes of the storages that were made within the context and exist now.
        peak: The largest ``live`` since the last ``reset_peak``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._results: dict[Any, list[Any]] = {}  # by operation and form of its inputs

    def reset_peak(self) -> int:
        """Measure ``peak`` from here on, and return ``live``."""
        self.peak = self.live
        return self.live

    def raise_peak(self, size: int) -> None:
        """Count ``size`` bytes that were held for a moment."""
        self.peak = max(self.peak, self.live + size)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count neither these tensors nor their views."""
        for tensor in tensors:
            self._hold(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_meta:
            if func is aten._local_scalar_dense.default:
                return _truth(first) if first.dtype == torch.bool else 1.0 if first.is_floating_point() else 1
            if func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
                return _on_cpu(first, kwargs.get("dtype") or first.dtype)
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].fill_(1)
        if func is aten.nonzero.default and first is not None and first.is_meta:  # as many as can be
            result = first.new_empty(first.numel(), first.dim(), dtype=torch.long)
        else:
            result = self._run(func, args, kwargs)
        for tensor in _on_device((result,)):
            self._hold(tensor, tensor.untyped_storage().nbytes())
            if tensor.dtype == torch.bool:
                tensor.truth = _result(func, args)  # type: ignore[attr-defined]  # what is read of it, later
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, unless inputs of the same form have shown its result: new tensors, or its first input."""
        try:
            key = func, _form(args), _form(tuple(kwargs.items()))
            earlier = self._results.get(key)
        except TypeError:  # of a form without a hash
            return func(*args, **kwargs)
        if earlier is _IN_PLACE:
            return args[0]
        if earlier is not None:
            new = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in earlier]
            return new[0] if len(new) == 1 and len(func._schema.returns) == 1 else tuple(new)
        result = func(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        if isinstance(result, Tensor) and result.is_meta and args and result is args[0] and key[1] == _form(args):
            self._results[key] = _IN_PLACE  # on the CPU, as the number of an optimizer's steps is, values count
        if any(argument.alias_info for argument in func._schema.arguments):
            return result
        inputs = {tensor.untyped_storage()._cdata for tensor in _on_device((*args, *kwargs.values()))}
        if all(isinstance(r, Tensor) and r.is_meta and r.untyped_storage()._cdata not in inputs for r in results):
            self._results[key] = [(r.shape, r.stride(), r.dtype) for r in results]
        return result

    def _hold(self, tensor: Tensor, size: int) -> None:
        """Count ``size`` bytes until the storage of a tensor is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-size // _BLOCK) * _BLOCK
        if key in self._storages:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def free(_: object) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, free)


def _on_device(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                yield value
        elif isinstance(value, tuple | list):
            yield from _on_device(value)


def _form(value: Any) -> Any:
    """Return what the form of an operation's results depends on, as a key."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, tuple | list):
        return tuple(map(_form, value))
    return type(value), value


def _truth(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "truth", True))


def _result(operation: Any, inputs: Sequence[Any]) -> bool:
    """Return the truth value of a result, of which all elements are equal: numbers are finite, and compare as True."""
    truths = [_truth(value) for value in inputs if isinstance(value, Tensor)]
    if operation.overloadpacket in (aten.isnan, aten.isinf):
        return False
    if operation.overloadpacket in (aten.bitwise_not, aten.logical_not):
        return not truths[0]
    return all(truths)


def _on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == torch.bool:
        return torch.full(tensor.shape, _truth(tensor), dtype=dtype)
    return torch.ones((), dtype=dtype).expand(tensor.shape)  # takes no memory


class CudaKernels(TorchFunctionMode):
    """A context in which tensors without values take the memory that kernels of CUDA take.

    Attention is fused, and saves nothing that is quadratic. With ``autocast``, operations are cast as autocast of that
    dtype casts them. A backward pass runs outside of the context: see ``checkpoint``.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast

    def checkpoint(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block that is computed again in the backward pass, in this context both times."""
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), self))

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if self.autocast is not None:
            dtype = self.autocast if func in _LOWERED or func is F.scaled_dot_product_attention else None
            dtype = torch.float32 if func in _RAISED else dtype
            if dtype is not None:
                args, named = _cast(args, dtype), {name: _cast(value, dtype) for name, value in named.items()}
        if func is F.scaled_dot_product_attention and (args[0] if args else named["query"]).is_meta:
            return fused_attention(*args, **named)
        return func(*args, **named)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors on the device within ``value``."""
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, dtype) for part in value)
    if isinstance(value, Tensor) and value.is_meta and value.is_floating_point():
        return value.to(dtype)
    return value


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the output (B, heads, tokens, d) of attention by the kernel that torch takes on CUDA, without asking it.

    That is flash attention without a mask in half precision, else memory-efficient attention. The arguments are those
    of ``scaled_dot_product_attention``.
    """
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is None and query.dtype in _HALF:
        output: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, **options)[0]
        return output
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    output = aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, grad, dropout_p, **options)[0]
    return output
