"""A CUDA device without one: shapes, dtypes and devices are those of a GPU, and waits, copies and memory are counted.

Under ``FakeCuda`` tensors on "cuda" have no values, and tensors on the CPU are real. Mixing the two raises as it would
on a GPU. Nothing is timed, and no kernel runs: an operation that a kernel would refuse for another reason passes.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode

from genalign.runtime.counted_memory import fused_attention

aten = torch.ops.aten
_ROOT = Path(__file__).parents[1]
_OWN = tuple(str(_ROOT / name) + "/" for name in ("genalign", "pipelines", "rewards"))
_SCALARS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.item.default)
_VALUE_SIZED = {  # operations whose result has a size that only the device knows: its dimensions at most
    aten.nonzero.default: lambda x, *_: ((x.numel(), x.dim()), torch.long),
    aten.masked_select.default: lambda x, *_: ((x.numel(),), x.dtype),
    aten._unique2.default: None,
    aten.unique_dim.default: None,
}
_DEVICE = torch.ops.prim.device.default
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_ONE_DTYPE = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.linear, aten.native_layer_norm)
_BLOCK = 512  # bytes that the allocator of CUDA rounds to
_LARGE = 1 << 14  # numbers of a tensor on the CPU whose values are not needed


@dataclass(frozen=True)
class Event:
    """A wait for the device, or a copy to it, of ``size`` bytes.

    ``file``, relative to the repository, ``line`` and ``text`` are the place in genalign, pipelines or rewards;
    ``functions`` are the names of their functions that were running, the innermost last. ``mark`` is the number of
    ``FakeCuda.mark`` calls before it.
    """

    kind: str
    size: int
    file: str
    line: int
    functions: tuple[str, ...]
    mark: int

    def __str__(self) -> str:
        name = self.functions[-1] if self.functions else "?"
        return f"{self.kind} at {self.file}:{self.line} in {name}"


class FakeCuda(TorchDispatchMode):
    """A context in which torch has a CUDA device of index 0 whose tensors have no values.

    It may be entered again, and its tensors belong to it. Build networks within ``with cuda, torch.device("cuda")``, so
    that they take no memory. A number that is read from the device is 1, all numbers are finite, and comparisons are
    True; a tensor copied from it holds numbers in [0, 1), or zeros if it is large. The context holds for its own
    thread: score without ``overlap_scoring``.

    Attributes:
        waits: Since the context was entered, the reads of values, blocking copies in both directions, and operations
            whose result's size depends on values, each of which lets the CPU wait until the device has finished.
        copies: The copies to the device since then, blocking or not.
        live: Bytes of the storages on the device that exist now.
        peak: The largest ``live`` since the last ``reset_peak``.
    """

    _results: ClassVar[dict[Any, _Result]] = {}  # by operation and layouts, for all contexts

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that torch asks no driver for a tensor on "cuda"
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[Event] = []
        self.copies: list[Event] = []
        self._marks = 0
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._random = torch.Generator().manual_seed(0)
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> FakeCuda:
        self.waits, self.copies, self._marks = [], [], 0
        torch._C._ensureCUDADeviceGuardSet()  # for good, without an effect on tensors of the CPU
        for target, name, value in self._replacements():
            self._patches.enter_context(mock.patch.object(target, name, value))
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is then a copy from the CPU
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        self._patches.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        self._patches.enter_context(torch.autograd.graph.saved_tensors_hooks(_Saved, _Saved.take))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the check of each call costs as much as a call

    def mark(self) -> None:
        """Raise the number that later events have as their ``mark``."""
        self._marks += 1

    def reset_peak(self) -> None:
        """Measure ``peak`` from here on."""
        self.peak = self.live

    def _replacements(self) -> list[tuple[Any, str, Any]]:
        """Return what stands in for functions that ask the driver, each with its owner and its name."""
        state = torch.zeros(16, dtype=torch.uint8)  # of the generator of the device
        cuda: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "is_bf16_supported": lambda including_emulation=True: True,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "a CUDA device without one",
            "synchronize": lambda device=None: self._wait("synchronize", 0),
            "empty_cache": lambda: None,
            "memory_allocated": lambda device=None: self.live,
            "max_memory_allocated": lambda device=None: self.peak,
            "reset_peak_memory_stats": lambda device=None: self.reset_peak(),
            "get_rng_state": lambda device="cuda": state.clone(),
            "set_rng_state": lambda new_state, device="cuda": None,
        }
        return [
            *((torch.cuda, name, value) for name, value in cuda.items()),
            (torch.autograd, "_engine_run_backward", _run_backward),
            (FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
            (FakeTensorMode, "avoid_device_init", True),
            (F, "scaled_dot_product_attention", _attention_by(F.scaled_dot_product_attention)),
            (nn.Module, "_apply", _apply),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        fakes = _on_device((*args, *kwargs.values()))
        device = kwargs.get("device")
        onto_cuda = device is not None and torch.device(device).type == "cuda"
        if not fakes and not onto_cuda:
            return self._on_cpu(func, args, kwargs)
        if func in _SCALARS:
            return self._scalar(args[0])
        if func is aten.equal.default:
            self._wait("equal", 0)
            return True
        if fakes and device is not None and torch.device(device).type == "cpu":
            return self._to_cpu(args[0], kwargs.get("dtype"))
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].copy_(self._to_cpu(args[1], args[0].dtype, blocks=not _is_non_blocking(args, kwargs)))
        return self._tracked(func, types, args, kwargs, fakes)

    def _on_cpu(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            return args[0].clone() if args[0].numel() <= _LARGE else args[0].view_as(args[0])
        return func(*args, **kwargs)

    def _tracked(self, func: Any, types: Any, args: Any, kwargs: Any, fakes: Sequence[Tensor]) -> Any:
        """Run an operation on the device without values, and count its waits, its copies and its memory."""
        if func.overloadpacket in _ONE_DTYPE:
            _require_one_dtype(str(func.overloadpacket), args)
        self._count_transfers(func, args, kwargs, fakes)
        if func in _INDEXING:
            args = args[0], [self._index(index) for index in args[1]], *args[2:]
        if func in _VALUE_SIZED:
            self._wait(func.overloadpacket.__name__, 0)
            size_of = _VALUE_SIZED[func]
            if size_of is None:
                raise NotImplementedError(f"{func} on the device: its result has no shape without values")
            shape, dtype = size_of(*args)
            func, args, kwargs = aten.empty.memory_format, (shape,), {"dtype": dtype, "device": "cuda"}
        result = self._result(func, types, args, kwargs)
        for tensor in _on_device(result if isinstance(result, tuple | list) else (result,)):
            self._hold(tensor)
            if tensor.dtype == torch.bool or (func is aten._to_copy.default and hasattr(args[0], "is_true")):
                tensor.is_true = _is_true(func.overloadpacket, args)
        return result

    def _result(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation: computed, or like that of the same operation on tensors like these."""
        key = _described((func, torch.get_default_dtype(), *args, *kwargs.items()))
        earlier = self._results.get(key)
        if earlier is not None:
            return earlier.again(self.fake, args)
        result = self.fake.dispatch(func, types, tuple(map(_without_graph, args)), kwargs)
        if (now := _Result.of(result, args, self._storages)) and _described(args) == key[2 : 2 + len(args)]:
            self._results[key] = now
        return result

    def _count_transfers(self, func: Any, args: Any, kwargs: Any, fakes: Sequence[Tensor]) -> None:
        """Count a copy from the CPU to the device, and the wait for it if it blocks."""
        source = None
        if func is aten._to_copy.default and not fakes:
            source, blocks = args[0], not kwargs.get("non_blocking", False)
        elif func is aten.copy_.default and not isinstance(args[1], FakeTensor):
            source, blocks = args[1], not _is_non_blocking(args, kwargs)
        if source is not None and isinstance(source, Tensor):
            self.copies.append(self._event("copy to the device", source.nbytes))
            if blocks:
                self._wait("blocking copy to the device", source.nbytes)

    def _index(self, index: Tensor | None) -> Tensor | None:
        """Count an index that is on the CPU, or that selects by truth values, and return it by place."""
        if index is None:
            return None
        by_truth = index.dtype in (torch.bool, torch.uint8)
        if not isinstance(index, FakeTensor):
            self.copies.append(self._event("copy of an index to the device", index.nbytes))
            self._wait("index on the CPU", index.nbytes)
            return index  # torch.nonzero of truth values is taken on the device, after the same wait
        if by_truth:
            self._wait("index of truth values", 0)
            if index.ndim != 1:
                raise NotImplementedError("an index of truth values of several dimensions on the device")
            with self.fake:
                return torch.empty(len(index), dtype=torch.long, device="cuda")
        return index

    def _scalar(self, tensor: Tensor) -> bool | int | float:
        self._wait("read of a number", tensor.element_size())
        if tensor.dtype == torch.bool:
            return tensor.is_true
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _to_cpu(self, tensor: Tensor, dtype: torch.dtype | None, blocks: bool = True) -> Tensor:
        if blocks:
            self._wait("copy to the CPU", tensor.nbytes)
        dtype = dtype or tensor.dtype
        if hasattr(tensor, "is_true"):
            return torch.full(tensor.shape, tensor.is_true, dtype=dtype)
        if tensor.numel() > _LARGE:
            return _zeros_without_memory(tensor.shape, dtype)
        if dtype.is_floating_point:
            return torch.rand(tensor.shape, generator=self._random).to(dtype)
        return torch.zeros(tensor.shape, dtype=dtype)

    def _hold(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        if key in self._storages:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def free(_: object) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, free)

    def _wait(self, kind: str, size: int) -> None:
        self.waits.append(self._event(kind, size))

    def _event(self, kind: str, size: int) -> Event:
        frames = list(_own_frames(sys._getframe(1)))
        names = tuple(frame.f_code.co_name for frame in reversed(frames))
        if not frames:
            return Event(kind, size, "?", 0, names, self._marks)
        file = str(Path(frames[0].f_code.co_filename).relative_to(_ROOT))
        return Event(kind, size, file, frames[0].f_lineno, names, self._marks)


@dataclass(frozen=True)
class _Part:
    """A tensor of a result: the argument of index ``same``, or a view of the argument ``view``, or a new tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    same: int | None
    view: int | None

    def again(self, mode: FakeTensorMode, args: Sequence[Any]) -> Tensor:
        """Return the tensor for other arguments of the same layouts."""
        if self.same is not None:
            argument: Tensor = args[self.same]
            return argument
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if self.view is not None:
            with in_kernel_invocation_manager(mode):
                tensor.set_(args[self.view].untyped_storage(), self.offset, self.shape, self.stride)
        return FakeTensor(mode, tensor, self.device)


@dataclass(frozen=True)
class _Result:
    """What an operation returns: a tensor, or several of ``kind`` tuple or list, some of which may be None."""

    kind: type[tuple[Any, ...]] | type[list[Any]] | None
    parts: tuple[_Part | None, ...]

    @classmethod
    def of(cls, result: Any, args: Sequence[Any], storages: Container[int]) -> _Result | None:
        """Describe a result; None where it cannot be made again from its description."""
        kind = type(result) if type(result) in (tuple, list) else None
        parts = []
        for tensor in result if kind else (result,):
            if tensor is not None:
                if not isinstance(tensor, FakeTensor) or tensor.is_complex():  # conjugation is no part of a description
                    return None
                storage = tensor.untyped_storage()._cdata
                sources = [i for i, x in enumerate(args) if isinstance(x, FakeTensor)]
                views = [i for i in sources if args[i].untyped_storage()._cdata == storage]
                if storage in storages and not views:
                    return None
                same = next((i for i in sources if args[i] is tensor), None)
                layout = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
                tensor = _Part(*layout, tensor.dtype, tensor.fake_device, same, views[0] if views else None)
            parts.append(tensor)
        return cls(kind, tuple(parts))

    def again(self, mode: FakeTensorMode, args: Sequence[Any]) -> Any:
        """Return the result for other arguments of the same layouts."""
        tensors = [part and part.again(mode, args) for part in self.parts]
        return self.kind(tensors) if self.kind else tensors[0]


def _zeros_without_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU whose pages take memory only once they are written to."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def _without_graph(value: Any) -> Any:
    """Detach a tensor on the CPU, whose gradient would be asked for."""
    return value.detach() if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value


def _described(value: Any) -> Any:
    """Return what a result depends on: of a tensor its layout, and of a number its type and value."""
    if isinstance(value, Tensor):
        on_device = isinstance(value, FakeTensor)
        return value.shape, value.stride(), value.storage_offset(), value.dtype, on_device
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    return type(value), value


def _on_device(values: Sequence[Any]) -> list[FakeTensor]:
    """Return the tensors on the device among the values and within the lists among them."""
    found = []
    for value in values:
        if isinstance(value, FakeTensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _on_device(value)
    return found


def _is_non_blocking(args: Any, kwargs: Any) -> bool:
    """Whether ``copy_`` was called so that the CPU goes on beside it."""
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


def _is_true(operation: Any, inputs: Sequence[Any]) -> bool:
    """Return the truth value of a result, of which all elements are equal: every number is finite and compares so."""
    truths = [getattr(value, "is_true", True) for value in inputs if isinstance(value, Tensor)]
    if operation in (aten.isnan, aten.isinf):
        return False
    if operation in (aten.bitwise_not, aten.logical_not):
        return not truths[0]
    return all(truths)


def by_place(events: Sequence[Event]) -> Counter[str]:
    """Count events by what and where they are."""
    return Counter(map(str, events))


def _own_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of genalign, pipelines and rewards, the innermost first."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_OWN):
            yield frame
        frame = frame.f_back


def _attention_by(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Stand in for attention, which asks the driver for its kernel."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not isinstance(query, FakeTensor):
            return plain(query, key, value, *arguments, **options)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        _require_one_dtype("attention", [query, key, value])
        return fused_attention(query, key, value, *arguments, **options)

    return attention


def _require_one_dtype(name: str, tensors: Sequence[Any]) -> None:
    """Raise the error of a kernel that takes one dtype alone, where tensors without values would pass."""
    dtypes = {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}
    if len(dtypes) > 1:
        raise RuntimeError(f"{name} got tensors of several dtypes: {', '.join(sorted(map(str, dtypes)))}")


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert the tensors of a module as its own method does, which cannot set ``data`` across devices here."""
    for child in module.children():
        _apply(child, convert)
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        with torch.no_grad():
            converted = convert(parameter)
        if isinstance(parameter, FakeTensor) == isinstance(converted, FakeTensor):
            parameter.data = converted
        else:
            _swap(parameter, nn.Parameter(converted, parameter.requires_grad))
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def _swap(first: Any, second: Any) -> None:
    """Exchange two tensors as ``torch.utils.swap_tensors`` does, which refuses those that the mode remembers."""
    first.__class__, second.__class__ = second.__class__, first.__class__
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__
    torch._C._swap_tensor_impl(first, second)


class _Saved:
    """A tensor that autograd saves for the backward pass, which frees it as the engine of torch does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        if self.tensor is None:
            raise RuntimeError("Trying to backward through the graph a second time")
        tensor = self.tensor
        if isinstance(tensor, FakeTensor) and not _Backward.retains:
            self.tensor = None
        return tensor


def _run_backward(roots: Sequence[Tensor], gradients: Sequence[Tensor | None], *options: Any, **named: Any) -> Any:
    """Stand in for the engine of autograd, which asks the driver where a tensor of the graph is on the device."""
    return _Backward(*options, **named).run(roots, gradients)


class _Backward:
    """A backward pass that calls the nodes of the graph one by one, in the reverse order of the forward pass."""

    retains = False  # whether saved tensors outlive the pass
    _passes = 0

    def __init__(
        self,
        retain_graph: bool,
        create_graph: bool,
        inputs: Sequence[Tensor],
        allow_unreachable: bool = False,
        accumulate_grad: bool = False,
    ) -> None:
        self.keep, self.create_graph, self.allow_unused = retain_graph, create_graph, allow_unreachable
        edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in inputs]
        self.wanted = [(edge.node, edge.output_nr) for edge in edges]
        self.inputs, self.accumulates = inputs, accumulate_grad
        self.gradients: dict[Any, list[Tensor | None]] = {}  # by node, one for each of its outputs
        self.results: dict[tuple[Any, int], Tensor] = {}

    def run(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Propagate the gradients of ``roots``; return those of the inputs, if they are not accumulated."""
        edges = [torch.autograd.graph.get_gradient_edge(root) for root in roots]
        pending = self._dependencies([edge.node for edge in edges])
        for edge, root, gradient in zip(edges, roots, gradients, strict=True):
            self._add(edge.node, edge.output_nr, torch.ones_like(root) if gradient is None else gradient)
        ready = [node for node in {edge.node: None for edge in edges} if not pending[node]]
        type(self)._passes += 1
        number = self._passes
        with (
            torch.set_grad_enabled(self.create_graph),
            mock.patch.object(torch._C, "_current_graph_task_id", lambda: number),
            mock.patch.object(_Backward, "retains", self.keep),
        ):
            while ready:
                ready.sort(key=lambda node: node._sequence_nr())
                node = ready.pop()
                for following, place, gradient in self._call(node):
                    self._add(following, place, gradient)
                    pending[following] -= 1
                    if not pending[following]:
                        ready.append(following)
        return self._finish()

    def _dependencies(self, roots: Sequence[Any]) -> Counter[Any]:
        """Count the edges that lead to each node."""
        pending: Counter[Any] = Counter()
        seen, stack = set(roots), list(seen_once(roots))
        while stack:
            for following, _ in stack.pop().next_functions:
                if following is not None:
                    pending[following] += 1
                    if following not in seen:
                        seen.add(following)
                        stack.append(following)
        return pending

    def _call(self, node: Any) -> Iterator[tuple[Any, int, Tensor | None]]:
        """Run a node; yield the gradients of its inputs with the nodes they go to."""
        gradients = self.gradients.pop(node, [None] * len(node._input_metadata))
        for place, gradient in enumerate(gradients):
            if (node, place) in self.wanted and gradient is not None:
                self.results[node, place] = gradient
        leaf = hasattr(node, "variable")
        skipped = leaf and (not self.accumulates or (self.inputs and (node, 0) not in self.wanted))
        if skipped or all(gradient is None for gradient in gradients):
            outputs: Any = [None] * len(node.next_functions)
        else:
            outputs = (
                node.apply(*gradients)
                if isinstance(node, torch.autograd.function.BackwardCFunction)
                else node(*gradients)
            )
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        for (following, place), gradient in zip(node.next_functions, outputs, strict=False):
            if following is not None:
                yield following, place, gradient

    def _add(self, node: Any, place: int, gradient: Tensor | None) -> None:
        """Add a gradient to that of a node's output, in the shape and dtype of the output."""
        sums = self.gradients.setdefault(node, [None] * len(node._input_metadata))
        if gradient is None:
            return
        output = node._input_metadata[place]
        if gradient.device != output.device:
            raise RuntimeError(f"a gradient is on {gradient.device}, its tensor on {output.device} ({node.name()})")
        if tuple(gradient.shape) != tuple(output.shape):
            gradient = gradient.sum_to_size(tuple(output.shape))
        gradient = gradient.to(output.dtype)
        previous = sums[place]
        sums[place] = gradient if previous is None else previous + gradient

    def _finish(self) -> tuple[Tensor | None, ...]:
        results = tuple(self.results.get(edge) for edge in self.wanted)
        if not self.accumulates:
            if not self.allow_unused and any(result is None for result in results):
                raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph")
            return results
        return ()


def seen_once(nodes: Sequence[Any]) -> list[Any]:
    """The nodes without repetitions, in their order."""
    return list(dict.fromkeys(nodes))
