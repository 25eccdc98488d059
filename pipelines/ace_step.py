"""ACE-Step 1.5: music by flow matching, from a caption, without lyrics or a reference recording."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers import AceStepPipeline
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipelines.audio_base import AudioPipeline
from pipelines.flows import FlowPipeline, by_text_length, shifted


class AceStep(AudioPipeline, FlowPipeline):
    """An ``AceStepPipeline`` at its own defaults: text to music, shift 3, English, no lyrics.

    ``max_sequence_length`` is the number of the caption's tokens. The network has no mask for its text; so each prompt
    is encoded alone, and only samples with equally long texts go through the network together: a sample is the same
    alone and in any batch, where diffusers pads the texts. Guidance has no momentum over steps, unlike in diffusers,
    since a step's density must depend on its state alone.
    """

    kind = AceStepPipeline
    takes_users = False
    encoders = ("text_encoder", "condition_encoder")
    sampling_encoders = ("condition_encoder",)  # it has what guidance leads away from
    default_seconds = 60.0
    text_tokens = 256
    shift = 3.0
    takes_negative = False

    @property
    def guidance_default(self) -> float:
        """The guidance scale of diffusers' pipeline, or none for a turbo checkpoint."""
        return 1.0 if self.pipe.is_turbo else 7.0

    @property
    def latent_channels(self) -> int:
        """The number C of channels of the latents; the network takes three times as many."""
        return int(self.denoiser.config.audio_acoustic_hidden_dim)

    @property
    def frames(self) -> int:
        """The number of latent frames of ``seconds``, rounded up."""
        return math.ceil(self.seconds * float(self.pipe.latents_per_second))

    def default_sigmas(self, num_steps: int) -> list[float]:
        """Return T sigmas at equal distances from 1, shifted."""
        sigmas: list[float] = shifted(torch.linspace(1, 0, num_steps + 1)[:-1], self.shift).tolist()
        return sigmas

    def require_guidance(self, guidance: float) -> None:
        """Raise ValueError for guidance of a turbo checkpoint."""
        if guidance > 1 and self.pipe.is_turbo:
            raise ValueError(f"guidance is distilled into this turbo model: set sampling.guidance to 1, not {guidance}")

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for the caption's tokens and the token of timbre; the few of the empty lyrics are left out."""
        context = self.zeros(count, self.max_sequence_length + 1, self.pipe.condition_encoder.config.hidden_size)
        return {"context": context, "mask": torch.ones(context.shape[:2], dtype=torch.long)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts one by one (P, tokens, d), with masks (P, tokens) that are 0 after a text's end.

        Each is encoded with empty lyrics, and with silence in place of a reference recording.
        """
        contexts, masks = [], []
        reference_frames = math.ceil(30.0 * float(self.pipe.latents_per_second))  # of 30 s
        for text in texts:
            caption, caption_mask, lyrics, lyrics_mask = self.pipe.encode_prompt(
                text, "", self.device, audio_duration=self.seconds, max_text_length=self.max_sequence_length
            )
            timbre = self._silence(reference_frames, caption)
            first = torch.zeros(1, dtype=torch.long, device=self.device)
            context, mask = self.pipe.condition_encoder(caption, caption_mask, lyrics, lyrics_mask, timbre, first)
            contexts.append(context[0])
            masks.append(mask[0].long())
        return {"context": pad_sequence(contexts, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}

    def unconditional_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the conditioning with the checkpoint's null embedding for every token."""
        null = self.pipe.condition_encoder.null_condition_emb.detach().to(tensors["context"])
        return {**tensors, "context": null.expand_as(tensors["context"])}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity (B, C, frames), by one call for all samples with texts of one length."""

        def predict(rows: Tensor, length: int) -> Tensor:
            silence = self._silence(self.frames, x).expand(len(rows), -1, -1)
            velocity = self.call_denoiser(
                hidden_states=x[rows].transpose(1, 2),
                timestep=timestep[rows].to(x.dtype),
                timestep_r=timestep[rows].to(x.dtype),
                encoder_hidden_states=tensors["context"][rows, :length],
                context_latents=torch.cat([silence, torch.ones_like(silence)], dim=-1),  # ones: generate all of it
            )
            return velocity.transpose(1, 2)

        return by_text_length(self.denoiser, tensors["mask"], x.device, predict)

    def apply_guidance(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Apply adaptive projected guidance (arXiv 2410.02416) with ACE-Step's settings, without momentum.

        The difference of the predictions has a norm of at most 2.5 in each channel, and loses its part parallel to the
        conditional prediction.
        """
        guided: Tensor = normalized_guidance(
            conditional,
            unconditional,
            guidance - 1,
            eta=0.0,
            norm_threshold=2.5,
            use_original_formulation=True,
            norm_dim=2,
        )
        return guided

    def postprocess(self, decoded: Tensor) -> Tensor:
        """Normalize the loudness of waveforms."""
        return normalize_peak(decoded)

    def _silence(self, frames: int, like: Tensor) -> Tensor:
        """Return latents (1, frames, C) of silence, with the device and dtype of ``like``."""
        silence: Tensor = self.pipe.prepare_src_latents(like.device, like.dtype, latent_length=frames)[0]
        return silence


def normalize_peak(waveforms: Tensor) -> Tensor:
    """Scale waveforms (B, channels, L) to a peak of -1 dB each."""
    peak = waveforms.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    return waveforms * (10 ** (-1 / 20) / peak)
