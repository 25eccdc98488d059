"""The denoiser under ``torch.compile``, block by block, with the same graphs for sampling and for learning."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from genalign.runtime.blocks import blocks_of
from genalign.runtime.memory_options import Memory

_GRAPHS = 8  # of one block: batch sizes times guidance times the adapter on or off


def require_compiler(device: str, memory: Memory) -> None:
    """Raise ValueError where ``torch.compile`` cannot compile for ``device``, or not with the memory options."""
    kind, advice = torch.device(device).type, "or leave model.compile out"
    if "isolate_recompiles" not in signature(torch.compile).parameters:
        raise ValueError(f"model.compile needs a newer torch than {torch.__version__}: install 2.14, {advice}")
    if memory.quantization == "nf4":
        raise ValueError(f"model.compile does not go with quantization 'nf4': take 'int8' or 'fp8', {advice}")
    if kind == "cpu":
        from torch._inductor import cpp_builder, exc  # takes seconds

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError, OSError):
            raise ValueError(
                f"model.compile needs a C++ compiler on the CPU: install g++ (on Windows, the cl of Visual Studio),"
                f" {advice}"
            ) from None
    elif kind == "cuda":
        from torch.utils._triton import has_triton_package

        if not has_triton_package():
            raise ValueError(
                "model.compile needs triton on a CUDA device: install it (Linux: pip install triton; Windows: pip"
                f" install triton-windows), {advice}"
            )
    else:
        raise ValueError(f"model.compile works on the devices cpu and cuda, not on {device}: choose one, {advice}")


class CompiledBlocks:
    """The blocks of ``network``, compiled in place for fixed batch sizes.

    Blocks of equal shapes share their graphs. Gradients are on while sampling, too, since without them a block would
    have another graph, which rounds differently; its outputs are then detached, so no activations stay. Compile
    after the adapter is on, and the network is sharded.
    """

    def __init__(self, network: nn.Module) -> None:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of running without a graph from then on
        self._network: Any = network
        self._sizes: set[int] = set()
        self._detach = False
        compile_: Any = torch.compile  # whose overloads do not name the limit
        by_class = defaultdict[type[nn.Module], list[nn.Module]](list)
        for block in blocks_of(network):
            by_class[type(block)].append(block)
        for kind, blocks in by_class.items():
            shapes = {tuple((name, p.shape, p.dtype) for name, p in block.named_parameters()) for block in blocks}
            limit = _GRAPHS * len(shapes)  # blocks of equal shapes share graphs
            compiled = compile_(kind.forward, dynamic=False, recompile_limit=limit, isolate_recompiles=True)
            for block in blocks:
                block.forward = partial(self._run, compiled, block)

    def add_batch_sizes(self, sizes: Iterable[int]) -> None:
        """Pad smaller batches to the next of ``sizes`` from now on."""
        self._sizes |= {*sizes}

    def padded(self, rows: int) -> int:
        """Return the batch size to which a batch of ``rows`` is padded: the next that was given, or that ran."""
        size = min((size for size in self._sizes if size >= rows), default=rows)
        self._sizes.add(size)
        return size

    def _run(self, compiled: Callable[..., Any], block: nn.Module, *inputs: Any, **named: Any) -> Any:
        """Run a compiled block, and detach its outputs where gradients were off before.

        They become leaves that ask for a gradient, so the graph of the next block is the same.
        """
        outputs = compiled(block, *inputs, **named)
        if not self._detach:
            return outputs
        leaves: dict[int, Tensor] = {}  # an output that comes twice stays one tensor, as the graphs expect

        def detached(output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return output
            return leaves.setdefault(id(output), output.detach().requires_grad_())

        return tree_map(detached, outputs)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the network inside the context, with gradients on, and with activations held if they were on before.

        Raises ValueError if the calls differ so much that a block would need too many graphs.
        """
        from torch._dynamo.exc import FailOnRecompileLimitHit  # takes a second

        self._detach = not torch.is_grad_enabled()
        recomputes = getattr(self._network, "gradient_checkpointing", False)
        if self._detach and recomputes:
            self._network.gradient_checkpointing = False
        try:
            with torch.enable_grad():
                yield
        except FailOnRecompileLimitHit as error:
            raise ValueError(
                f"model.compile: a block has {_GRAPHS} graphs already, one for each batch size, with and without"
                " guidance: use fewer different batch sizes and guidances, or leave model.compile out"
            ) from error
        finally:
            self._detach = False
            if recomputes:
                self._network.gradient_checkpointing = True
