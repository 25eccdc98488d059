"""A process that runs one round of the demo again and again, by the genalign, pipelines and rewards on its path.

It answers each line of standard input by a line of JSON: ``seconds`` of the round, its ``flops``, its ``profile``, or
the name of its ``recipe``.
It imports nothing else of this repository, so that it also runs the code of an older commit.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from genalign.cli import parsing
from genalign.cli.context import named_rewards, prompt_set
from genalign.cli.main import load_model
from genalign.diffusion.policy import Policy
from genalign.runtime.state import State
from genalign.training.trainer import Trainer

try:
    from genalign.cli.train_settings import Train
except ImportError:  # before commit 2aa7322
    from genalign.cli.config import Train  # type: ignore[import-not-found]

_COPIES = ("copy", "clone", "contiguous", "cat", "stack", "index", "gather", "fill_", "zero_", "constant_pad")
_VIEWS = (
    *("view", "as_strided", "transpose", "permute", "expand", "reshape", "select", "slice", "squeeze", "detach"),
    *("empty", "alias", "chunk", "split", "unbind", "narrow", "unflatten", "flatten", "resolve", "lift", "item"),
    *("is_nonzero", "random", "normal", "randperm", "randint", "scalar", "result_type"),
)
_CPU_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
GROUPS = (
    "attention",
    "batched products",
    "matrix products",
    "gelu",
    "copies",
    "norms",
    "elementwise",
    "everything else",
)


def group_of(name: str) -> str:
    """Return the group of an operation by its name in the profiler; views, Python and autograd are everything else."""
    space, _, operation = name.partition("::")
    if "attention" in operation or "softmax" in operation:
        return "attention"
    if space not in ("aten", "mkldnn", "onednn"):
        return "everything else"
    if "gelu" in operation:
        return "gelu"
    if "norm" in operation and "normal" not in operation:
        return "norms"
    if operation in ("bmm", "baddbmm"):
        return "batched products"
    if operation in ("mm", "addmm") or "linear_pointwise" in operation or "convolution" in operation:
        return "matrix products"
    if any(part in operation for part in _COPIES):
        return "copies"
    if operation in ("t", "to", "linear", "numpy_T", "conv2d", "conv1d") or any(part in operation for part in _VIEWS):
        return "everything else"
    return "elementwise"


class RoundCounter(FlopCounterMode):
    """A count of FLOPs that knows attention's: ``attention`` is a part of ``get_total_flops()``.

    Torch leaves out the CPU's kernel of attention, which counts here as the GPU's. Batched products are attention's
    unless the second operand is one matrix for all, as in a linear layer of a tensor that is not contiguous.
    """

    def __init__(self) -> None:
        self.attention = 0
        aten: Any = torch.ops.aten
        fused, backward = (getattr(aten, f"{_CPU_KERNEL}{suffix}") for suffix in ("", "_backward"))
        raw = {
            fused: lambda query, key, value: sdpa_flop_count(query.shape, key.shape, value.shape),
            backward: lambda *shapes: sdpa_backward_flop_count(*(tensor.shape for tensor in shapes[:4])),
            aten.bmm: _product,
            aten.baddbmm: lambda _, left, right: _product(left, right),
        }
        operands = {fused: 3, backward: 4, aten.bmm: 2, aten.baddbmm: 3}
        mapping = {operation: self._counted(count, operands[operation]) for operation, count in raw.items()}
        super().__init__(display=False, custom_mapping=mapping)

    def _counted(self, count: Callable[..., int], operands: int) -> Callable[..., int]:
        """Return what torch calls with an operation's arguments: the count of its first ``operands``."""

        def flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
            counted = count(*arguments[:operands])
            if arguments[operands - 1].stride(0):
                self.attention += counted
            return counted

        flops._get_raw = True  # type: ignore[attr-defined]  # torch's mark of functions that take tensors, not shapes
        return flops


def _product(left: Tensor, right: Tensor) -> int:
    return 2 * math.prod(left.shape) * right.shape[-1]


class RepeatedRound:
    """The second round of a trainer, which every measurement runs again from the state after the first one."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        next(trainer.rounds())
        self.state = _copied(trainer.state())

    def seconds(self) -> float:
        """Run the round; return its seconds."""
        self.trainer.restore(_copied(self.state))
        began = time.perf_counter()
        next(self.trainer.rounds())
        return time.perf_counter() - began

    def flops(self) -> dict[str, int]:
        """Count the round's FLOPs: of all, and of attention's products among them."""
        with self._in_one_thread(), RoundCounter() as counter:
            self.seconds()
        return {"all": counter.get_total_flops(), "attention": counter.attention}

    def profile(self) -> dict[str, float]:
        """Measure the share of the round's time that each group of operations takes."""
        with self._in_one_thread(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            whole = self.seconds()
        shares = dict.fromkeys(GROUPS, 0.0)
        for event in profiler.key_averages():
            shares[group_of(event.key)] += event.self_cpu_time_total / 1e6 / whole
        shares["everything else"] = 1 - sum(share for name, share in shares.items() if name != "everything else")
        return shares

    @contextmanager
    def _in_one_thread(self) -> Iterator[None]:
        """Score in the thread of sampling, within the context: torch observes one thread alone."""
        sampler = self.trainer.sampler
        self.trainer.sampler = replace(sampler, settings=replace(sampler.settings, overlap_scoring=False))
        try:
            yield
        finally:
            self.trainer.sampler = sampler


def _copied(state: State) -> State:
    """Copy a state, of which training changes tensors in place."""
    return State(
        {name: tensor.detach().clone() for name, tensor in state.tensors.items()}, copy.deepcopy(state.numbers)
    )


def demo_trainer(settings: Train) -> Trainer:
    """Build the trainer of ``genalign demo``, which has these settings."""
    pipeline: Any = load_model(settings.model)
    policy = Policy(pipeline.denoiser, settings.lora, settings.ema_decay, settings.training.seed)
    rewards, prompts = named_rewards(settings.rewards), prompt_set(settings.prompts)
    return Trainer(pipeline, policy, rewards, prompts, settings.recipe, settings.training, settings.sampling)


def main() -> None:
    """Answer lines of standard input until it ends."""
    settings, plain = parsing.parse(Train, ["--config", str(files("genalign.assets") / "demo.yaml")], "train")
    repeated = RepeatedRound(demo_trainer(settings))
    answers: dict[str, Callable[[], object]] = {
        "seconds": repeated.seconds,
        "flops": repeated.flops,
        "profile": repeated.profile,
        "recipe": lambda: plain["recipe"]["class_path"].rpartition(".")[2],
    }
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
