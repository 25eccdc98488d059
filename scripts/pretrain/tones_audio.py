"""Train the embedded audio models from nothing: a ``StableAudioPipeline`` folder and a CLAP of ``transformers``.

    python scripts/pretrain/tones_audio.py autoencoder
    python scripts/pretrain/tones_audio.py denoiser     # needs the autoencoder; writes genalign/assets/tones-audio
    python scripts/pretrain/tones_audio.py clap         # writes genalign/assets/tones-clap

Every stage is seeded and resumes from ``--work``; with ``--minutes`` it stops in time and the same command goes on. The
blocks of the denoiser are compiled, which needs a C++ compiler on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderOobleck, StableAudioPipeline
from torch import Tensor
from transformers import ClapModel

import pipelines
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.transitions import DPMSDE, ODE, Kernel
from genalign.runtime.cpu import retain_freed_memory
from genalign.runtime.files import load_state, save_state, without_prefix, write_text
from genalign.worlds.tones import prompts
from genalign.worlds.tones.instruments import LENGTH
from genalign.worlds.tones.verifier import verify
from scripts.pretrain.captions import hidden_words, require_metadata
from scripts.pretrain.t5 import hide_words
from scripts.pretrain.tones_clap import assemble_clap, build_clap, log_mel, matrices
from scripts.pretrain.tones_dataset import CaptionedClips, captioned_clips, corrupted
from scripts.pretrain.tones_models import (
    HOP,
    T5_LENGTH,
    TonesTextToAudio,
    assemble,
    build_vae,
    scale_latents,
    tokenizer,
)
from scripts.pretrain.training_loop import Fit, OutOfTimeError, contrastive, fit

AUTOENCODER = Fit(steps=8000, learning_rate=1e-3)
AUTOENCODER_CLIPS, CROPS, CROP = 12_000, 16, 12 * HOP  # a step hears 16 crops of 0.24 s
WINDOWS = (64, 256, 1024)  # samples, of the spectral loss
AUDIBLE = 1e-3  # amplitude below which the spectral loss does not listen: -60 dB
KL_WEIGHT = 3e-3
DENOISER = Fit(steps=20_000, learning_rate=2e-3, muon=0.03, t5=5e-4, cycles=2)
TIME_LOGIT = (1.2, 1.2)  # mean and deviation of logit(t): words decide what is heard at t from 0.7 to 0.96
DENOISER_CLIPS, BATCH = 24_000, 64
CORRUPTED = (0.1, 0.2)  # the share of wrong captions, by cycle: it learns to play, and then to misread
HIDDEN = (0.2, 0.6)  # the share of captions with hidden words, by cycle: it learns to play, and then new compositions
CLAP = Fit(steps=1500, learning_rate=1e-3, muon=0.02)
CLAP_CLIPS, CLAP_BATCH = 20_000, 128
STEPS, PER_TASK = 50, 96  # of the measurement

MakesClips = Callable[[Sequence[str], int], Tensor]  # (B, 1, L) of B texts, by a seed


def spectral_loss(output: Tensor, true: Tensor) -> Tensor:
    """Compute spectral convergence and log-magnitude L1 of waveforms (B, 1, L), over three resolutions.

    Magnitudes are relative to a full-scale sine. See Yamamoto et al., Parallel WaveGAN, arXiv:1910.11480, eq. 4-6.
    """
    total = output.new_zeros(())
    for size in WINDOWS:
        window = torch.hann_window(size, device=output.device)
        a, b = (
            torch.stft(wave[:, 0], size, size // 4, window=window, return_complex=True).abs() * (4 / size)
            for wave in (output, true)
        )
        convergence = (a - b).norm() / b.norm().clamp(min=AUDIBLE)
        total = total + convergence + ((a + AUDIBLE).log() - (b + AUDIBLE).log()).abs().mean()
    return total / len(WINDOWS)


def crops(data: CaptionedClips, generator: torch.Generator) -> Tensor:
    """Random pieces (16, 1, 1920) of random clips: the layers are local, so whole clips teach them no more."""
    index = torch.randint(len(data.waveforms), (CROPS,), generator=generator)
    starts = torch.randint(LENGTH - CROP + 1, (CROPS, 1, 1), generator=generator)
    return data.floats(index).gather(2, starts + torch.arange(CROP))


def train_autoencoder(work: Path, settings: Fit, device: str) -> AutoencoderOobleck:
    """L1, the spectral loss, and a little KL. Float32: on a CPU bfloat16 makes these convolutions slower."""
    torch.manual_seed(0)
    vae = build_vae().to(device)
    data = captioned_clips(AUTOENCODER_CLIPS, seed=20)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        waves = crops(data, generator).to(device)
        posterior = vae.encode(waves).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return spectral_loss(output, waves) + 10 * (output - waves).abs().mean() + KL_WEIGHT * kl

    fit(vae, loss, settings, work / "autoencoder.safetensors")
    return vae.eval()


def trained_autoencoder(work: Path, folder: Path | None) -> AutoencoderOobleck:
    """The autoencoder of a ``folder``, or the averaged weights of its stage, as far as it has come."""
    vae = build_vae()
    if folder is not None:
        trained = AutoencoderOobleck.from_pretrained(folder, torch_dtype=torch.float32)
        vae.load_state_dict(trained.state_dict())  # not returned itself, as it would save the folder's path
        return vae.eval()
    state = work / "autoencoder.safetensors"
    if not state.exists():
        raise SystemExit(f"there is no {state}: run the stage autoencoder first")
    vae.load_state_dict(without_prefix("average.", load_state(state)[0]))
    return vae.eval()


@torch.no_grad()
def reconstruction(vae: AutoencoderOobleck, device: str, clips: int = 300) -> float:
    """The share of new clips that the verifier accepts after the autoencoder."""
    data = captioned_clips(clips, seed=21)
    waves = data.floats(torch.arange(clips)).split(50)
    output = torch.cat([vae.decode(vae.encode(part.to(device)).latent_dist.mode()).sample.cpu() for part in waves])
    return strict(output, [require_metadata(prompt) for prompt in data.prompts])


def strict(waves: Tensor, metadata: Sequence[object]) -> float:
    """The share of clips that are strictly right."""
    return float(np.mean([verification.strict for verification in verify(waves, metadata)]))


@torch.no_grad()
def encode_latents(vae: AutoencoderOobleck, data: CaptionedClips, file: Path, device: str) -> Tensor:
    """Posterior means (N, 8, 75), each channel of mean square one, by a scale that this folds into ``vae``."""
    if not file.exists():
        parts = torch.arange(len(data.waveforms)).split(25)
        means = torch.cat([vae.encode(data.floats(part).to(device)).latent_dist.mode().cpu() for part in parts])
        save_state(file, {"means": means}, {})
    latents = load_state(file)[0]["means"]
    scale = latents.square().mean((0, 2)).rsqrt()
    scale_latents(vae, scale.to(device))
    return latents * scale.view(1, -1, 1)


def train_denoiser(latents: Tensor, data: CaptionedClips, work: Path, settings: Fit, device: str) -> TonesTextToAudio:
    """v-prediction at logit-normal t; some captions are wrong, some words hidden, a tenth is withheld."""
    torch.manual_seed(1)
    model = TonesTextToAudio().to(device)
    tokens = [model.tokens(captions(data, share)) for share in CORRUPTED]

    def loss(step: int) -> Tensor:
        cycle = step // settings.length
        ids, mask = tokens[cycle]
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        hidden = hidden_words(BATCH, T5_LENGTH, generator, HIDDEN[cycle])
        words = hide_words(ids[index], hidden, model.tokenizer)
        x0 = latents[index]
        eps = torch.randn(x0.shape, generator=generator)
        time = torch.sigmoid(TIME_LOGIT[0] + TIME_LOGIT[1] * torch.randn(BATCH, generator=generator))
        angle = (torch.pi / 2 * time).view(-1, 1, 1)
        keep = torch.rand(BATCH, generator=generator) >= 0.1
        z, target = angle.cos() * x0 + angle.sin() * eps, angle.cos() * eps - angle.sin() * x0
        inputs = (tensor.to(device) for tensor in (z, time, words, mask[index], keep))
        with torch.autocast(device, torch.bfloat16):
            velocity = model(*inputs)
        return (velocity.float() - target.to(device)).square().mean()

    for block in model.transformer.transformer_blocks:
        block.compile()
    fit(model, loss, settings, work / "denoiser.safetensors", model.matrices())
    return model.eval()


def captions(data: CaptionedClips, wrong: float) -> list[str]:
    """A text for every clip; a share that is ``wrong`` was drawn to be corrupted."""
    rng = np.random.default_rng(2)
    return [(corrupted(prompt, rng) if rng.random() < wrong else prompt).text for prompt in data.prompts]


def own_sampler(folder: Path, guidance: float, device: str) -> MakesClips:
    """The pipeline's own sampler, of second order."""
    pipeline = StableAudioPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def make(texts: Sequence[str], seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        output = pipeline(list(texts), num_inference_steps=STEPS, guidance_scale=guidance, generator=generator)
        return output.audios.float().cpu()

    return make


def first_order_sampler(folder: Path, steps: int, kernel: Kernel, device: str) -> MakesClips:
    """What genalign trains and evaluates with, on the grid of ``steps``."""
    pipeline = pipelines.load(folder, device=device)
    grid = pipeline.grid(steps)

    @torch.no_grad()
    def make(texts: Sequence[str], seed: int) -> Tensor:
        seeds = tuple(derived_seed(seed, row) for row in range(len(texts)))
        start = RolloutInputs(pipeline.encode(list(texts)), torch.arange(len(texts)), seeds, seeds)
        return pipeline.decode(rollout(pipeline, start, grid, [kernel] * steps, guidance=1.0).final)

    return make


def measure(suite: str, make: MakesClips) -> dict[str, float]:
    """Strict accuracy per task, each on noises of its own, and their mean."""
    figures = {}
    for seed, (task, group) in enumerate(prompts(suite).by_task().items()):
        drawn = [group[i] for i in np.random.default_rng(3).integers(len(group), size=PER_TASK)]
        figures[task] = strict(
            make([prompt.text for prompt in drawn], seed), [require_metadata(prompt) for prompt in drawn]
        )
    return figures | {"overall": float(np.mean(list(figures.values())))}


def measured(folder: Path, device: str) -> Iterator[str]:
    """The lines of the card's table."""
    own, guided = (own_sampler(folder, guidance, device) for guidance in (1.0, 3.0))
    sde = first_order_sampler(folder, STEPS, DPMSDE(), device)
    ode = first_order_sampler(folder, STEPS // 2, ODE(), device)
    suites = ("iid", "comp", "len")
    runs = [(suite, f"its own, {STEPS} steps", own) for suite in suites]
    runs.append(("iid", f"its own, {STEPS} steps, guidance 3", guided))
    runs += [(suite, f"first-order SDE, {STEPS} steps", sde) for suite in suites]
    runs += [(suite, f"first-order ODE, {STEPS // 2} steps", ode) for suite in suites]
    for suite, sampler, make in runs:
        for task, value in measure(suite, make).items():
            yield f"| {suite} | {sampler} | {task} | {value:.3f} |"


def train_clap(data: CaptionedClips, work: Path, settings: Fit, device: str) -> ClapModel:
    """The symmetric contrastive loss on honest captions, with noise of -80 to -30 dB under the clips."""
    torch.manual_seed(5)
    model = build_clap().to(device)
    words = tokenizer()([prompt.text for prompt in data.prompts], padding="max_length", return_tensors="pt")
    _, caption = words.input_ids.unique(dim=0, return_inverse=True)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(caption), (CLAP_BATCH,), generator=generator)
        waves = data.floats(index)
        level = 10 ** (-(1.5 + 2.5 * torch.rand(CLAP_BATCH, 1, 1, generator=generator)))
        mel = log_mel((waves + level * torch.randn(waves.shape, generator=generator)).to(device))
        inputs = {
            "input_ids": words.input_ids[index].to(device),
            "attention_mask": words.attention_mask[index].to(device),
        }
        with torch.autocast(device, torch.bfloat16):
            output = model(input_features=mel, **inputs)
        return contrastive(output.logits_per_audio.float(), output.logits_per_text.float(), caption[index].to(device))

    fit(model, loss, settings, work / "clap.safetensors", matrices(model))
    return model.eval().cpu()


@torch.no_grad()
def retrieval(model: ClapModel, data: CaptionedClips) -> float:
    """The share of clips whose caption ranks first among 64 distinct captions, in batches of new clips."""
    first = {prompt.text: i for i, prompt in reversed(list(enumerate(data.prompts)))}
    rows, words = list(first.values()), tokenizer()
    hits = []
    for begin in range(0, len(rows) - 63, 64):
        drawn = rows[begin : begin + 64]
        inputs = words([data.prompts[i].text for i in drawn], padding="max_length", return_tensors="pt")
        output = model(input_features=log_mel(data.floats(torch.tensor(drawn))), **inputs)
        hits.append((output.logits_per_audio.argmax(1) == torch.arange(64)).float().mean())
    return float(torch.stack(hits).mean())


def autoencoder_stage(options: argparse.Namespace) -> None:
    """Train the autoencoder and print the strict accuracy of its reconstructions."""
    vae = train_autoencoder(options.work, settings(AUTOENCODER, options), options.device)
    print(f"strict accuracy of reconstructions: {reconstruction(vae, options.device):.3f}")


def denoiser_stage(options: argparse.Namespace) -> None:
    """Train the denoiser on the autoencoder's latents and write the embedded audio model."""
    vae = trained_autoencoder(options.work, options.autoencoder).to(options.device)
    quality = reconstruction(vae, options.device)
    data = captioned_clips(DENOISER_CLIPS, seed=22)
    latents = encode_latents(vae, data, options.work / "latents.safetensors", options.device)
    model = train_denoiser(latents, data, options.work, settings(DENOISER, options), options.device)
    output = options.output or Path("genalign/assets/tones-audio")
    assemble(model.cpu(), vae.cpu(), output)
    table = "\n".join(measured(output, options.device))
    card = AUDIO_CARD.format(table=table, quality=quality, corrupted=CORRUPTED, steps=DENOISER.steps, count=PER_TASK)
    write_text(output / "README.md", card)
    print(table)


def clap_stage(options: argparse.Namespace) -> None:
    """Train the CLAP model and write its folder."""
    model = train_clap(captioned_clips(CLAP_CLIPS, seed=23), options.work, settings(CLAP, options), options.device)
    score = retrieval(model, captioned_clips(4000, seed=24))
    output = options.output or Path("genalign/assets/tones-clap")
    assemble_clap(model, output)
    write_text(output / "README.md", CLAP_CARD.format(score=score, clips=CLAP_CLIPS))
    print(f"clip-to-text retrieval among 64 distinct captions: {score:.3f}")


def settings(stage: Fit, options: argparse.Namespace) -> Fit:
    """Apply the options of the command line to the settings of a stage."""
    return replace(stage, steps=options.steps or stage.steps, minutes=options.minutes)


STAGES = {"autoencoder": autoencoder_stage, "denoiser": denoiser_stage, "clap": clap_stage}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage of pretraining that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain-tones"))
    parser.add_argument("--output", type=Path, help="the folder to write, where not the embedded one")
    parser.add_argument(
        "--autoencoder", type=Path, help="of the denoiser: a trained VAE's folder, in place of --work's"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="of the whole stage; the same again when it is resumed")
    parser.add_argument("--minutes", type=float, help="of training, before it stops for now")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        retain_freed_memory()  # for what stands around the fit, too
    try:
        STAGES[options.stage](options)
    except OutOfTimeError as error:
        print(error)


AUDIO_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-audio
---
# tones-audio

A small text-to-audio model of tones and noise bursts, 1.5 s at 8 kHz: an ordinary `StableAudioPipeline` folder, trained
from scratch by `scripts/pretrain/tones_audio.py` ({steps} steps of 64 clips). Of its training captions,
{corrupted[0]:.0%} in the first half of the training and {corrupted[1]:.0%} in the second were drawn to get a mistake
(notes swapped or replaced, relation or loudness reversed, count off by one; none where the result would be a held-out
composition), so that a reward has something to improve.

    from diffusers import StableAudioPipeline
    pipe = StableAudioPipeline.from_pretrained("tones-audio")
    pipe("a C5 organ tone then an A4 sine tone", num_inference_steps=50, guidance_scale=1.0).audios

Prompts are those of `genalign.worlds.tones`. Of new clips, {quality:.3f} are still strictly correct after the
autoencoder. Strict accuracy on {count} clips per task, by the pipeline's own second-order sampler, and by the
first-order samplers with which genalign trains (SDE) and evaluates (ODE):

| suite | sampler | task | value |
|---|---|---|---|
{table}

Made for experiments.
"""

CLAP_CARD = """---
license: apache-2.0
library_name: transformers
---
# tones-clap

A small CLAP of the tones world, trained from scratch by `scripts/pretrain/tones_audio.py clap` on {clips} rendered
clips with honest captions.

    model = ClapModel.from_pretrained("tones-clap", dtype=torch.float32)  # its file holds float16
    processor = ClapProcessor.from_pretrained("tones-clap")

`scripts.pretrain.tones_clap.log_mel` makes the same features, batched and differentiable. Clip-to-text retrieval among
64 distinct captions on new clips: {score:.3f}. No caption of its training named a held-out note, and no clip had a
held-out order. Made for experiments.
"""


if __name__ == "__main__":
    main()
