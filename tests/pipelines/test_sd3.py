"""SD3 against diffusers itself, and against bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusion3Pipeline, UNet2DModel

from genalign.diffusion.lora import save_peft
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.transitions import ODE
from genalign.runtime.memory_options import Memory
from pipelines import SD3, base

PROMPTS = ["a red circle", "an orange ring and a blue square"]
SIGMAS = [1.0, 0.75, 0.5, 0.25]


def _start(pipeline: SD3, seeds: tuple[int, ...] = (1, 2)) -> RolloutInputs:
    return RolloutInputs(pipeline.encode(PROMPTS), torch.arange(2), seeds, seeds)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ode_rollout_equals_diffusers_step_by_step(tiny: SD3, tiny_folder: Path, guidance: float) -> None:
    vanilla = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    vanilla.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []

    def note(pipe: object, step: int, timestep: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        return tensors

    images = vanilla(
        PROMPTS,
        latents=tiny.initial_noise([1, 2]),
        sigmas=SIGMAS,
        num_inference_steps=len(SIGMAS),
        guidance_scale=guidance,
        max_sequence_length=tiny.max_sequence_length,
        output_type="pt",
        callback_on_step_end=note,
    ).images
    grid = tiny.grid(len(SIGMAS), SIGMAS)
    ours = rollout(tiny, _start(tiny), grid, [ODE()] * 4, guidance, store=range(4))
    for i, latents in enumerate(seen):
        torch.testing.assert_close(ours.x_next[:, i], latents, rtol=0, atol=1e-5 * float(latents.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(tiny.decode(ours.final), images, rtol=0, atol=1e-4)


def test_default_grid_is_the_schedulers(tiny: SD3) -> None:
    grid = tiny.grid(10)
    tiny.pipe.scheduler.set_timesteps(10)
    torch.testing.assert_close(grid.sigma.float(), tiny.pipe.scheduler.sigmas)
    torch.testing.assert_close(grid.timestep.float(), tiny.pipe.scheduler.timesteps)
    assert float(grid.sigma[-2]) == pytest.approx(0.001, abs=1e-6)


def test_explicit_sigmas_are_used_as_they_are(tiny: SD3) -> None:
    assert tiny.grid(4, SIGMAS).sigma.tolist() == [*SIGMAS, 0.0]


def test_encoding_is_cached_and_keeps_order(tiny: SD3) -> None:
    both = tiny.encode(PROMPTS)
    again = tiny.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert torch.equal(again.tensors["context"], both.tensors["context"][[1, 0, 1]])
    assert again.tensors["context"].shape[1] == 12 + 8


def test_texts_asked_for_longest_ago_are_encoded_again(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for all: in the batch they were first encoded in, to the same bits."""
    tiny = SD3.load(tiny_folder)
    encoded: list[list[str]] = []
    encode = tiny.encode_texts
    monkeypatch.setattr(tiny, "encode_texts", lambda texts: encoded.append(list(texts)) or encode(texts))
    first, kept = tiny.encode([*PROMPTS, "a third"]), tiny.encode(PROMPTS[:1])
    monkeypatch.setattr(base, "_CACHE_BYTES", 3 * sum(row[0].nbytes for row in first.tensors.values()))
    tiny.encode(["a fourth"])  # beside it the unconditional text, and the latest of the others, have room
    assert torch.equal(tiny.encode(PROMPTS[:1]).tensors["context"], kept.tensors["context"]) and len(encoded) == 2
    again = tiny.encode([*PROMPTS, "a third"])
    assert encoded == [sorted({*PROMPTS, "a third", ""}), ["a fourth"], encoded[0]]
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())


def test_noise_is_the_same_alone_and_in_a_batch(tiny: SD3) -> None:
    assert torch.equal(tiny.initial_noise([5, 6, 7])[1], tiny.initial_noise([6])[0])


def test_decode_is_differentiable(tiny: SD3) -> None:
    latents = tiny.initial_noise([0]).requires_grad_()
    tiny.decode(latents).sum().backward()
    assert latents.grad is not None and float(latents.grad.abs().sum()) > 0


def test_offloading_changes_nothing(tiny: SD3, tiny_folder: Path) -> None:
    offloaded = SD3.load(tiny_folder, memory=Memory(offload=True))
    expected, got = tiny.encode(PROMPTS), offloaded.encode(PROMPTS)
    assert torch.equal(expected.tensors["pooled"], got.tensors["pooled"])
    noise = tiny.initial_noise([0])
    assert torch.equal(tiny.decode(noise), offloaded.decode(noise))


@pytest.mark.parametrize("alpha", [4, 10])
def test_lora_round_trip_through_diffusers_is_bit_equal(
    tiny: SD3, tiny_folder: Path, tmp_path: Path, alpha: float
) -> None:
    policy = Policy(tiny.denoiser, Lora(rank=4, alpha=alpha))
    for i, parameter in enumerate(policy.parameters):
        torch.manual_seed(i)
        torch.nn.init.normal_(parameter, std=0.1)
    tiny.save_lora(tmp_path / "lora", policy.adapter_state(), policy.config)  # type: ignore[arg-type]
    vanilla = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    vanilla.load_lora_weights(tmp_path / "lora")
    context = tiny.encode(PROMPTS).tensors
    inputs = {
        "hidden_states": tiny.initial_noise([1, 2]),
        "timestep": torch.tensor([500.0, 250.0]),
        "encoder_hidden_states": context["context"],
        "pooled_projections": context["pooled"],
    }
    with torch.no_grad():
        ours, theirs = tiny.denoiser(**inputs).sample, vanilla.transformer(**inputs).sample
        with policy.reference():
            base = tiny.denoiser(**inputs).sample
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, base)


def test_peft_folder_round_trip(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = Policy(tiny.denoiser, Lora(rank=4, alpha=8))
    for parameter in policy.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    save_peft(tmp_path / "peft", policy.adapter_state(), policy.config)  # type: ignore[arg-type]
    other = PeftModel.from_pretrained(SD3.load(tiny_folder).denoiser, str(tmp_path / "peft"))
    context = tiny.encode(PROMPTS).tensors
    noise, timestep = tiny.initial_noise([1, 2]), torch.tensor([500.0, 250.0])
    with torch.no_grad():
        ours = tiny.denoiser(noise, context["context"], context["pooled"], timestep).sample
        theirs = other(noise, context["context"], context["pooled"], timestep).sample
    assert torch.equal(ours, theirs)


def test_an_adapter_of_another_base_is_refused(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    policy = Policy(tiny.denoiser, Lora(rank=4))
    tiny.save_lora(tmp_path, policy.adapter_state(), policy.config)  # type: ignore[arg-type]
    other = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.transformer.proj_out.weight.add_(1.0)
    with pytest.raises(ValueError, match="was trained on another base checkpoint than this one"):
        SD3(other).load_lora(tmp_path)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model_index\.json: give the folder that save_pretrained wrote"):
        SD3.load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="is a file: give the diffusers folder"):
        SD3.load(file)
    with pytest.raises(FileNotFoundError, match=r"is neither a folder nor a Hub id \(owner/name\)"):
        SD3.load("no/such/folder/here")


def test_another_family_is_refused(tmp_path: Path) -> None:
    unet = UNet2DModel(
        8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a DDPMPipeline, not a StableDiffusion3Pipeline"):
        SD3.load(tmp_path)


def test_a_hub_id_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="not in the local cache, and the Hub did not give it"):
        SD3.load("stabilityai/stable-diffusion-3.5-medium")
