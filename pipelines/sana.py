"""Sana: a linear transformer on a strongly compressing autoencoder, with a language model for its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from diffusers import SanaPipeline
from torch import Tensor

from pipelines.flows import FlowPipeline


class Sana(FlowPipeline):
    """A ``SanaPipeline``.

    Its checkpoints ship DPM++ 2M; genalign applies the shift of that scheduler to the first-order grid.
    """

    kind = SanaPipeline
    guidance_default = 4.5
    patch = 1
    text_tokens = 300

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for texts of the greatest length, of which no token is masked."""
        context = self.zeros(count, self.max_sequence_length, self.denoiser.config.caption_channels)
        return {"context": context, "mask": torch.ones(context.shape[:2], dtype=torch.long, device=self.device)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts (P, tokens, d), with masks (P, tokens).

        As in diffusers, the prompts follow an instruction, but the empty and the negative prompt do not.
        """
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        rows = [
            self.pipe.encode_prompt(
                [text],
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.max_sequence_length,
                complex_human_instruction=instruction if text and text != self.negative_prompt else None,
            )
            for text in texts
        ]
        return {"context": torch.cat([row[0] for row in rows]), "mask": torch.cat([row[1] for row in rows])}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity (B, C, h, w)."""
        output = self.call_denoiser(
            x,
            encoder_hidden_states=tensors["context"],
            encoder_attention_mask=tensors["mask"],
            timestep=timestep * self.denoiser.config.timestep_scale,
        )
        learns_variance = self.denoiser.config.out_channels // 2 == self.latent_channels
        return output.chunk(2, dim=1)[0] if learns_variance else output
