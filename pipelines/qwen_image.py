"""Qwen-Image: packed latents of a video autoencoder, prompts of any length, guidance that keeps the norm."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from pipelines.flows import FlowPipeline, pack, unpack

_LONGEST = 512


class QwenImage(FlowPipeline):
    """A ``QwenImagePipeline``."""

    kind = QwenImagePipeline
    unconditional = " "

    @property
    def latent_channels(self) -> int:
        """C of its latents; the network takes four times as many."""
        return super().latent_channels // 4

    def _default_size(self) -> int:
        return int(self.pipe.default_sample_size)

    def _default_max_tokens(self) -> int:
        return _LONGEST

    def _own_sigmas(self, num_steps: int) -> list[float] | None:
        return [float(sigma) for sigma in np.linspace(1.0, 1 / num_steps, num_steps)]

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """As every family; nothing is masked."""
        context = self.zeros(count, self.max_sequence_length, self._config.joint_attention_dim)
        return {"context": context, "mask": torch.ones(context.shape[:2], dtype=torch.long)}

    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        context, mask = self.pipe.encode_prompt(texts, self.device, max_sequence_length=self.max_sequence_length)
        if mask is None:  # all are equally long
            mask = torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        return {"context": context, "mask": mask}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        tokens = self.denoiser(
            hidden_states=pack(x),
            timestep=timestep / 1000,
            encoder_hidden_states=tensors["context"],
            encoder_hidden_states_mask=None if bool(tensors["mask"].all()) else tensors["mask"],
            img_shapes=[[(1, self.height // 2, self.width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, self.height, self.width)

    def _guide(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Guidance at the conditional prediction's norm in every token."""
        wanted, away = pack(conditional), pack(super()._guide(unconditional, conditional, guidance))
        kept = away * (wanted.norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True))
        return unpack(kept, self.height, self.width)

    def run_vae(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        frames = (latents * std + mean)[:, :, None].to(self._vae_dtype)
        images: Tensor = self.pipe.vae.decode(frames, return_dict=False)[0][:, :, 0]
        return images
