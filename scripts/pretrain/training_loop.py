"""A small resumable training loop, with which the scripts make the embedded checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import T5EncoderModel

from genalign.runtime.cpu import retain_freed_memory, use_faster_attention_backward
from genalign.runtime.files import load_state, save_state, with_prefix, without_prefix
from genalign.runtime.state import load_optimizer_tensors, optimizer_tensors


@dataclass(frozen=True)
class Fit:
    """The settings of a stage of pretraining.

    The ``steps`` are of a one-cycle schedule, or of several ``cycles`` of equal length. ``muon`` is the learning rate
    at which Muon trains the matrices of transformer blocks; None trains them like all others. ``t5`` is the learning
    rate of a T5 text encoder, whose attention logits are not divided by the square root of their width, so that the
    rate of the other weights saturates them; None trains it like all others.
    """

    steps: int
    learning_rate: float
    muon: float | None = None
    t5: float | None = None
    averaging: float = 0.999
    warm_up: float = 0.1
    cycles: int = 1
    save_every: int = 250
    minutes: float | None = None  # of wall-clock for one run, after which it stops and can be resumed

    def __post_init__(self) -> None:
        if self.steps % self.cycles:
            raise ValueError(f"steps must be a multiple of the {self.cycles} cycles, not {self.steps}")

    @property
    def length(self) -> int:
        """The number of steps of one cycle."""
        return self.steps // self.cycles


class OutOfTimeError(RuntimeError):
    """A fit has used up its ``minutes``; its state is saved, and the same call resumes it."""


def fit(
    model: nn.Module, loss: Callable[[int], Tensor], settings: Fit, state: Path, matrices: tuple[nn.Parameter, ...] = ()
) -> None:
    """Minimise ``loss(step)`` and leave the averaged weights in ``model``.

    ``loss`` draws its batch from ``step`` alone, so that a run resumed from ``state`` equals an uninterrupted one.

    Raises:
        OutOfTimeError: when ``settings.minutes`` are over before ``settings.steps``.
    """
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        retain_freed_memory()
        use_faster_attention_backward()
    deadline = monotonic() + 60 * settings.minutes if settings.minutes else float("inf")
    optimizers = _optimizers(model, settings, matrices)
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    start = _resume(state, model, average, optimizers)
    with _progress() as progress:
        bar = progress.add_task(state.stem, total=settings.steps, completed=start, loss=float("nan"))
        for step in range(start, settings.steps):
            value = loss(step)
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            factor = one_cycle(step, settings)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                optimizer.step()
                optimizer.zero_grad()
            _average(average, model, min(settings.averaging, (1 + step) / (10 + step)))
            late = monotonic() > deadline and step + 1 < settings.steps
            if late or (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                _save(state, step + 1, model, average, optimizers)
                progress.console.print(f"{state.stem}: {step + 1} steps, loss {float(value.detach()):.4f}")
            progress.update(bar, advance=1, loss=float(value.detach()))
            if late:
                raise OutOfTimeError(f"{state.stem}: {step + 1} of {settings.steps} steps; run this again to go on")
    model.load_state_dict(average)


def one_cycle(step: int, settings: Fit) -> float:
    """Linear warm-up, then a cosine to zero, as a factor of the peak rate; the same in every cycle."""
    peak = max(1, round(settings.warm_up * settings.length))
    step %= settings.length
    if step < peak:
        return (step + 1) / peak
    angle = torch.pi * (step - peak) / max(1, settings.length - peak)
    return 0.5 * (1 + float(torch.cos(torch.tensor(angle))))


def contrastive(rows: Tensor, columns: Tensor, captions: Tensor) -> Tensor:
    """The symmetric contrastive loss from logits (B, B) both ways round; samples of one caption (B,) are all right."""
    same = (captions[:, None] == captions[None]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2


def _optimizers(model: nn.Module, settings: Fit, matrices: tuple[nn.Parameter, ...]) -> list[torch.optim.Optimizer]:
    encoders = [module for module in model.modules() if isinstance(module, T5EncoderModel)] if settings.t5 else []
    slow = [parameter for encoder in encoders for parameter in encoder.parameters()]
    apart = {id(parameter) for parameter in [*slow, *(matrices if settings.muon else ())]}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    groups = [{"params": rest, "lr": settings.learning_rate}, *([{"params": slow, "lr": settings.t5}] if slow else [])]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)]
    if settings.muon and matrices:
        optimizers.append(torch.optim.Muon(list(matrices), lr=settings.muon, weight_decay=0.01))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, 1 - decay)
        else:
            average[name].copy_(tensor)


def _save(
    state: Path, step: int, model: nn.Module, average: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> None:
    tensors = with_prefix("model.", dict(model.state_dict())) | with_prefix("average.", average)
    for index, optimizer in enumerate(optimizers):
        tensors |= with_prefix(f"optimizer{index}.", optimizer_tensors(optimizer))
    save_state(state, tensors, {"step": step})


def _resume(
    state: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
) -> int:
    if not state.exists():
        return 0
    tensors, meta = load_state(state)
    model.load_state_dict(without_prefix("model.", tensors))
    for name, tensor in without_prefix("average.", tensors).items():
        average[name].copy_(tensor)
    for index, optimizer in enumerate(optimizers):
        load_optimizer_tensors(optimizer, without_prefix(f"optimizer{index}.", tensors))
    return int(meta["step"])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
