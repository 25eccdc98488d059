"""Hooks into unmodified diffusers pipelines, to observe or replace every step of the scheduler.

A hook shadows a method on the scheduler's instance, so the pipeline needs no change. B samples, T timesteps: one
for each evaluation of the network (guidance not counted).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler, SchedulerMixin
from torch import Tensor

from genalign.diffusion.paths import EDMPath, FlowPath, GaussianPath, VPPath, expand, promote
from genalign.diffusion.transitions import Kernel, transition
from genalign.types import Grid

_DISCRETE = (diffusers.DDIMScheduler, DDPMScheduler, PNDMScheduler)
_SCALED_BY_SIGMA = (diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler)
_SOLVERS = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.SASolverScheduler,
)
_EDM = (
    diffusers.EDMEulerScheduler,
    diffusers.EDMDPMSolverMultistepScheduler,
    diffusers.CosineDPMSolverMultistepScheduler,
)
_SUPPORTED = (FlowMatchEulerDiscreteScheduler, *_DISCRETE, *_SCALED_BY_SIGMA, *_SOLVERS, *_EDM)

_ROUNDINGS = 8
_BROWNIAN = (diffusers.CosineDPMSolverMultistepScheduler, diffusers.DPMSolverSDEScheduler)
_STOCHASTIC = (
    DDPMScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.LCMScheduler,
    diffusers.SASolverScheduler,
)


@dataclass(frozen=True)
class Move:
    """One step of a scheduler, at ``scheduler.timesteps[index]``.

    The latents ``x`` (B, ...) before it and ``x_next`` after it are in the scheduler's own scale. ``prediction`` is the
    network's output at x, guidance included, and ``x0`` the clean latents predicted by it, in float32 or x's float64.
    """

    index: int
    x: Tensor
    prediction: Tensor
    x0: Tensor
    x_next: Tensor


def is_start(move: Move, latents: Tensor) -> bool:
    """Whether the step starts from ``latents`` (B, ...), up to rounding."""
    if move.x.shape != latents.shape:
        return False
    rounding = _ROUNDINGS * torch.finfo(latents.dtype).eps * latents.abs().max()
    return bool((latents - move.x).abs().max() <= rounding)


@contextmanager
def patched_step(scheduler: SchedulerMixin, on_step: Callable[[Move], Tensor | None]) -> Iterator[None]:
    """Call ``on_step`` after every step of the scheduler within the context.

    A tensor that it returns replaces the next latents, in their dtype; if it always returns None, the samples are
    bit-identical to an unpatched run. Patches nest: the inner one sees the latents that the outer one returned. Raises
    ValueError for a replacement of another shape, for a pipeline that copies its scheduler, and at the end if no step
    was made.
    """
    step = scheduler.step
    signature = inspect.signature(step)
    steps = 0

    @functools.wraps(step)  # keeps the signature, in which pipelines look for eta and generator
    def observed_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        call = signature.bind(*args, **kwargs)
        as_tuple = not call.arguments.get("return_dict", True)
        call.arguments["return_dict"] = True
        output = step(*call.args, **call.kwargs)
        move = _move(scheduler, call.arguments, output)
        replacement = on_step(move)
        if replacement is not None:
            if replacement.shape != move.x_next.shape:
                raise ValueError(
                    f"the latents are {tuple(move.x_next.shape)}, and on_step returned {tuple(replacement.shape)}: a"
                    " run keeps its batch; use pipelines.steering.prune.run_part to continue with fewer samples"
                )
            output.prev_sample = replacement.to(move.x_next)
        return output.to_tuple() if as_tuple else output

    def refuse_copy(memo: object) -> None:
        raise ValueError(
            "the pipeline copies its scheduler, and the copy would step through the original's hook: this pipeline"
            " cannot be hooked; load the checkpoint by pipelines.load, and call genalign.search.search"
        )

    with replaced(scheduler, "step", observed_step), replaced(scheduler, "__deepcopy__", refuse_copy):
        yield
    if not steps:
        raise ValueError(
            f"the {type(scheduler).__name__} that is hooked made no step: hook the scheduler that the pipeline has when"
            " it is called"
        )


@contextmanager
def replaced(instance: object, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one instance within the context."""
    own = vars(instance).get(name)
    setattr(instance, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(instance, name)
        else:
            setattr(instance, name, own)


def grid_of(scheduler: SchedulerMixin) -> Grid:
    """Return the noise levels of the scheduler's steps on the path of the network, for kernels.

    Each step ends at the level of the next timestep; a DDIMScheduler with unequal distances of timesteps itself moves
    to other levels than the network's next timestep says. Raises ValueError for an unsupported scheduler.
    """
    return _levels(scheduler)[1]


def kernel_grid(scheduler: SchedulerMixin) -> Grid:
    """Return the noise levels that kernels move between: those of ``grid_of`` without second evaluations at a level.

    Raises ValueError, with a scheduler to set instead, for one that is not supported or whose levels do not fall.
    """
    grid = grid_of(scheduler)
    falls = grid.sigma[1:] < grid.sigma[:-1]
    if bool((grid.sigma[1:] > grid.sigma[:-1]).any()):
        raise ValueError(
            f"the noise levels of this {type(scheduler).__name__} rise between steps, where kernels cannot move: set"
            f" {remedy(scheduler)}"
        )
    first = torch.ones(1, dtype=torch.bool)
    levels = torch.cat([first, falls])
    return Grid(grid.timestep[falls], grid.alpha[levels], grid.sigma[levels])


def remedy(scheduler: SchedulerMixin) -> str:
    """The line that gives a pipeline a scheduler of the same noise levels that every strategy works with."""
    config = scheduler.config
    if config.get("prediction_type") == "flow_prediction" or "FlowMatch" in type(scheduler).__name__:
        return "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
    if "sigma_data" in config:
        return "pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)"
    option = ", thresholding=False" if config.get("thresholding") else ""
    return f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False{option})"


def kernel_move(scheduler: SchedulerMixin, kernel: Kernel, move: Move, noise: Tensor) -> Tensor:
    """Compute the next latents (B, ...) by ``kernel`` from a step's prediction, in place of the scheduler's rule.

    Args:
        scheduler: The scheduler, in the state after the step.
        kernel: The transition, to the noise level of the next timestep. The second of two evaluations at one level,
            as PNDM makes them, moves nothing.
        move: The step of the scheduler.
        noise: Standard normal noise (B, ...).

    Returns:
        Latents in the scheduler's scale and the dtype of ``move.x_next``.

    Raises:
        ValueError: The scheduler clips its predictions, or is not supported.
    """
    if any(scheduler.config.get(option, False) for option in ("clip_sample", "thresholding")):
        raise ValueError(
            f"this {type(scheduler).__name__} clips its predictions, and kernels do not: set {remedy(scheduler)}"
        )
    path, grid, scale = _levels(scheduler)
    step = grid[move.index]
    if bool(step.sigma == step.sigma_next):
        return move.x
    x = move.x / expand(scale[move.index], move.x)
    x_next = transition(path, kernel, x, move.prediction, step).sample(noise)
    return (x_next * expand(scale[move.index + 1], x_next)).to(move.x_next.dtype)


def gather_history(scheduler: SchedulerMixin, rows: Tensor) -> None:
    """Replace sample i in the scheduler's history of earlier steps by sample ``rows[i]``, for ``rows`` (M,) long.

    Call it with every permutation or selection of the latents; a scheduler without a history does not change.
    """
    vars(scheduler).update(select_rows(scheduler_state(scheduler), rows))


def scheduler_state(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return the plain attributes of a scheduler by name: numbers, tensors and lists of them.

    The configuration, methods and noise samplers are left out.
    """
    plain = (Tensor, list, int, float, type(None))
    attributes = {name: value for name, value in vars(scheduler).items() if isinstance(value, plain)}
    return {name: list(value) if isinstance(value, list) else value for name, value in attributes.items()}


def select_rows(state: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Select ``rows`` (M,) long of every tensor of samples; tensors of less than two dimensions are schedules."""

    def select(value: Any) -> Any:
        if isinstance(value, list):
            return [select(part) for part in value]
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value[rows.to(value.device, non_blocking=True)]
        return value

    return {name: select(value) for name, value in state.items()}


def require_stochastic(scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless the scheduler draws fresh noise at each step, so copies of a particle diverge.

    DDIM counts as deterministic: its eta is an argument of the call, and DDIM(eta) is a kernel for ``kernel_move``.
    """
    name, config = type(scheduler).__name__, scheduler.config
    instead = "leave out kernel=None, so the strategy moves particles by DDIM(1.0)"
    if isinstance(scheduler, _BROWNIAN):
        raise ValueError(
            f"{name} draws its noise from one Brownian tree for the whole run, not at each step: {instead}"
        )
    solves_sde = str(config.get("algorithm_type", "")).startswith("sde-")
    if not (isinstance(scheduler, _STOCHASTIC) or solves_sde or config.get("stochastic_sampling", False)):
        raise ValueError(f"{name} is deterministic, so copies of a particle would stay equal: {instead}")


def _move(scheduler: SchedulerMixin, call: dict[str, Any], output: Any) -> Move:
    """Describe the step that the scheduler has just made, from its arguments and its output."""
    x, prediction, timestep = call["sample"], call["model_output"], call["timestep"]
    if isinstance(scheduler, PNDMScheduler):
        index = int(scheduler.counter) - 1
    elif hasattr(scheduler, "step_index"):
        index = int(scheduler.step_index) - 1
    else:
        index = int((scheduler.timesteps == timestep).nonzero()[0, 0])
    x0 = output.get("pred_original_sample", output.get("denoised"))
    if x0 is None:
        path, grid, scale = _levels(scheduler)
        x0 = path.x0(x / expand(scale[index], x), prediction, grid[index])
    return Move(index, x, prediction, promote(x0)[0], output.prev_sample)


def _levels(scheduler: SchedulerMixin) -> tuple[GaussianPath, Grid, Tensor]:
    """Return the path of the network, the grid of T moves, and the scale (T + 1,) of latents, relative to the path's.

    Raises ValueError for an unsupported scheduler.
    """
    config = scheduler.config
    if not isinstance(scheduler, _SUPPORTED) or config.get("invert_sigmas", False):
        supported = ", ".join(sorted(kind.__name__ for kind in _SUPPORTED))
        raise ValueError(
            f"the noise levels of this {type(scheduler).__name__} cannot be derived: set {remedy(scheduler)}, or"
            f" another of {supported}"
        )

    # alpha^2 of each timestep from the table of training levels, and the scheduler's own after the last
    if isinstance(scheduler, _DISCRETE):
        last = scheduler.one if isinstance(scheduler, DDPMScheduler) else scheduler.final_alpha_cumprod
        table = scheduler.alphas_cumprod.cpu().double()
        square = torch.cat([table[scheduler.timesteps.cpu().long()], last.cpu().double().reshape(1)])
        grid = Grid(scheduler.timesteps.cpu().double(), square.sqrt(), (1 - square).sqrt())
        return VPPath(config.prediction_type), grid, torch.ones_like(square)

    # The others list sigma; of a variance preserving path it is the ratio of noise to signal
    sigma = scheduler.sigmas.cpu().double()
    alpha = scale = torch.ones_like(sigma)
    path: GaussianPath
    if isinstance(scheduler, _EDM):
        path = EDMPath(config.sigma_data, config.prediction_type)
    elif _is_flow(scheduler):
        path, alpha = FlowPath(), 1 - sigma
    else:
        kind: Any = "sample" if config.prediction_type == "original_sample" else config.prediction_type
        path, alpha = VPPath(kind), (1 + sigma * sigma).rsqrt()
        sigma = sigma * alpha
        if isinstance(scheduler, _SCALED_BY_SIGMA):
            scale = 1 / alpha
    return path, Grid(scheduler.timesteps.cpu().double(), alpha, sigma), scale


def _is_flow(scheduler: SchedulerMixin) -> bool:
    """Return whether the scheduler's path is a flow. Raises ValueError for settings that contradict each other."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return True
    predicts_flow = bool(scheduler.config.prediction_type == "flow_prediction")
    if predicts_flow != bool(scheduler.config.get("use_flow_sigmas", False)):
        raise ValueError(
            f"this {type(scheduler).__name__} has prediction_type {scheduler.config.prediction_type!r} and"
            f" use_flow_sigmas {not predicts_flow}, which contradict each other: set both for a flow, or neither"
        )
    return predicts_flow
