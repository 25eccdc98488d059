"""A run of an unmodified diffusers pipeline in two parts: many samples begin, those that are chosen go on.

The pipeline is told of a part of its timesteps only and runs through it as always: nothing is broken off, and any
family works whose pipeline steps a scheduler. N samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from pipelines.steering.scheduler_hooks import Move, chosen, patched_step, remembered, replaced

_BY_NUMBER = ("skip_guidance_layers", "control_guidance_start", "control_guidance_end")
_ROUNDINGS = 8


@dataclass(frozen=True)
class FirstPart:
    """N samples after ``done`` evaluations of the network.

    ``latents`` (N, ...) are where they are, in the scheduler's scale, and ``x0`` (N, ...) the clean latents expected at
    the last evaluation; ``memory`` is the scheduler's state by attribute, with what it remembers of earlier steps.
    """

    done: int
    latents: Tensor
    x0: Tensor
    memory: dict[str, Any]

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, rows: Tensor) -> FirstPart:
        """The samples of ``rows`` (M,), long, in this order."""
        picked = rows.to(self.latents.device)
        return replace(self, latents=self.latents[picked], x0=self.x0[picked], memory=chosen(self.memory, rows))


def first_part(pipe: DiffusionPipeline, steps: int, **call: Any) -> FirstPart:
    """Run ``pipe(**call)`` for the first ``steps`` evaluations of the network at each sample (twice that many with
    guidance) and no further; the output type is always "latent".

    Raises ValueError unless 1 <= steps < all, and for a call whose guidance depends on the number of the step.
    """
    _check(call)
    return _until(pipe, steps, functools.partial(_beginning, steps), call)


def next_part(pipe: DiffusionPipeline, part: FirstPart, steps: int, **call: Any) -> FirstPart:
    """Go on with the N samples of ``part`` until ``steps`` evaluations in all are done; else as ``second_part``."""
    _check(call)
    if not part.done < steps:
        raise ValueError(f"{part.done} evaluations are done: steps must be more, not {steps}")

    def middle(timesteps: Tensor) -> slice:
        return slice(_resumed(pipe.scheduler, part, timesteps).start, _beginning(steps, timesteps).stop)

    with _started(pipe.scheduler, part) as latents:
        return _until(pipe, steps, middle, {**call, "latents": latents})


def second_part(pipe: DiffusionPipeline, part: FirstPart, **call: Any) -> Any:
    """The output of ``pipe(**call)`` for the evaluations that are left to the N samples of ``part``.

    ``call`` is that of the first part, with the prompts (or embeddings) and the generators of those N samples, in their
    order. Equals the unbroken run to rounding where noise comes from one generator for each sample: pass on those that
    the first part has used. Callbacks count the steps from 0 again. Raises ValueError for a call with another schedule,
    and for a pipeline that does not start from the latents that it is given.
    """
    _check(call)
    with (
        _started(pipe.scheduler, part) as latents,
        _told(pipe.scheduler, functools.partial(_resumed, pipe.scheduler, part)),
    ):
        return pipe(**call, latents=latents)


def _until(pipe: DiffusionPipeline, steps: int, choose: Callable[[Tensor], slice], call: dict[str, Any]) -> FirstPart:
    last: list[Move] = []

    def note(move: Move) -> None:
        last[:] = [move]

    with _told(pipe.scheduler, choose), patched_step(pipe.scheduler, note):
        pipe(**{**call, "output_type": "latent"})
    (move,) = last
    if move.index + 1 != steps:
        raise ValueError(f"the pipeline ended after {move.index + 1} steps, not {steps}: it shortens its schedule")
    return FirstPart(steps, move.x_next, move.x0, remembered(pipe.scheduler))


def _beginning(steps: int, timesteps: Tensor) -> slice:
    if not 1 <= steps < len(timesteps):
        raise ValueError(f"this call evaluates the network {len(timesteps)} times: steps cannot be {steps}")
    return slice(0, steps)


def _resumed(scheduler: SchedulerMixin, part: FirstPart, timesteps: Tensor) -> slice:
    """Where ``part`` goes on, with what the scheduler remembered put back."""
    if not torch.equal(timesteps, part.memory["timesteps"]):
        raise ValueError(
            "this call has another schedule than the first part: give it the same number of steps and size"
        )
    vars(scheduler).update(_copied(part))
    return slice(part.done, None)


@contextmanager
def _started(scheduler: SchedulerMixin, part: FirstPart) -> Iterator[Tensor]:
    """The latents to call the pipeline with, whose first step is then checked to start from them."""

    def check_start(move: Move) -> None:
        if move.index == part.done:
            _require_start(part.latents, move.x)

    vars(scheduler).update(_copied(part))
    scale = getattr(scheduler, "init_noise_sigma", 1.0)  # flow schedulers have none, and no pipeline multiplies by it
    with patched_step(scheduler, check_start):
        yield part.latents / scale


@contextmanager
def _told(scheduler: SchedulerMixin, choose: Callable[[Tensor], slice]) -> Iterator[None]:
    """While it is open, the pipeline sees only the part of its timesteps that ``choose`` picks once they are set. The
    scheduler has all of them again when it steps: solvers ask how many are left.
    """
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    timesteps = scheduler.timesteps

    @functools.wraps(set_timesteps)
    def set_part(*args: Any, **kwargs: Any) -> None:
        nonlocal timesteps
        set_timesteps(*args, **kwargs)
        timesteps = scheduler.timesteps
        part = choose(timesteps)
        scheduler.timesteps = timesteps[part]

    @functools.wraps(step)
    def step_of_all(*args: Any, **kwargs: Any) -> Any:
        scheduler.timesteps = timesteps
        return step(*args, **kwargs)

    with replaced(scheduler, "set_timesteps", set_part), replaced(scheduler, "step", step_of_all):
        yield


def _copied(part: FirstPart) -> dict[str, Any]:
    """The scheduler's state in tensors of its own, some of which it would add to in place."""
    return chosen(part.memory, torch.arange(len(part)))


def _check(call: dict[str, Any]) -> None:
    if given := [name for name in _BY_NUMBER if call.get(name) is not None]:
        raise ValueError(f"{', '.join(given)} depends on the number of the step, which a part of a run does not know")


def _require_start(given: Tensor, taken: Tensor) -> None:
    same = given.shape == taken.shape
    rounding = _ROUNDINGS * torch.finfo(given.dtype).eps
    if not same or bool((given - taken).abs().max() > rounding * given.abs().max()):
        raise ValueError("the pipeline changes the latents that it is given: it cannot be run in two parts")
