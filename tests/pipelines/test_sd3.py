"""SD3 against diffusers itself, and against bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusion3Pipeline, UNet2DModel
from peft import PeftModel

from genalign.diffusion.lora import save_peft
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.transitions import ODE
from genalign.runtime.memory_options import Memory
from pipelines import SD3, base

PROMPTS = ["a red circle", "an orange ring and a blue square"]
SIGMAS = [1.0, 0.75, 0.5, 0.25]


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
    start = RolloutInputs(tiny.encode(PROMPTS), torch.arange(2), (1, 2), (1, 2))
    ours = rollout(tiny, start, grid, [ODE()] * 4, guidance, store=range(4))
    for i, latents in enumerate(seen):
        torch.testing.assert_close(ours.x_next[:, i], latents, rtol=0, atol=1e-5 * float(latents.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(tiny.decode(ours.final), images, rtol=0, atol=1e-4)


def test_the_grid_is_the_schedulers_or_the_explicit_sigmas(tiny: SD3) -> None:
    grid, scheduler = tiny.grid(10), tiny.pipe.scheduler
    scheduler.set_timesteps(10)
    torch.testing.assert_close(grid.sigma.float(), scheduler.sigmas)
    torch.testing.assert_close(grid.timestep.float(), scheduler.timesteps)
    assert float(grid.sigma[-2]) == pytest.approx(0.001, abs=1e-6)
    assert tiny.grid(4, SIGMAS).sigma.tolist() == [*SIGMAS, 0.0]


def test_encoding_is_cached_and_keeps_order(tiny: SD3) -> None:
    both = tiny.encode(PROMPTS)
    again = tiny.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert torch.equal(again.tensors["context"], both.tensors["context"][[1, 0, 1]])
    assert again.tensors["context"].shape[1] == 12 + 8


def test_embeddings_dropped_from_the_cache_are_computed_again_to_the_same_bits(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = SD3.load(tiny_folder)
    batches: list[list[str]] = []
    encode = tiny.encode_texts
    monkeypatch.setattr(tiny, "encode_texts", lambda texts: batches.append(list(texts)) or encode(texts))
    first, one = tiny.encode([*PROMPTS, "a third"]), tiny.encode(PROMPTS[:1])
    monkeypatch.setattr(base, "_CACHE_BYTES", 3 * sum(row[0].nbytes for row in first.tensors.values()))
    tiny.encode(["a fourth"])  # there is room for it, for the unconditional text and for the latest of the others
    assert torch.equal(tiny.encode(PROMPTS[:1]).tensors["context"], one.tensors["context"]) and len(batches) == 2
    again = tiny.encode([*PROMPTS, "a third"])
    assert batches == [sorted({*PROMPTS, "a third", ""}), ["a fourth"], batches[0]]
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


def _policy(tiny: SD3, alpha: float) -> Policy:
    policy = Policy(tiny.denoiser, Lora(rank=4, alpha=alpha))
    for i, parameter in enumerate(policy.parameters):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return policy


@pytest.mark.parametrize(("loader", "alpha"), [("diffusers", 4), ("diffusers", 10), ("peft", 8)])
def test_a_lora_round_trip_is_bit_equal(
    tiny: SD3, tiny_folder: Path, tmp_path: Path, loader: str, alpha: float
) -> None:
    policy = _policy(tiny, alpha)
    assert policy.config is not None
    if loader == "diffusers":
        tiny.save_lora(tmp_path, policy.adapter_state(), policy.config)
        vanilla = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
        vanilla.load_lora_weights(tmp_path)
        other = vanilla.transformer
    else:
        save_peft(tmp_path, policy.adapter_state(), policy.config)
        other = PeftModel.from_pretrained(SD3.load(tiny_folder).denoiser, str(tmp_path))
    context = tiny.encode(PROMPTS).tensors
    inputs = tiny.initial_noise([1, 2]), context["context"], context["pooled"], torch.tensor([500.0, 250.0])
    with torch.no_grad():
        ours, theirs = tiny.denoiser(*inputs).sample, other(*inputs).sample
        with policy.reference():
            without = tiny.denoiser(*inputs).sample
    assert torch.equal(ours, theirs) and not torch.allclose(ours, without)


def test_an_adapter_of_another_base_is_refused(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    policy = Policy(tiny.denoiser, Lora(rank=4))
    tiny.save_lora(tmp_path, policy.adapter_state(), policy.config)
    other = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.transformer.proj_out.weight.add_(1.0)
    with pytest.raises(ValueError, match="was trained on another base checkpoint than this one"):
        SD3(other).load_lora(tmp_path)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", ValueError, r"has no model_index\.json: give the folder that save_pretrained wrote"),
        ("model.safetensors", ValueError, "is a file: give the diffusers folder"),
        ("no/such/folder/here", FileNotFoundError, r"is neither a folder nor a Hub id \(owner/name\)"),
    ],
)
def test_wrong_paths_are_refused(tmp_path: Path, path: str, error: type[Exception], message: str) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(error, match=message):
        SD3.load(tmp_path / path)


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
