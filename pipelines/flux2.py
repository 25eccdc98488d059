"""FLUX.2 [klein]: packed latents that are normalized, and a shift that falls with the number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from pipelines.family import most_likely
from pipelines.flows import PackedFlowPipeline, pack, unpack


class Flux2Klein(PackedFlowPipeline):
    """A ``Flux2KleinPipeline``, from texts only.

    The shift of training levels is that of 50 steps, diffusers' default. Base checkpoints take guidance and a negative
    prompt, checkpoints distilled to a few steps (``is_distilled`` in model_index.json) neither.
    """

    kind = Flux2KleinPipeline

    @property
    def takes_negative(self) -> bool:
        """Whether guidance can lead away from a text: not for a distilled checkpoint."""
        return not self.pipe.config.is_distilled

    @property
    def guidance_default(self) -> float:
        """The guidance scale of diffusers' pipeline, or none for a distilled checkpoint."""
        return 1.0 if self.pipe.config.is_distilled else 4.0

    def require_guidance(self, guidance: float) -> None:
        """Raise ValueError for guidance of a distilled checkpoint."""
        if guidance > 1 and self.pipe.config.is_distilled:
            raise ValueError(f"this model is distilled to a few steps: set sampling.guidance to 1, not {guidance}")

    def mu(self, config: Any, num_steps: int) -> float:
        """Return mu of the shift exp(mu), which diffusers takes from the number of image tokens and of steps."""
        return float(compute_empirical_mu(self.image_tokens, num_steps))

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for a text, which is always padded to the greatest length."""
        return {"context": self.zeros(count, self.max_sequence_length, self.denoiser.config.joint_attention_dim)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts by three layers of the language model (P, tokens, 3 d)."""
        context, _ = self.pipe.encode_prompt(texts, self.device, max_sequence_length=self.max_sequence_length)
        return {"context": context}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity (B, C, h, w) from packed latents."""
        zero = torch.zeros(1, dtype=torch.long, device=x.device)
        rows, columns = (torch.arange(side // 2, device=x.device) for side in (self.height, self.width))
        words = torch.arange(tensors["context"].shape[1], device=x.device)
        tokens = self.call_denoiser(
            hidden_states=pack(x),
            timestep=timestep / 1000,
            encoder_hidden_states=tensors["context"],
            txt_ids=torch.cartesian_prod(zero, zero, zero, words)[None],
            img_ids=torch.cartesian_prod(zero, rows, columns, zero)[None],
        )
        return unpack(tokens, self.height, self.width)

    def run_vae(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1]."""
        return decode_tokens(self.pipe.vae, pack(latents), self.height, self.width)

    def run_encoder(self, samples: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents (B, C, h, w), normalized as ``decode_tokens`` undoes it."""
        vae = self.pipe.vae
        tokens = pack(most_likely(vae.encode((2 * samples - 1).to(vae.dtype))).float())
        spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().to(tokens)
        return unpack((tokens - vae.bn.running_mean.to(tokens)) / spread, self.height, self.width)


def decode_tokens(vae: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo the batch normalization of tokens (B, h/2 * w/2, 4 C), and decode them as latents of (height, width)."""
    spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().to(tokens)
    latents = unpack(tokens * spread + vae.bn.running_mean.to(tokens), height, width)
    images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return images
