"""Grids, encoding, noise and adapters of SD3; test_families compares it with diffusers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from genalign.diffusion.policy import Lora, Policy
from pipelines import SD3, text_embeddings

PROMPTS = ["a red circle", "an orange ring and a blue square"]


def test_the_grid_is_the_schedulers_or_the_explicit_sigmas(tiny: SD3) -> None:
    grid, scheduler = tiny.grid(10), tiny.pipe.scheduler
    scheduler.set_timesteps(10)
    torch.testing.assert_close(grid.sigma.float(), scheduler.sigmas)
    torch.testing.assert_close(grid.timestep.float(), scheduler.timesteps)
    last = 3 * 0.001 / (1 + 2 * 0.001)  # the scheduler shifts its last level, 0.001, by 3, and again the shifted one
    assert float(grid.sigma[-2]) == pytest.approx(3 * last / (1 + 2 * last), abs=1e-6)
    explicit = tiny.grid(4, [1.0, 0.75, 0.5, 0.25])
    assert explicit.sigma.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert explicit.timestep.tolist() == [1000, 750, 500, 250]


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
    monkeypatch.setattr(text_embeddings, "_CACHE_BYTES", 3 * sum(row[0].nbytes for row in first.tensors.values()))
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


def test_an_adapter_of_another_base_is_refused(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    policy = Policy(tiny.denoiser, Lora(rank=4))
    tiny.save_lora(tmp_path, policy.adapter_state(), policy.config)
    other = StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.transformer.proj_out.weight.add_(1.0)
    with pytest.raises(ValueError, match="was trained on another base checkpoint than this one"):
        SD3(other).load_lora(tmp_path)


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(ValueError, match="holds a DDPMPipeline, not a StableDiffusion3Pipeline"):
        SD3.load(tmp_path)


def test_guidance_leads_away_from_the_embedding_that_stands_for_its_text_now(tiny: SD3) -> None:
    """The last bits of an embedding differ by its batch: an evaluation's must not be left for training."""
    x, step = tiny.initial_noise([1]), tiny.grid(4)[0]
    with tiny.separate_encoding():
        other = tiny.encode(["a circle"])
        rows = tiny._embeddings._embeddings
        rows[""] = {name: tensor + 1 for name, tensor in rows[""].items()}
        tiny.predict(x, step, other, 3.0)
    own = tiny.encode(["a circle"])
    row = tiny.unconditional_tensors(own.tensors)
    assert all(torch.equal(tensor[0], tiny._embeddings._embeddings[""][name]) for name, tensor in row.items())
