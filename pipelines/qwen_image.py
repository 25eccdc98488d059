"""Qwen-Image: packed latents of a video autoencoder, prompts of any length, guidance that preserves the norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from pipelines.family import most_likely, rescale, unscale
from pipelines.flows import PackedFlowPipeline, pack, unpack


class QwenImage(PackedFlowPipeline):
    """A ``QwenImagePipeline``; its default negative prompt is one space, as on the model card."""

    kind = QwenImagePipeline
    guidance_default = 4.0
    default_negative = " "

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for texts of the greatest length, of which no token is masked."""
        context = self.zeros(count, self.max_sequence_length, self.denoiser.config.joint_attention_dim)
        return {"context": context, "mask": torch.ones(context.shape[:2], dtype=torch.long)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts (P, tokens, d), with a mask (P, tokens) that is 0 after a text's end."""
        context, mask = self.pipe.encode_prompt(texts, self.device, max_sequence_length=self.max_sequence_length)
        if mask is None:  # all texts have the same length
            mask = torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        return {"context": context, "mask": mask}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity (B, C, h, w) from packed latents."""
        tokens = self.call_denoiser(
            hidden_states=pack(x),
            timestep=timestep / 1000,
            encoder_hidden_states=tensors["context"],
            encoder_hidden_states_mask=None if bool(tensors["mask"].all()) else tensors["mask"],
            img_shapes=[[(1, self.height // 2, self.width // 2)]] * len(x),
        )
        return unpack(tokens, self.height, self.width)

    def apply_guidance(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Apply classifier-free guidance, rescaled to the norm of the conditional prediction in every token."""
        guided = pack(super().apply_guidance(unconditional, conditional, guidance))
        norm = pack(conditional).norm(dim=-1, keepdim=True)
        return unpack(guided * (norm / guided.norm(dim=-1, keepdim=True)), self.height, self.width)

    def run_vae(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) as videos of one frame to images (B, 3, H, W) in [-1, 1]."""
        frames = unscale(latents, self.pipe.vae.config)[:, :, None].to(self.pipe.vae.dtype)
        images: Tensor = self.pipe.vae.decode(frames, return_dict=False)[0][:, :, 0]
        return images

    def run_encoder(self, samples: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] as videos of one frame to latents (B, C, h, w)."""
        frames = (2 * samples - 1)[:, :, None].to(self.pipe.vae.dtype)
        return rescale(most_likely(self.pipe.vae.encode(frames))[:, :, 0], self.pipe.vae.config)
