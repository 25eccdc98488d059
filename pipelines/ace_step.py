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
from pipelines.flows import FlowPipeline, shifted

_SECONDS = 60.0
_SHIFT = 3.0
_CAPTION_LENGTH = 256
_REFERENCE_SECONDS = 30.0
_LOUDEST = 10 ** (-1 / 20)  # -1 dB of full scale


class AceStep(AudioPipeline, FlowPipeline):
    """An ``AceStepPipeline`` at its own defaults: text to music, shift 3, English, no lyrics. ``max_sequence_length``
    is the number of the caption's tokens.

    The network has no mask for its text, so that each prompt is encoded alone and samples of equally long texts go
    through it together: a sample is the same alone and in any batch. diffusers pads a batch instead, and guides with a
    momentum over steps; here guidance has none, since a step's density must depend on its state alone.
    """

    kind = AceStepPipeline
    encoders = ("text_encoder", "condition_encoder")

    @property
    def latent_channels(self) -> int:
        """C of its latents; the network takes three times as many."""
        return int(self._config.audio_acoustic_hidden_dim)

    @property
    def frames(self) -> int:
        """Enough for the duration."""
        return self._frames(self.seconds)

    def require_guidance(self, guidance: float) -> None:
        """A turbo checkpoint takes none."""
        if guidance > 1 and self.pipe.is_turbo:
            raise ValueError(f"guidance is distilled into this turbo model: set sampling.guidance to 1, not {guidance}")

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """The caption's tokens and one of timbre; the few of the empty lyrics are left out."""
        context = self.zeros(count, self.max_sequence_length + 1, self.pipe.condition_encoder.config.hidden_size)
        return {"context": context, "mask": torch.ones(context.shape[:2], dtype=torch.long)}

    def _native_seconds(self) -> float:
        return _SECONDS

    def _default_max_tokens(self) -> int:
        return _CAPTION_LENGTH

    def _own_sigmas(self, num_steps: int) -> list[float] | None:
        sigmas: list[float] = shifted(torch.linspace(1, 0, num_steps + 1)[:-1], _SHIFT).tolist()
        return sigmas

    def _shift(self) -> float:
        return _SHIFT

    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        rows = [self._encoded_one(text) for text in texts]
        return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}

    def _encoded_one(self, text: str) -> dict[str, Tensor]:
        """(tokens, d) of the caption, of empty lyrics and of silence in place of a reference, and as many ones."""
        caption, caption_mask, lyrics, lyrics_mask = self.pipe.encode_prompt(
            text, "", self.device, audio_duration=self.seconds, max_text_length=self.max_sequence_length
        )
        timbre = self._silence(_REFERENCE_SECONDS, caption)
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        context, mask = self.pipe.condition_encoder(caption, caption_mask, lyrics, lyrics_mask, timbre, first)
        return {"context": context[0], "mask": mask[0].long()}

    def _silence(self, seconds: float, like: Tensor) -> Tensor:
        """Latents (1, frames, C) of silence, where and as ``like`` is."""
        silence: Tensor = self.pipe.prepare_src_latents(like.device, like.dtype, latent_length=self._frames(seconds))[0]
        return silence

    def _frames(self, seconds: float) -> int:
        return math.ceil(seconds * float(self.pipe.latents_per_second))

    def _away(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        nothing = self.pipe.condition_encoder.null_condition_emb.detach().to(tensors["context"])
        return {**tensors, "context": nothing.expand_as(tensors["context"])}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Samples whose texts have one length at a time."""
        lengths = tensors["mask"].sum(1)
        parts = {int(length): (lengths == length).nonzero()[:, 0].to(x.device) for length in torch.unique(lengths)}
        velocities = [
            self._velocity(x[rows], timestep[rows], tensors["context"][rows, :length]) for length, rows in parts.items()
        ]
        return torch.cat(velocities)[torch.cat([*parts.values()]).argsort()]

    def _velocity(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        silence = self._silence(self.seconds, x).expand(len(x), -1, -1)
        velocity: Tensor = self.denoiser(
            hidden_states=x.transpose(1, 2),
            timestep=timestep.to(x.dtype),
            timestep_r=timestep.to(x.dtype),
            encoder_hidden_states=context,
            context_latents=torch.cat([silence, torch.ones_like(silence)], dim=-1),  # ones: all of it is to be made
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2)

    def _guide(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Adaptive projected guidance (arXiv 2410.02416) with ACE-Step's settings, without momentum: the difference, at
        most 2.5 long in each channel, less what of it lies along the conditional prediction.
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

    def _postprocess(self, decoded: Tensor) -> Tensor:
        return at_one_loudness(decoded)


def at_one_loudness(waveforms: Tensor) -> Tensor:
    """Waveforms (B, channels, L) with a peak of -1 dB each."""
    peak = waveforms.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    return waveforms * (_LOUDEST / peak)
