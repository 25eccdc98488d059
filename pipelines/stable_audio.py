"""Stable Audio Open: a transformer on the frames of a waveform's latents, conditioned on text and duration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import StableAudioPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from pipelines.audio_base import AudioPipeline
from pipelines.noise_schedules import CosineSchedule, ScheduledPipeline


class StableAudio(AudioPipeline, ScheduledPipeline):
    """A ``StableAudioPipeline``.

    Latents are x = x0 + sigma eps with sigma up to 500. The network takes them at unit variance, with the timestep
    atan(sigma) 2 / pi, and generates as many frames as it was trained on; decoding cuts them to ``seconds``. Guidance
    leads away from the negative prompt, and without one from conditioning of zeros, not from the empty prompt.

    The checkpoint's own sampler is of second order, along one Brownian path. Genalign samples by the first-order kernel
    ``DPMSDE`` at the same noise levels, whose steps have densities. Adapters are in the format of PEFT, since the
    pipeline of diffusers has no loader.
    """

    kind = StableAudioPipeline
    guidance_default = 7.0
    encoders = ("text_encoder", "projection_model")
    lora_in_diffusers = False

    @property
    def schedule(self) -> CosineSchedule:
        """The noise schedule of the checkpoint's scheduler."""
        return CosineSchedule(self.pipe.scheduler)

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
        """Return the conditioning of the negative prompt, or else with zeros for the tokens of text and duration."""
        if self.unconditional is not None:
            return super().unconditional_tensors(tensors)
        return {**tensors, "context": torch.zeros_like(tensors["context"])}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict v (B, C, frames) from scaled latents."""
        positions = torch.arange(self.frames + 1, device=x.device)
        rotary = get_1d_rotary_pos_embed(
            self.pipe.rotary_embed_dim, positions, use_real=True, repeat_interleave_real=False
        )
        return self.call_denoiser(
            x,
            timestep,
            encoder_hidden_states=tensors["context"],
            global_hidden_states=tensors["seconds"],
            rotary_embedding=rotary,
        )

    def postprocess(self, decoded: Tensor) -> Tensor:
        """Cut waveforms to ``seconds``, and clip them to [-1, 1]."""
        return decoded[..., : self.sample_shape[1]].clamp(-1, 1)
