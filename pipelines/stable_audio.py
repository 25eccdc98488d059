"""Stable Audio Open: a transformer on the frames of a waveform's latents, conditioned on text and duration."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from diffusers import CosineDPMSolverMultistepScheduler, DiffusionPipeline, StableAudioPipeline
from diffusers.models.attention_processor import Attention, StableAudioAttnProcessor2_0
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from genalign.diffusion.paths import EDMPath, expand
from genalign.runtime.cpu import plain_attention
from genalign.types import Conditioning, Grid, NoiseLevel
from pipelines.audio_base import AudioPipeline
from pipelines.base import Options
from pipelines.steering.scheduler_hooks import grid_of


class StableAudio(AudioPipeline):
    """A ``StableAudioPipeline``.

    Latents are x = x0 + sigma eps with sigma up to 500. The network takes them at unit variance, with the timestep
    atan(sigma) 2 / pi, and generates as many frames as it was trained on; decoding cuts them to ``seconds``. Guidance
    leads away from conditioning of zeros, not from the empty prompt.

    The checkpoint's own sampler is of second order, along one Brownian path. Genalign samples by the first-order kernel
    ``DPMSDE`` at the same noise levels, whose steps have densities. Adapters are in the format of PEFT, since the
    pipeline of diffusers has no loader.
    """

    kind = StableAudioPipeline
    first_order = CosineDPMSolverMultistepScheduler
    encoders = ("text_encoder", "projection_model")
    lora_in_diffusers = False

    def __init__(self, pipe: DiffusionPipeline, **options: Unpack[Options]) -> None:
        super().__init__(pipe, **options)
        for module in self.denoiser.modules():
            if isinstance(module, Attention) and isinstance(module.processor, StableAudioAttnProcessor2_0):
                module.set_processor(_PlainAttention(module.processor))

    @property
    def path(self) -> EDMPath:
        """The EDM path, with sigma_data and the prediction type of the checkpoint's scheduler."""
        config = self.pipe.scheduler.config
        return EDMPath(config.sigma_data, config.prediction_type)

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the scheduler's grid, or the grid of exactly T ``sigmas``, from its sigma_max, and a final 0."""
        scheduler: Any = CosineDPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        if sigmas is None:
            scheduler.set_timesteps(num_steps)
            return grid_of(scheduler)
        if not math.isclose(sigmas[0], largest := scheduler.config.sigma_max, rel_tol=1e-5):
            raise ValueError(f"sampling.sigmas must begin at this model's sigma_max, {largest}, not {sigmas[0]}")
        sigma = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
        return Grid(_timestep(sigma[:-1]), torch.ones_like(sigma), sigma)

    def level(self, u: Tensor) -> NoiseLevel:
        """Return noise levels at timesteps linear in u (B,), from the scheduler's sigma_min (u = 0) to sigma_max."""
        config = self.pipe.scheduler.config
        low, high = _timestep(torch.tensor([config.sigma_min, config.sigma_max], dtype=torch.float64)).to(u.device)
        timestep = low + (high - low) * u.double()
        sigma = (timestep * math.pi / 2).tan()
        return NoiseLevel(timestep, torch.ones_like(sigma), sigma)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Draw latents (B, C, frames) at the scheduler's sigma_max."""
        return super().initial_noise(seeds) * float(self.pipe.scheduler.init_noise_sigma)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """Predict from latents (B, C, frames), which the network takes divided by sqrt(sigma^2 + sigma_data^2)."""
        deviation = torch.hypot(level.sigma, torch.full_like(level.sigma, self.path.sigma_data))
        return super().predict(x * expand(1 / deviation, x), level, conditioning, guidance)

    @property
    def frames(self) -> int:
        """The number of latent frames that the network was trained on."""
        return int(self.denoiser.config.sample_size)

    @property
    def max_seconds(self) -> float:
        """The duration in seconds of all frames."""
        return self.frames * int(self.pipe.vae.hop_length) / self.sample_rate

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape (channels, L) of a waveform that is cut to ``seconds``."""
        channels, length = super().sample_shape
        return channels, min(length, int(self.seconds * self.sample_rate))

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for the tokens of the text and of the duration."""
        tokens = self.max_sequence_length + 2  # the beginning and the end of the clip
        context = self.zeros(count, tokens, self.denoiser.config.cross_attention_input_dim)
        return {"context": context, "seconds": self.zeros(count, 1, self.denoiser.config.global_states_input_dim)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts and the duration (P, tokens, d), and the duration alone (P, 1, 2 d)."""
        text = self.pipe.encode_prompt(texts, self.device, do_classifier_free_guidance=False)
        begin, end = self.pipe.encode_duration(0.0, self.seconds, self.device, False, len(texts))
        return {"context": torch.cat([text, begin, end], dim=1), "seconds": torch.cat([begin, end], dim=2)}

    def unconditional_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the conditioning with zeros for the tokens of text and duration."""
        return {**tensors, "context": torch.zeros_like(tensors["context"])}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict v (B, C, frames) from scaled latents."""
        positions = get_1d_rotary_pos_embed(
            self.pipe.rotary_embed_dim, self.frames + 1, use_real=True, repeat_interleave_real=False
        )
        return self.call_denoiser(
            x,
            timestep,
            encoder_hidden_states=tensors["context"],
            global_hidden_states=tensors["seconds"],
            rotary_embedding=positions,
        )

    def postprocess(self, decoded: Tensor) -> Tensor:
        """Cut waveforms to ``seconds``, and clip them to [-1, 1]."""
        return decoded[..., : self.sample_shape[1]].clamp(-1, 1)


class _PlainAttention:
    """Attention by the plain kernel on a CPU, also where gradient checkpointing computes it a second time."""

    def __init__(self, processor: StableAudioAttnProcessor2_0) -> None:
        self._processor = processor

    @functools.wraps(StableAudioAttnProcessor2_0.__call__)  # diffusers passes only arguments that the signature names
    def __call__(self, attention: Attention, hidden_states: Tensor, *inputs: Any, **named: Any) -> Tensor:
        with plain_attention(hidden_states.device):
            output: Tensor = self._processor(attention, hidden_states, *inputs, **named)
        return output


def _timestep(sigma: Tensor) -> Tensor:
    """Convert noise levels to the network's timesteps, in [0, 1]."""
    return sigma.atan() * 2 / math.pi
