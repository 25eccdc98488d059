"""The embedded checkpoints, opened by the libraries they are made for."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import StableAudioPipeline, StableDiffusion3Pipeline
from transformers import ClapModel

from genalign import assets
from genalign.diffusion.rollout import generate
from genalign.prompts import drawn_in_turn
from genalign.worlds import shapes, tones
from genalign.worlds.shapes.verifier import detect
from pipelines import SD3, StableAudio
from rewards.tones import TonesReward
from scripts.pretrain.shapes_clip import retrieval
from scripts.pretrain.shapes_dataset import captioned_scenes
from scripts.pretrain.tones_audio import retrieval as tones_retrieval
from scripts.pretrain.tones_dataset import captioned_clips

EVEN = [1 - i / 10 for i in range(10)]
SIGMAS = [3 * sigma / (1 + 2 * sigma) for sigma in EVEN]  # as the scheduler of shapes-sd3 shifts them


def test_vanilla_diffusers_draws_our_images() -> None:
    folder = assets.resolve("shapes-sd3")
    pipeline, vanilla = SD3.load(folder), StableDiffusion3Pipeline.from_pretrained(folder)
    vanilla.set_progress_bar_config(disable=True)
    prompts = [prompt.text for prompt in shapes.prompts("comp").prompts[::40]]
    seeds = list(range(len(prompts)))
    ours = next(generate(pipeline, prompts, seeds, pipeline.grid(10, SIGMAS), 1.0, len(prompts)))
    theirs = vanilla(
        prompts,
        latents=pipeline.initial_noise(seeds),
        sigmas=EVEN,
        num_inference_steps=10,
        guidance_scale=1.0,
        max_sequence_length=pipeline.max_sequence_length,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    found = [item for image in detect(ours) for item in image if item.shape != "unknown"]
    assert sum(item.iou for item in found) / len(found) >= 0.8


def test_shapes_clip_finds_the_caption() -> None:
    name = f"local-dir:{assets.resolve('shapes-clip')}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    assert retrieval(model.eval(), captioned_scenes(1000, seed=77), open_clip.get_tokenizer(name)) >= 0.8


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")  # diffusers' Oobleck
@pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # its scheduler rounds its noise levels to float32
def test_vanilla_diffusers_plays_what_was_asked_for() -> None:
    vanilla = StableAudioPipeline.from_pretrained(assets.resolve("tones-audio"))
    vanilla.set_progress_bar_config(disable=True)
    prompts = drawn_in_turn(tones.prompts("iid"), 28, seed=0)
    generator = torch.Generator().manual_seed(0)
    told = {"num_inference_steps": 25, "guidance_scale": 1.0, "generator": generator}
    waves = vanilla([prompt.text for prompt in prompts], **told).audios
    assert 0.2 <= TonesReward("strict")(waves.float(), prompts).mean() <= 0.7


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")  # diffusers' Oobleck
@torch.no_grad()
def test_the_tones_denoiser_reads_the_order_of_words() -> None:
    """From much noise, a model that ignores the order of words predicts as well from swapped events."""
    pipeline, data = StableAudio.load(assets.resolve("tones-audio")), captioned_clips(600, seed=78)
    rows = [i for i, prompt in enumerate(data.prompts) if prompt.task == "attribution"][:96]
    right = [data.prompts[i].text for i in rows]
    swapped = [" then ".join(reversed(text.split(" then "))) for text in right]  # articles go with their events
    latents = pipeline.encode_samples(data.floats(torch.tensor(rows)))
    level = pipeline.grid(2, [30.0, 6.0])[1]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = pipeline.path.add_noise(latents, noise, level)

    def error(texts: list[str]) -> float:
        predicted = pipeline.predict(noisy, level, pipeline.encode(texts), guidance=1.0)
        return float((pipeline.path.x0(noisy, predicted, level) - latents).square().mean())

    assert error(swapped) >= 1.1 * error(right)


def test_tones_clap_finds_the_caption() -> None:
    model = ClapModel.from_pretrained(assets.resolve("tones-clap"), dtype=torch.float32).eval()
    assert tones_retrieval(model, captioned_clips(1000, seed=77)) >= 0.8


def test_folders_are_small() -> None:
    for name, limit in (("shapes-sd3", 15e6), ("shapes-clip", 15e6), ("tones-audio", 20e6), ("tones-clap", 20e6)):
        assert sum(path.stat().st_size for path in Path(assets.resolve(name)).rglob("*") if path.is_file()) <= limit
