"""FLUX.1: packed latents, a shift that grows with the image, and guidance that was distilled into the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import FluxPipeline
from torch import Tensor

from pipelines.flows import PackedFlowPipeline, pack, unpack


class Flux(PackedFlowPipeline):
    """A ``FluxPipeline``.

    The network of FLUX.1-dev takes ``distilled_guidance`` as an input, 3.5 by default, at one NFE, and classifier-free
    guidance on top is refused; the network of FLUX.1-schnell takes no guidance.
    """

    kind = FluxPipeline

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return bool(self.pipe.transformer.config.guidance_embeds)

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return T5's tokens and CLIP's pooled text of the greatest length, as zeros."""
        context = self.zeros(count, self.max_sequence_length, self.denoiser.config.joint_attention_dim)
        return {"context": context, "pooled": self.zeros(count, self.denoiser.config.pooled_projection_dim)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts by T5 (P, tokens, d) and CLIP (P, d)."""
        context, pooled, _ = self.pipe.encode_prompt(
            texts, None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"context": context, "pooled": pooled}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity (B, C, h, w) from packed latents."""
        guidance = None
        if self.is_distilled:
            guidance = torch.full((len(x),), self.network_guidance, device=x.device)
        sides = (torch.arange(side // 2, device=x.device) for side in (self.height, self.width))
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        tokens = self.call_denoiser(
            hidden_states=pack(x),
            timestep=timestep / 1000,
            guidance=guidance,
            pooled_projections=tensors["pooled"],
            encoder_hidden_states=tensors["context"],
            txt_ids=x.new_zeros(tensors["context"].shape[1], 3),
            img_ids=torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(x.dtype),
        )
        return unpack(tokens, self.height, self.width)
