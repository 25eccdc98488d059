"""Runs in parts against unbroken runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from pipelines import SD3
from pipelines.steering.prune import PartialRun, run_part, run_rest
from pipelines.steering.scheduler_hooks import Move, patched_step
from tests.pipelines.steering.test_prompts_of_calls import _open
from tests.pipelines.tiny_checkpoints import FolderOf
from tests.pipelines.tiny_pipelines import (
    FAMILIES,
    SCHEDULERS,
    STEPS,
    Family,
    assert_close,
    counted,
    flux,
    fresh,
    sd15,
    stable_audio,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

ALL, SELECTED = (0, 1, 2, 3), (3, 1)


def _in_parts(family: Family, *stops: int, **extra: Any) -> tuple[PartialRun, Tensor]:
    """The run of all samples until the last of ``stops``, and the final latents of those selected there."""
    generators, part = fresh(ALL), None
    for steps in stops:
        part = run_part(family.pipe, part, steps, **family.call(ALL, generators), **extra)
    assert part is not None
    call = family.call(SELECTED, [generators[row] for row in SELECTED])
    selected = part.rows(torch.tensor(SELECTED))
    return part, run_rest(family.pipe, selected, **call, **extra, output_type="latent", return_dict=False)[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (1, 3)])
def test_parts_equal_the_whole(name: str, stops: tuple[int, ...]) -> None:
    family = FAMILIES[name]()
    whole, steps = family.run(ALL), stops[-1]
    with counted(family) as batches:
        part, final = _in_parts(family, *stops)
    assert_close(final, whole[list(SELECTED)])
    assert sum(batches) == family.nfe * (steps * len(ALL) + (STEPS - steps) * len(SELECTED))
    assert len(part) == len(ALL) and part.done == steps
    assert not {"step", "set_timesteps", "__deepcopy__"} & set(vars(family.pipe.scheduler))


@pytest.mark.parametrize("name", ["flux2_klein", "z_image"])
def test_parts_of_a_call_by_text_equal_the_whole(name: str, folder_of: FolderOf) -> None:
    pipe = _open(folder_of(name))
    call = {"num_inference_steps": STEPS, "height": 16, "width": 32, "max_sequence_length": 8}

    def arguments() -> dict[str, Any]:  # ZImagePipeline changes the list of prompts
        return {**call, "prompt": ["a ring", "a red circle"], "generator": fresh(range(2))}

    whole = pipe(**arguments(), output_type="latent").images
    part = run_part(pipe, None, 2, **arguments())
    assert_close(run_rest(pipe, part, **arguments(), output_type="latent").images, whole)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_exact_for_all_rows(eta: float) -> None:
    family, generators = sd15(), fresh(ALL)
    whole = family.run(ALL, eta=eta)
    part = run_part(family.pipe, None, 2, **family.call(ALL, generators), eta=eta)
    call = family.call(ALL, generators)
    assert torch.equal(run_rest(family.pipe, part, **call, eta=eta, output_type="latent").images, whole)


@pytest.mark.parametrize(("kind", "options"), SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_parts_equal_the_whole_on_other_schedulers(
    kind: type[SchedulerMixin], options: dict[str, Any], steps: int
) -> None:
    family = sd15().on(kind, **options)
    whole = family.run(ALL)
    # Heun's last step divides by a small sigma the rounding of the scale that the pipeline multiplies by.
    assert_close(_in_parts(family, steps)[1], whole[list(SELECTED)], 3e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Should have t")
@pytest.mark.parametrize("own_scheduler", [False, True])
def test_parts_of_stable_audio(own_scheduler: bool) -> None:
    if own_scheduler:
        pytest.importorskip("torchsde", reason="CosineDPMSolverMultistepScheduler draws its noise with torchsde")
    edm = EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0)
    family = stable_audio(scheduler=None if own_scheduler else edm)
    whole = family.run(ALL)
    assert_close(_in_parts(family, 2)[1], whole[list(SELECTED)])


def test_prompts_as_text_and_images_as_output(tiny: SD3) -> None:
    pipe: StableDiffusion3Pipeline = tiny.pipe
    pipe.set_progress_bar_config(disable=True)
    texts = ["a red circle", "a blue square", "an orange ring"]
    call = {"num_inference_steps": 4, "max_sequence_length": tiny.max_sequence_length, "output_type": "pt"}
    whole = pipe(texts, generator=fresh(range(3)), **call).images
    part = run_part(pipe, None, 2, prompt=texts, generator=fresh(range(3)), **call).rows(torch.tensor([2, 0]))
    assert_close(run_rest(pipe, part, prompt=[texts[2], texts[0]], **call).images, whole[[2, 0]], 1e-5)


def test_several_images_of_one_prompt() -> None:
    family = flux(count=1)
    call = {**family.call([0], fresh(ALL)), "num_images_per_prompt": 4, "output_type": "latent"}
    whole = family.pipe(**call).images
    part = run_part(family.pipe, None, 2, **{**call, "generator": fresh(ALL)}).rows(torch.tensor(SELECTED))
    final = run_rest(family.pipe, part, **{**call, "generator": None, "num_images_per_prompt": 2}).images
    assert_close(final, whole[list(SELECTED)])


def test_previews_equal_those_of_the_whole_run() -> None:
    family = sd15()
    moves: list[Move] = []
    with patched_step(family.pipe.scheduler, lambda move: moves.append(move)):
        family.run(ALL)
    part = run_part(family.pipe, None, 2, **family.call(ALL))
    assert torch.equal(part.x0, moves[1].x0) and torch.equal(part.latents, moves[1].x_next)


@pytest.mark.parametrize("build", [sd15, flux])
def test_an_outer_hook_sees_the_step_numbers_of_the_whole_run(build: Callable[[], Family]) -> None:
    family, steps = build(), []
    with patched_step(family.pipe.scheduler, lambda move: steps.append(move.index)):
        _in_parts(family, 1)
    assert steps == [0, 1, 2, 3]


def test_a_part_can_be_used_twice_and_after_other_runs() -> None:
    family = sd15().on(DPMSolverMultistepScheduler)
    part = run_part(family.pipe, None, 2, **family.call(ALL))
    first = run_rest(family.pipe, part, **family.call(ALL), output_type="latent").images
    family.run((1,))
    assert torch.equal(run_rest(family.pipe, part, **family.call(ALL), output_type="latent").images, first)


@pytest.mark.parametrize(
    ("name", "done", "steps", "extra", "message"),
    [
        ("flux", 0, 0, {}, "steps must be more than the 0 that are done, not 0"),
        ("flux", 2, 2, {}, "steps must be more than the 2 that are done, not 2"),
        ("flux", 0, 4, {}, "steps must be 1 to 3 for a part of this call, not 4"),
        ("flux", 2, 3, {"num_inference_steps": 5}, "another schedule than the part before"),
        ("sd3", 0, 2, {"skip_guidance_layers": [0]}, "skip_guidance_layers depends on the number of the step"),
        ("sdxl", 0, 3, {"denoising_end": 0.3}, "stopped after 1 steps instead of 3"),
    ],
)
def test_impossible_parts_are_refused(name: str, done: int, steps: int, extra: dict[str, Any], message: str) -> None:
    family = FAMILIES[name]()
    part = run_part(family.pipe, None, done, **family.call(ALL)) if done else None
    with pytest.raises(ValueError, match=message):
        run_part(family.pipe, part, steps, **{**family.call(ALL), **extra})
    assert "step" not in vars(family.pipe.scheduler)


def test_a_pipeline_that_changes_its_latents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = flux()
    part = run_part(family.pipe, None, 2, **family.call(ALL))
    prepare = family.pipe.prepare_latents
    monkeypatch.setattr(family.pipe, "prepare_latents", lambda *args: (2 * prepare(*args)[0], prepare(*args)[1]))
    with pytest.raises(ValueError, match="cannot be run in parts"):
        run_rest(family.pipe, part, **family.call(ALL))
