"""Stable Audio Open: a transformer on the frames of a waveform's latents, told how long the clip is."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CosineDPMSolverMultistepScheduler, StableAudioPipeline
from diffusers.models.attention_processor import Attention, StableAudioAttnProcessor2_0
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from peft import LoraConfig
from torch import Tensor

from genalign.diffusion.lora import save_peft
from genalign.diffusion.paths import EDMPath, expand
from genalign.runtime.cpu import plain_attention
from genalign.types import Conditioning, Grid, NoiseLevel
from pipelines.audio_base import AudioPipeline

_DURATION_TOKENS = 2  # where the clip begins and where it ends, beside the text's tokens


class StableAudio(AudioPipeline):
    """A ``StableAudioPipeline``. Latents are x = x0 + sigma eps with sigma up to 500; the network sees them at unit
    variance and is told atan(sigma) 2 / pi. It always makes as many frames as it was trained on, of which the first
    ``seconds`` are kept. Guidance leads away from no text at all, not from the empty one.

    The checkpoint's own sampler is of second order, along one Brownian path; here it is the first-order kernel
    ``DPMSDE`` on the same noise levels, whose steps have densities. Adapters are written as PEFT does it, since the
    pipeline of diffusers has no loader.
    """

    kind = StableAudioPipeline
    first_order = CosineDPMSolverMultistepScheduler
    encoders = ("text_encoder", "projection_model")

    @property
    def path(self) -> EDMPath:
        """By the scheduler's sigma_data and prediction type."""
        config = self.pipe.scheduler.config
        return EDMPath(config.sigma_data, config.prediction_type)

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """The scheduler's grid, or exactly the given T ``sigmas``, from its sigma_max, and a final 0."""
        scheduler: Any = CosineDPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        if sigmas is None:
            scheduler.set_timesteps(num_steps)
            sigma = scheduler.sigmas.double()
            return Grid(scheduler.timesteps.double(), torch.ones_like(sigma), sigma)
        if not math.isclose(sigmas[0], largest := scheduler.config.sigma_max, rel_tol=1e-5):
            raise ValueError(f"sampling.sigmas must begin at this model's sigma_max, {largest}, not {sigmas[0]}")
        sigma = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
        return Grid(_told(sigma[:-1]), torch.ones_like(sigma), sigma)

    def level(self, u: Tensor) -> NoiseLevel:
        """What the network is told, evenly between the scheduler's sigma_min (u = 0) and sigma_max (u = 1)."""
        config = self.pipe.scheduler.config
        low, high = (_told(torch.tensor(sigma, dtype=torch.float64)) for sigma in (config.sigma_min, config.sigma_max))
        timestep = low.to(u.device) + (high - low).to(u.device) * u.double()
        sigma = (timestep * math.pi / 2).tan()
        return NoiseLevel(timestep, torch.ones_like(sigma), sigma)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """As every family, at the scheduler's sigma_max."""
        return super().initial_noise(seeds) * float(self.pipe.scheduler.init_noise_sigma)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """As every family; the network sees x / sqrt(sigma^2 + sigma_data^2)."""
        deviation = torch.hypot(level.sigma, torch.full_like(level.sigma, self.path.sigma_data))
        return super().predict(x * expand(1 / deviation, x), level, conditioning, guidance)

    def save_lora(self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
        """Write an adapter as PEFT expects it."""
        save_peft(directory, state, config)
        self._save_base(directory)

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """The text's tokens and those of the duration."""
        tokens = self.max_sequence_length + _DURATION_TOKENS
        context = self.zeros(count, tokens, self._config.cross_attention_input_dim)
        return {"context": context, "seconds": self.zeros(count, 1, self._config.global_states_input_dim)}

    @property
    def frames(self) -> int:
        """As many as the network was trained on."""
        return int(self._config.sample_size)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(channels, L) of what is kept of a waveform."""
        channels, length = super().sample_shape
        return channels, min(length, int(self.seconds * self.sample_rate))

    def _native_seconds(self) -> float:
        return self._longest_seconds()

    def _longest_seconds(self) -> float:
        return self.frames * self._hop / self.sample_rate

    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        text = self.pipe.encode_prompt(texts, self.device, do_classifier_free_guidance=False)
        begin, end = self.pipe.encode_duration(0.0, self.seconds, self.device, False, len(texts))
        return {"context": torch.cat([text, begin, end], dim=1), "seconds": torch.cat([begin, end], dim=2)}

    def _away(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**tensors, "context": torch.zeros_like(tensors["context"])}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        places = get_1d_rotary_pos_embed(
            self.pipe.rotary_embed_dim, self.frames + 1, use_real=True, repeat_interleave_real=False
        )
        output: Tensor = self.denoiser(
            x,
            timestep,
            encoder_hidden_states=tensors["context"],
            global_hidden_states=tensors["seconds"],
            rotary_embedding=places,
            return_dict=False,
        )[0]
        return output

    def _postprocess(self, decoded: Tensor) -> Tensor:
        return decoded[..., : self.sample_shape[1]].clamp(-1, 1)

    def _prepare(self) -> None:
        super()._prepare()
        for module in self.denoiser.modules():
            if isinstance(module, Attention) and isinstance(module.processor, StableAudioAttnProcessor2_0):
                module.set_processor(_Attention(module.processor))

    def _load_published(self, source: str | Path) -> None:
        raise ValueError(
            f"{source} is no adapter that PEFT wrote, and diffusers has no loader for this family: give the lora/"
            " folder of a run, with adapter_config.json and adapter_model.safetensors"
        )


class _Attention:
    """By the plain kernel on a CPU, and again so where gradient checkpointing computes it a second time."""

    def __init__(self, processor: StableAudioAttnProcessor2_0) -> None:
        self._processor = processor

    @functools.wraps(StableAudioAttnProcessor2_0.__call__)  # diffusers hands over only what the signature names
    def __call__(self, attention: Attention, hidden_states: Tensor, *inputs: Any, **named: Any) -> Tensor:
        with plain_attention(hidden_states.device):
            output: Tensor = self._processor(attention, hidden_states, *inputs, **named)
        return output


def _told(sigma: Tensor) -> Tensor:
    """What the network is told of a noise level."""
    return sigma.atan() * 2 / math.pi
