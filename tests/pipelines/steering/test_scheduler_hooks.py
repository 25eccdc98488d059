"""Hooks against unpatched diffusers, and kernels in place of its schedulers' own rules."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from genalign.diffusion.transitions import CPS, DDIM, DPMSDE, ODE, FlowSDE, Kernel
from pipelines.steering.scheduler_hooks import (
    Move,
    gather_history,
    grid_of,
    kernel_move,
    patched_step,
    require_stochastic,
)
from tests.pipelines.tiny_pipelines import FAMILIES, SCHEDULERS, STEPS, Family, assert_close, counted, flux, sd3, sd15

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

ALL = (0, 1, 2)
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNCLIPPED = {**VP, "clip_sample": False}


def _observed(
    family: Family, on_step: Callable[[Move], Tensor | None] = lambda move: None
) -> tuple[Tensor, list[Move]]:
    moves: list[Move] = []

    def note(move: Move) -> Tensor | None:
        moves.append(move)
        return on_step(move)

    with patched_step(family.pipe.scheduler, note):
        final = family.run(ALL)
    return final, moves


@pytest.mark.parametrize(
    "build",
    [
        *FAMILIES.values(),
        *(
            lambda kind=kind, options=options: sd15().on(kind, **options)
            for kind, options in [*SCHEDULERS, (diffusers.LCMScheduler, {})]
        ),
    ],
)
def test_observing_changes_nothing(build: Callable[[], Family]) -> None:
    family = build()
    expected = family.run(ALL)
    with counted(family) as batches:
        final, moves = _observed(family)
    timesteps = family.pipe.scheduler.timesteps
    assert torch.equal(final, expected) and torch.equal(moves[-1].x_next, final)
    assert [move.index for move in moves] == list(range(len(timesteps)))
    assert sum(batches) == len(ALL) * family.nfe * len(timesteps)
    assert all(torch.equal(before.x_next, after.x) for before, after in itertools.pairwise(moves))


@pytest.mark.parametrize("build", [flux, sd3])
def test_the_last_preview_of_a_flow_is_the_result(build: Callable[[], Family]) -> None:
    final, moves = _observed(build())
    assert torch.equal(moves[-1].x0, final)


@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler, diffusers.SASolverScheduler]
)
def test_the_preview_of_a_solver_is_its_own(kind: type[SchedulerMixin]) -> None:
    family = sd15().on(kind)

    def compare(move: Move) -> None:
        assert_close(move.x0, family.pipe.scheduler.model_outputs[-1], 1e-6)

    _observed(family, compare)


def test_the_attribute_is_gone_after_the_end_and_after_an_exception() -> None:
    family = flux()
    scheduler = family.pipe.scheduler
    family.run(ALL)
    untouched = set(vars(scheduler))

    def fail(move: Move) -> None:
        assert inspect.signature(scheduler.step) == inspect.signature(type(scheduler)().step)
        raise KeyError("mine")

    _observed(family)
    assert set(vars(scheduler)) == untouched
    with pytest.raises(KeyError, match="mine"), patched_step(scheduler, fail):
        family.run(ALL)
    assert set(vars(scheduler)) == untouched


def test_a_returned_tensor_replaces_the_latents_in_both_forms() -> None:
    scheduler = DDIMScheduler(**UNCLIPPED)
    scheduler.set_timesteps(STEPS)
    x, output = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    plain = scheduler.step(output, scheduler.timesteps[0], x)
    with patched_step(scheduler, lambda move: (move.x_next + 1).double()):
        both = (
            scheduler.step(output, scheduler.timesteps[0], sample=x, return_dict=False),
            scheduler.step(output, scheduler.timesteps[0], x).to_tuple(),
        )
    for got in both:
        assert torch.equal(got[0], plain.prev_sample + 1)
        assert torch.equal(got[1], plain.pred_original_sample)


def test_patches_nest() -> None:
    family = flux()
    unsteered = _observed(family)[1]
    seen: list[Tensor] = []
    with patched_step(family.pipe.scheduler, lambda move: move.x_next + 1):
        final, moves = _observed(family, lambda move: seen.append(move.x_next) or move.x_next * 2)
    assert torch.equal(seen[0], unsteered[0].x_next + 1)
    assert torch.equal(moves[1].x, seen[0] * 2)
    assert torch.equal(final, seen[-1] * 2)
    assert "step" not in vars(family.pipe.scheduler)


def test_other_shapes_and_copied_and_idle_schedulers_are_refused() -> None:
    family = flux()
    scheduler = family.pipe.scheduler
    with pytest.raises(ValueError, match="a run keeps its batch"):
        _observed(family, lambda move: move.x_next[:1])
    with (
        pytest.raises(ValueError, match="the pipeline copies its scheduler"),
        patched_step(scheduler, lambda move: None),
    ):
        copy.deepcopy(scheduler)
    with (
        pytest.raises(ValueError, match="the FlowMatchEulerDiscreteScheduler that is hooked made no step"),
        patched_step(scheduler, lambda move: None),
    ):
        pass
    assert copy.deepcopy(scheduler) is not scheduler


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DDIMScheduler, {}, "DDIMScheduler is deterministic"),
        (EulerDiscreteScheduler, {}, "EulerDiscreteScheduler is deterministic"),
        (DPMSolverMultistepScheduler, {}, "DPMSolverMultistepScheduler is deterministic"),
        (FlowMatchEulerDiscreteScheduler, {}, "FlowMatchEulerDiscreteScheduler is deterministic"),
        (diffusers.CosineDPMSolverMultistepScheduler, {}, "draws its noise from one Brownian tree"),
        (diffusers.DPMSolverSDEScheduler, {}, "draws its noise from one Brownian tree"),
        (diffusers.DDPMScheduler, {}, None),
        (diffusers.EulerAncestralDiscreteScheduler, {}, None),
        (diffusers.LCMScheduler, {}, None),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, None),
        (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, None),
    ],
)
def test_only_fresh_noise_can_be_resampled(
    kind: type[SchedulerMixin], options: dict[str, Any], message: str | None
) -> None:
    if message is not None and "Brownian" in message:
        pytest.importorskip("torchsde", reason="diffusers makes these schedulers only with torchsde")
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        require_stochastic(kind(**options))


def _steps(scheduler: SchedulerMixin, count: int = 5, **call: Any) -> list[Move]:
    """The moves of a scheduler by random predictions."""
    scheduler.set_timesteps(count)
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=source) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    moves: list[Move] = []
    with patched_step(scheduler, lambda move: moves.append(move)):
        for timestep in scheduler.timesteps:
            x = scheduler.step(torch.randn(x.shape, generator=source), timestep, x, **call).prev_sample
    return moves


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "build",
    [
        lambda kind: DDIMScheduler(**UNCLIPPED, prediction_type=kind, set_alpha_to_one=False, steps_offset=1),
        lambda kind: DDIMScheduler(**UNCLIPPED, prediction_type=kind, timestep_spacing="trailing"),
        lambda kind: EulerDiscreteScheduler(**VP, prediction_type=kind),
        lambda kind: EulerDiscreteScheduler(**VP, prediction_type=kind, use_karras_sigmas=True),
        lambda kind: DPMSolverMultistepScheduler(**VP, prediction_type=kind, solver_order=1),
        lambda kind: diffusers.EDMEulerScheduler(prediction_type=kind),
        lambda kind: diffusers.EDMDPMSolverMultistepScheduler(prediction_type=kind, solver_order=1),
        lambda kind: FlowMatchEulerDiscreteScheduler(shift=3.0),
        lambda kind: DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=1, flow_shift=3.0
        ),
    ],
)
def test_the_ode_equals_the_first_order_scheduler(build: Callable[[str], SchedulerMixin], prediction_type: str) -> None:
    scheduler = build(prediction_type)
    for move in _steps(scheduler):
        assert_close(kernel_move(scheduler, ODE(), move, torch.zeros_like(move.x)), move.x_next, 1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "kernel"),
    [
        (DDIMScheduler, {**UNCLIPPED, "set_alpha_to_one": False, "steps_offset": 1}, DDIM(0.4)),
        (DDIMScheduler, {**UNCLIPPED, "set_alpha_to_one": False, "steps_offset": 1}, DDIM(1.0)),
        (diffusers.EulerAncestralDiscreteScheduler, VP, DDIM(1.0)),
        (diffusers.DDPMScheduler, UNCLIPPED, DPMSDE()),
        (DPMSolverMultistepScheduler, {**VP, "algorithm_type": "sde-dpmsolver++", "solver_order": 1}, DPMSDE()),
    ],
)
def test_kernels_equal_the_stochastic_schedulers(
    kind: type[SchedulerMixin], options: dict[str, Any], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, noise = kind(**options), torch.randn(2, 3, 4, 4)
    for module in ("ddim", "ddpm", "dpmsolver_multistep", "euler_ancestral_discrete"):
        name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
        monkeypatch.setattr(name, lambda *args, **kwargs: noise)
    moves = _steps(scheduler, **({"eta": kernel.eta} if isinstance(scheduler, DDIMScheduler) else {}))
    if isinstance(scheduler, diffusers.DDPMScheduler):
        moves = moves[:-1]  # it puts a little noise on its result, where the kernel has none
    for move in moves:
        assert_close(kernel_move(scheduler, kernel, move, noise), move.x_next, 1e-5)


def test_levels_of_the_families() -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(4)
    step = grid_of(flow)[1]
    assert float(step.alpha + step.sigma) == pytest.approx(1) and float(step.timestep) == float(flow.timesteps[1])
    assert float(grid_of(flow)[3].sigma_next) == 0
    for scheduler in (DDIMScheduler(**UNCLIPPED), EulerDiscreteScheduler(**VP, timestep_spacing="leading")):
        scheduler.set_timesteps(4)
        step = grid_of(scheduler)[2]
        expected = scheduler.alphas_cumprod[int(scheduler.timesteps[2])]
        assert float(step.alpha**2) == pytest.approx(float(expected), rel=1e-5)
        assert float(step.alpha**2 + step.sigma**2) == pytest.approx(1)
    edm = diffusers.EDMEulerScheduler()
    edm.set_timesteps(4)
    assert float(grid_of(edm)[0].alpha) == 1 and float(grid_of(edm)[0].sigma) == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("build", "kernel"), [(flux, FlowSDE(0.7)), (sd3, DDIM(1.0)), (sd15, DDIM(1.0))], ids=["flux", "sd3", "sd15"]
)
def test_a_kernel_drives_a_pipeline(build: Callable[[], Family], kernel: Kernel) -> None:
    family = build()
    ours = _observed(family, lambda move: kernel_move(family.pipe.scheduler, ODE(), move, torch.zeros_like(move.x)))[0]
    assert_close(ours, family.run(ALL), 1e-5)
    source = torch.Generator().manual_seed(3)
    noisy = _observed(
        family,
        lambda move: kernel_move(family.pipe.scheduler, kernel, move, torch.randn(move.x.shape, generator=source)),
    )[0]
    assert float((noisy - ours).abs().mean()) > 0.01


def test_pndm_moves_once_for_its_two_evaluations_of_one_level() -> None:
    plain = sd15().run(ALL)
    family = sd15().on(diffusers.PNDMScheduler, skip_prk_steps=True)
    scheduler = family.pipe.scheduler
    final, moves = _observed(family, lambda move: kernel_move(scheduler, ODE(), move, torch.zeros_like(move.x)))
    assert len(moves) == STEPS + 1
    assert_close(final, plain, 1e-5)


def test_the_second_evaluation_of_a_level_adds_no_noise() -> None:
    """CPS replaces a part of the noise in every move, even in one to the same level."""
    family = sd15().on(diffusers.PNDMScheduler, skip_prk_steps=True)
    scheduler, still = family.pipe.scheduler, []

    def move_by_cps(move: Move) -> Tensor:
        x_next = kernel_move(scheduler, CPS(0.5), move, torch.ones_like(move.x))
        still.append(torch.equal(x_next, move.x))
        return x_next

    _observed(family, move_by_cps)
    assert still == [False, True] + [False] * (STEPS - 1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            DDIMScheduler,
            {},
            r"set pipe\.scheduler = DDIMScheduler\.from_config\(pipe\.scheduler\.config, clip_sample=False\)",
        ),
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}, "prediction_type 'epsilon' and use_flow_sigmas True"),
        (
            diffusers.TCDScheduler,
            {"clip_sample": False},
            r"TCDScheduler cannot be derived: set .*\.scheduler = DDIMScheduler\.from_config\(.*, or another of Cosine",
        ),
    ],
)
def test_schedulers_without_levels_for_kernels_are_refused(
    kind: type[SchedulerMixin], options: dict[str, Any], message: str
) -> None:
    scheduler = kind(**options)
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        kernel_move(scheduler, ODE(), Move(0, x, x, x, x), x)


@pytest.mark.parametrize(
    ("kind", "options", "has_history"),
    [
        (DDIMScheduler, {"clip_sample": False}, False),
        (DPMSolverMultistepScheduler, {}, True),
        (DPMSolverMultistepScheduler, {"solver_order": 3}, True),
        (diffusers.UniPCMultistepScheduler, {}, True),
        (diffusers.DEISMultistepScheduler, {}, True),
        (diffusers.PNDMScheduler, {"skip_prk_steps": True}, True),
    ],
)
def test_a_history_is_gathered_with_the_latents(
    kind: type[SchedulerMixin], options: dict[str, Any], has_history: bool
) -> None:
    """Copied samples of one prompt continue as their originals, and only with the history."""
    family = sd15().on(kind, **options)
    for name, tensor in family.samples.items():
        family.samples[name] = tensor[:1].expand_as(tensor)
    plain, rows = family.run(ALL), torch.tensor([2, 2, 0])

    def resample(move: Move, history: bool) -> Tensor | None:
        if move.index == 1 and history:
            gather_history(family.pipe.scheduler, rows)
        return move.x_next[rows] if move.index == 1 else None

    with_history, without = (_observed(family, functools.partial(resample, history=flag))[0] for flag in (True, False))
    assert_close(with_history, plain[rows], 1e-6)
    assert (float((without - plain[rows]).abs().max()) > 0.01) == has_history
