"""FLUX.1: packed latents, a shift that grows with the image, and guidance that was distilled into the network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor

from pipelines.flows import FlowPipeline, pack, unpack

_T5_LENGTH = 512
DISTILLED_GUIDANCE = 3.5
"""What FLUX.1-dev is told (its model card's value); a network without a guidance embedding, as schnell, is not."""


class Flux(FlowPipeline):
    """A ``FluxPipeline``. FLUX.1-dev is told ``distilled_guidance`` in every call, which costs one forward; sampling
    with classifier-free guidance on top is refused.
    """

    kind = FluxPipeline

    @property
    def latent_channels(self) -> int:
        """C of its latents; the network takes four times as many."""
        return super().latent_channels // 4

    def _default_size(self) -> int:
        return int(self.pipe.default_sample_size)

    def _default_max_tokens(self) -> int:
        return _T5_LENGTH

    def _own_sigmas(self, num_steps: int) -> list[float] | None:
        return [float(sigma) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]

    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        context, pooled, _ = self.pipe.encode_prompt(
            texts, None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"context": context, "pooled": pooled}

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """As every family."""
        config = self._config
        context = self.zeros(count, self.max_sequence_length, config.joint_attention_dim)
        return {"context": context, "pooled": self.zeros(count, config.pooled_projection_dim)}

    def require_guidance(self, guidance: float) -> None:
        """A guidance-distilled network takes none."""
        if guidance > 1 and self.is_distilled:
            raise ValueError(
                f"this model has guidance distilled into it: set sampling.guidance to 1, not {guidance}, and what the"
                " network is told by model.distilled_guidance"
            )

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return bool(self.pipe.transformer.config.guidance_embeds)

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        told = self.distilled_guidance or DISTILLED_GUIDANCE
        guidance = torch.full((len(x),), told, device=x.device) if self.is_distilled else None
        tokens = self.denoiser(
            hidden_states=pack(x),
            timestep=timestep / 1000,
            guidance=guidance,
            pooled_projections=tensors["pooled"],
            encoder_hidden_states=tensors["context"],
            txt_ids=x.new_zeros(tensors["context"].shape[1], 3),
            img_ids=self._places(x),
            return_dict=False,
        )[0]
        return unpack(tokens, self.height, self.width)

    def _places(self, x: Tensor) -> Tensor:
        """(tokens, 3): 0, row and column of each two by two latent pixels."""
        rows, columns = torch.meshgrid(torch.arange(self.height // 2), torch.arange(self.width // 2), indexing="ij")
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(x)
