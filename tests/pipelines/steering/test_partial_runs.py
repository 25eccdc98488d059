"""Runs in two parts against unbroken ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from pipelines import SD3
from pipelines.steering.partial_runs import FirstPart, first_part, second_part
from pipelines.steering.scheduler_hooks import Move, patched_step
from tests.pipelines.tiny_pipelines import FAMILIES, STEPS, Family, counted, flux, fresh, sd15, stable_audio

# What numpy 2 says of the tensors that diffusers itself hands to it.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

ALL, KEPT = (0, 1, 2, 3), (3, 1)


def _two_parts(family: Family, steps: int, **extra: Any) -> tuple[FirstPart, Tensor]:
    """The first part of all and the final latents of those kept."""
    generators = fresh(ALL)
    part = first_part(family.pipe, steps, **family.call(ALL, generators), **extra)
    chosen = part.rows(torch.tensor(KEPT))
    call = family.call(KEPT, [generators[row] for row in KEPT])
    final = second_part(family.pipe, chosen, **call, **extra, output_type="latent", return_dict=False)[0]
    return part, final


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_two_parts_equal_the_whole(name: str, steps: int) -> None:
    family = FAMILIES[name]()
    whole = family.run(ALL)
    with counted(family) as batches:
        part, final = _two_parts(family, steps)
    assert _error(final, whole[list(KEPT)]) < 1e-6
    assert sum(batches) == family.nfe * (steps * len(ALL) + (STEPS - steps) * len(KEPT))
    assert len(part) == len(ALL) and part.done == steps
    assert not {"step", "set_timesteps", "__deepcopy__"} & set(vars(family.pipe.scheduler))


@pytest.mark.parametrize("extra", [{}, {"eta": 1.0}])
def test_ddim_is_exact_for_all_rows(extra: dict[str, float]) -> None:
    family, generators = sd15(), fresh(ALL)
    whole = family.run(ALL, **extra)
    part = first_part(family.pipe, 2, **family.call(ALL, generators), **extra)
    call = family.call(ALL, generators)
    assert torch.equal(second_part(family.pipe, part, **call, **extra, output_type="latent").images, whole)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EulerDiscreteScheduler, {}),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {}),
        (DPMSolverMultistepScheduler, {"solver_order": 3}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (UniPCMultistepScheduler, {}),
        (DEISMultistepScheduler, {}),
        (SASolverScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (HeunDiscreteScheduler, {}),
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_two_parts_equal_the_whole_on_other_schedulers(
    kind: type[SchedulerMixin], options: dict[str, Any], steps: int
) -> None:
    family = sd15().on(kind, **options)
    whole = family.run(ALL)
    # Heun's last step divides by a small sigma the rounding of the scale that the pipeline multiplies by.
    assert _error(_two_parts(family, steps)[1], whole[list(KEPT)]) < 3e-6


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_two_parts_of_stable_audio() -> None:
    family = stable_audio(scheduler=EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0))
    whole = family.run(ALL)
    assert _error(_two_parts(family, 2)[1], whole[list(KEPT)]) < 1e-6


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Should have t")
def test_two_parts_of_stable_audio_on_its_own_scheduler() -> None:
    pytest.importorskip("torchsde", reason="CosineDPMSolverMultistepScheduler draws its noise with torchsde")
    family = stable_audio()
    whole = family.run(ALL)
    assert _error(_two_parts(family, 2)[1], whole[list(KEPT)]) < 1e-6


def test_prompts_as_text_and_images_as_output(tiny: SD3) -> None:
    pipe: StableDiffusion3Pipeline = tiny.pipe
    pipe.set_progress_bar_config(disable=True)
    texts = ["a red circle", "a blue square", "an orange ring"]
    call = {"num_inference_steps": 4, "max_sequence_length": tiny.max_sequence_length, "output_type": "pt"}
    whole = pipe(texts, generator=fresh(range(3)), **call).images
    part = first_part(pipe, 2, prompt=texts, generator=fresh(range(3)), **call).rows(torch.tensor([2, 0]))
    images = second_part(pipe, part, prompt=[texts[2], texts[0]], **call).images
    assert _error(images, whole[[2, 0]]) < 1e-5


def test_several_images_of_one_prompt() -> None:
    family = flux(count=1)
    call = {**family.call([0], fresh(ALL)), "num_images_per_prompt": 4, "output_type": "latent"}
    whole = family.pipe(**call).images
    part = first_part(family.pipe, 2, **{**call, "generator": fresh(ALL)}).rows(torch.tensor(KEPT))
    final = second_part(family.pipe, part, **{**call, "generator": None, "num_images_per_prompt": 2}).images
    assert _error(final, whole[list(KEPT)]) < 1e-6


def test_the_previews_are_those_of_the_whole_run() -> None:
    family = sd15()
    moves: list[Move] = []
    with patched_step(family.pipe.scheduler, lambda move: moves.append(move)):
        family.run(ALL)
    part = first_part(family.pipe, 2, **family.call(ALL))
    assert torch.equal(part.x0, moves[1].x0) and torch.equal(part.latents, moves[1].x_next)


def test_an_outer_hook_sees_the_numbers_of_the_whole_run() -> None:
    for family in (sd15(), flux()):
        seen: list[int] = []
        with patched_step(family.pipe.scheduler, lambda move, seen=seen: seen.append(move.index)):
            _two_parts(family, 1)
        assert seen == [0, 1, 2, 3]


def test_a_part_can_be_used_twice_and_after_other_runs() -> None:
    family = sd15().on(DPMSolverMultistepScheduler)
    part = first_part(family.pipe, 2, **family.call(ALL))
    first = second_part(family.pipe, part, **family.call(ALL), output_type="latent").images
    family.run((1,))
    assert torch.equal(second_part(family.pipe, part, **family.call(ALL), output_type="latent").images, first)


@pytest.mark.parametrize("steps", [0, 4, 5])
def test_an_impossible_number_of_steps(steps: int) -> None:
    family = flux()
    with pytest.raises(ValueError, match=f"steps must be 1 to 3 for a part of this call, not {steps}"):
        first_part(family.pipe, steps, **family.call(ALL))
    assert "step" not in vars(family.pipe.scheduler)


def test_another_schedule_is_refused() -> None:
    family = flux()
    part = first_part(family.pipe, 2, **family.call(ALL))
    with pytest.raises(ValueError, match="another schedule than the first part"):
        second_part(family.pipe, part, **{**family.call(ALL), "num_inference_steps": 5})


def test_guidance_by_the_number_of_the_step_is_refused() -> None:
    family = FAMILIES["sd3"]()
    for run in (lambda **call: first_part(family.pipe, 2, **call), _second_of(family)):
        with pytest.raises(ValueError, match="skip_guidance_layers depends on the number of the step"):
            run(**family.call(ALL), skip_guidance_layers=[0])


def _second_of(family: Family) -> Callable[..., Any]:
    part = first_part(family.pipe, 2, **family.call(ALL))
    return lambda **call: second_part(family.pipe, part, **call)


def test_a_pipeline_that_changes_its_latents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = flux()
    part = first_part(family.pipe, 2, **family.call(ALL))
    prepare = family.pipe.prepare_latents
    monkeypatch.setattr(family.pipe, "prepare_latents", lambda *args: (2 * prepare(*args)[0], prepare(*args)[1]))
    with pytest.raises(ValueError, match="cannot be run in parts"):
        second_part(family.pipe, part, **family.call(ALL))


def test_a_schedule_that_the_pipeline_shortens_is_refused() -> None:
    family = FAMILIES["sdxl"]()
    with pytest.raises(ValueError, match="stopped after 1 steps instead of 3"):
        first_part(family.pipe, 3, **family.call(ALL), denoising_end=0.3)


def test_ddim_options_of_the_call_are_kept() -> None:
    family = sd15().on(DDIMScheduler, clip_sample=False)
    whole = family.run(ALL, eta=0.5)
    assert _error(_two_parts(family, 2, eta=0.5)[1], whole[list(KEPT)]) < 1e-6
