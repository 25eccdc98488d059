"""Hooks into unmodified diffusers pipelines: every step of the scheduler is seen and, where wanted, replaced.

A hook shadows a method on the scheduler's instance, so that the pipeline that owns it needs no change. B samples, T
timesteps, which are as many as the network's evaluations of one sample (without guidance).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from genalign.diffusion.paths import EDMPath, FlowPath, GaussianPath, VPPath, expand, promote
from genalign.diffusion.transitions import Kernel, transition
from genalign.types import Grid

_DISCRETE = (DDIMScheduler, DDPMScheduler, PNDMScheduler)
_SCALED_BY_SIGMA = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
_SOLVERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, SASolverScheduler)
_EDM = (EDMEulerScheduler, EDMDPMSolverMultistepScheduler, CosineDPMSolverMultistepScheduler)
_KNOWN = (FlowMatchEulerDiscreteScheduler, *_DISCRETE, *_SCALED_BY_SIGMA, *_SOLVERS, *_EDM)

_BROWNIAN = (CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler)
_STOCHASTIC = (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
)


@dataclass(frozen=True)
class Move:
    """One step of a scheduler, at ``scheduler.timesteps[index]``.

    ``x`` (B, ...) are the latents before it and ``x_next`` those after it, both in the scheduler's own scale;
    ``prediction`` is the network's output at x, guidance included, and ``x0`` the clean latents that it implies, in
    float32 or x's float64.
    """

    index: int
    timestep: Tensor
    x: Tensor
    prediction: Tensor
    x0: Tensor
    x_next: Tensor


@contextmanager
def patched_step(scheduler: SchedulerMixin, on_step: Callable[[Move], Tensor | None]) -> Iterator[None]:
    """While it is open, every step of ``scheduler`` is shown to ``on_step``; a tensor that it returns takes the place
    of the next latents, in their dtype.

    Where ``on_step`` returns None, the pipeline's samples are those of an unpatched run, bit for bit. Patches nest: the
    inner one sees what the outer one made of a step. Raises ValueError for a replacement of another shape, for a
    pipeline that copies its scheduler, and, at the end, where no step was made.
    """
    step = scheduler.step
    signature = inspect.signature(step)
    steps = 0

    @functools.wraps(step)  # keeps the signature, in which pipelines look for eta and generator
    def seen(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        call = signature.bind(*args, **kwargs)
        as_tuple = not call.arguments.get("return_dict", True)
        call.arguments["return_dict"] = True
        output = step(*call.args, **call.kwargs)
        move = _move(scheduler, call.arguments, output)
        replacement = on_step(move)
        if replacement is not None:
            output.prev_sample = _fitting(replacement, move.x_next)
        return output.to_tuple() if as_tuple else output

    with replaced(scheduler, "step", seen), replaced(scheduler, "__deepcopy__", _refuse_copy):
        yield
    if not steps:
        raise ValueError(
            f"no step was made by the {type(scheduler).__name__} that is hooked: hook the scheduler that the pipeline"
            " has when it is called"
        )


@contextmanager
def replaced(instance: object, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """``method`` in the place of a method of one instance, until the end or an exception."""
    own = name in vars(instance)
    before = vars(instance).get(name)
    setattr(instance, name, method)
    try:
        yield
    finally:
        if own:
            setattr(instance, name, before)
        else:
            delattr(instance, name)


def grid_of(scheduler: SchedulerMixin) -> Grid:
    """The noise levels of the steps on the path of the network: what kernels and rewards are given.

    The next level is that of the next timestep. (A DDIMScheduler whose timesteps are unequal distances apart itself
    moves to other levels than it tells the network.) Raises ValueError for a scheduler whose levels are not known here.
    """
    return _levels(scheduler).grid


def kernel_move(scheduler: SchedulerMixin, kernel: Kernel, move: Move, noise: Tensor) -> Tensor:
    """The next latents (B, ...) by ``kernel`` in place of the scheduler's rule, from the same prediction and to the
    level of the next timestep, with standard normal ``noise`` (B, ...); in the scheduler's scale and x_next's dtype.

    The second of two evaluations at one level, as PNDM makes them, moves nothing. Raises ValueError for a scheduler
    that clips its predictions, or whose levels are not known here.
    """
    if any(scheduler.config.get(option, False) for option in ("clip_sample", "thresholding")):
        raise ValueError(
            f"this {type(scheduler).__name__} clips its predictions, which kernels do not: make it with"
            " clip_sample=False and thresholding=False"
        )
    levels = _levels(scheduler)
    step = levels.grid[move.index]
    if bool(step.sigma == step.sigma_next):
        return move.x
    moved = transition(levels.path, kernel, levels.on_path(move.x, move.index), move.prediction, step).sample(noise)
    return (moved * expand(levels.scale[move.index + 1], moved)).to(move.x_next.dtype)


def gather_history(scheduler: SchedulerMixin, rows: Tensor) -> None:
    """Sample i of what ``scheduler`` remembers of earlier steps becomes that of ``rows[i]`` (long, (M,)).

    To be called with every permutation or choice of the latents; a scheduler without a memory is left as it is.
    """
    vars(scheduler).update(chosen(remembered(scheduler), rows))


def remembered(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Everything plain that a scheduler holds, by attribute: numbers, tensors and lists of them. Its configuration,
    methods and noise samplers are left out.
    """
    plain = (Tensor, list, int, float, type(None))
    held = {name: value for name, value in vars(scheduler).items() if isinstance(value, plain)}
    return {name: list(value) if isinstance(value, list) else value for name, value in held.items()}


def chosen(memory: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The ``rows`` of all tensors of samples; what is of the schedule (tensors of less than two dimensions) is kept."""
    return {name: _chosen(value, rows) for name, value in memory.items()}


def _chosen(value: Any, rows: Tensor) -> Any:
    if isinstance(value, list):
        return [_chosen(part, rows) for part in value]
    if isinstance(value, Tensor) and value.ndim >= 2:
        return value[rows.to(value.device)]
    return value


def require_stochastic(scheduler: SchedulerMixin) -> None:
    """Raises ValueError, naming it, unless the scheduler's own moves suit copies of a particle; see ``kernel_move`` for
    the others. DDIM counts as deterministic: its eta is an argument of the call, and DDIM(eta) is a kernel.
    """
    name, config = type(scheduler).__name__, scheduler.config
    instead = "move by a stochastic kernel instead, such as DDIM(eta=1.0)"
    if isinstance(scheduler, _BROWNIAN):
        raise ValueError(f"the noise of {name} is one Brownian tree of the whole run, not fresh at a step: {instead}")
    solves_sde = str(config.get("algorithm_type", "")).startswith("sde-")
    if not (isinstance(scheduler, _STOCHASTIC) or solves_sde or config.get("stochastic_sampling", False)):
        raise ValueError(f"{name} is deterministic, so that copies of a particle would stay equal: {instead}")


def _move(scheduler: SchedulerMixin, call: dict[str, Any], output: Any) -> Move:
    x, prediction, timestep = call["sample"], call["model_output"], call["timestep"]
    index = _index(scheduler, timestep)
    clean = output.get("pred_original_sample", output.get("denoised"))
    if clean is None:
        levels = _levels(scheduler)
        clean = levels.path.x0(levels.on_path(x, index), prediction, levels.grid[index])
    return Move(index, torch.as_tensor(timestep), x, prediction, promote(clean)[0], output.prev_sample)


def _index(scheduler: SchedulerMixin, timestep: Any) -> int:
    """The place in ``scheduler.timesteps`` of the step just made."""
    if isinstance(scheduler, PNDMScheduler):
        return int(scheduler.counter) - 1
    if hasattr(scheduler, "step_index"):
        return int(scheduler.step_index) - 1
    return int((scheduler.timesteps == timestep).nonzero()[0, 0])


def _fitting(replacement: Tensor, x_next: Tensor) -> Tensor:
    if replacement.shape != x_next.shape:
        raise ValueError(
            f"the latents are {tuple(x_next.shape)}, and on_step returned {tuple(replacement.shape)}: a run keeps its"
            " batch; pipelines.steering.partial_runs goes on with fewer"
        )
    return replacement.to(x_next)


def _refuse_copy(memo: object) -> None:
    raise ValueError(
        "the pipeline copies its scheduler, and the copy would step through the original's hook: this pipeline cannot"
        " be hooked"
    )


@dataclass(frozen=True)
class _Levels:
    """A scheduler's grid of T moves on the path of its network; its latents are ``scale`` (T + 1,) times the path's."""

    path: GaussianPath
    grid: Grid
    scale: Tensor

    def on_path(self, x: Tensor, index: int) -> Tensor:
        """The scheduler's latents (B, ...) before step ``index`` in the scale of the path."""
        return x / expand(self.scale[index], x)


def _levels(scheduler: SchedulerMixin) -> _Levels:
    if isinstance(scheduler, _DISCRETE):
        return _discrete_levels(scheduler)
    if not isinstance(scheduler, _KNOWN) or scheduler.config.get("invert_sigmas", False):
        known = ", ".join(sorted(kind.__name__ for kind in _KNOWN))
        raise ValueError(f"the noise levels of this {type(scheduler).__name__} are not known here: use one of {known}")
    sigma, config = scheduler.sigmas.cpu().double(), scheduler.config
    one = torch.ones_like(sigma)
    if isinstance(scheduler, _EDM):
        return _on_grid(scheduler, EDMPath(config.sigma_data, config.prediction_type), one, sigma, one)
    if _is_flow(scheduler):
        return _on_grid(scheduler, FlowPath(), 1 - sigma, sigma, one)
    kind: Any = "sample" if config.prediction_type == "original_sample" else config.prediction_type
    alpha = (1 + sigma * sigma).rsqrt()
    scale = 1 / alpha if isinstance(scheduler, _SCALED_BY_SIGMA) else one
    return _on_grid(scheduler, VPPath(kind), alpha, sigma * alpha, scale)


def _on_grid(scheduler: SchedulerMixin, path: GaussianPath, alpha: Tensor, sigma: Tensor, scale: Tensor) -> _Levels:
    return _Levels(path, Grid(scheduler.timesteps.cpu().double(), alpha, sigma), scale)


def _discrete_levels(scheduler: SchedulerMixin) -> _Levels:
    """alpha^2 of the timesteps from the table of training levels, and after the last one what the scheduler has."""
    last = scheduler.one if isinstance(scheduler, DDPMScheduler) else scheduler.final_alpha_cumprod
    table = scheduler.alphas_cumprod.cpu().double()
    square = torch.cat([table[scheduler.timesteps.cpu().long()], last.cpu().double().reshape(1)])
    path = VPPath(scheduler.config.prediction_type)
    return _on_grid(scheduler, path, square.sqrt(), (1 - square).sqrt(), torch.ones_like(square))


def _is_flow(scheduler: SchedulerMixin) -> bool:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return True
    predicts_flow = bool(scheduler.config.prediction_type == "flow_prediction")
    if predicts_flow != bool(scheduler.config.get("use_flow_sigmas", False)):
        raise ValueError(
            f"this {type(scheduler).__name__} has prediction_type {scheduler.config.prediction_type!r} and"
            f" use_flow_sigmas {not predicts_flow}, which no path has: set both for a flow, or neither"
        )
    return predicts_flow
