"""Variance preserving latent diffusion with a UNet: Stable Diffusion 1.5, 2.1 and SDXL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from genalign.diffusion.paths import VPPath
from genalign.types import Grid, NoiseLevel
from pipelines.base import DiffusersPipeline
from pipelines.steering.scheduler_hooks import grid_of


class UNetPipeline(DiffusersPipeline):
    """A family on x = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1, whose network takes integer training timesteps."""

    denoiser_name = "unet"
    patch = 1

    @property
    def path(self) -> VPPath:
        """The variance preserving path, with the prediction type of the checkpoint's scheduler."""
        return VPPath(self.pipe.scheduler.config.prediction_type)

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the grid of the first-order scheduler. Raises ValueError for explicit ``sigmas``."""
        if sigmas is not None:
            raise ValueError(
                "the network of this family takes integer timesteps alone, so that noise levels cannot be set freely:"
                " give sampling.num_steps without sampling.sigmas"
            )
        scheduler: Any = self.first_order.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_steps)
        return grid_of(scheduler)

    def level(self, u: Tensor) -> NoiseLevel:
        """Return the noise level of the training timestep nearest to u in [0, 1] (B,)."""
        alphas_squared = DDIMScheduler.from_config(self.pipe.scheduler.config).alphas_cumprod.double()
        timestep = (u.double().cpu() * (len(alphas_squared) - 1)).round().long()
        alpha_squared = alphas_squared[timestep].to(u.device)
        return NoiseLevel(timestep.double().to(u.device), alpha_squared.sqrt(), (1 - alpha_squared).sqrt())

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for texts of the greatest length."""
        return {"context": self.zeros(count, self.max_sequence_length, self.denoiser.config.cross_attention_dim)}


class StableDiffusion(UNetPipeline):
    """A ``StableDiffusionPipeline`` on DDIM's grid (1.5: epsilon; 2.1 at 768 px: v prediction)."""

    kind = StableDiffusionPipeline
    first_order = DDIMScheduler

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts by CLIP (P, tokens, d)."""
        context, _ = self.pipe.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)
        return {"context": context}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict noise or v (B, C, h, w)."""
        return self.call_denoiser(x, timestep, encoder_hidden_states=tensors["context"])


class SDXL(UNetPipeline):
    """A ``StableDiffusionXLPipeline`` on the grid of EulerDiscreteScheduler.

    Euler's moves are DDIM's in other coordinates: x / alpha and sigma / alpha. The embeddings of the empty prompt are
    zeros if the checkpoint's configuration says so.
    """

    kind = StableDiffusionXLPipeline
    first_order = EulerDiscreteScheduler

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for texts of the greatest length, and for the pooled text."""
        # the network's additional input is the pooled text and six numbers of sizes, embedded
        pooled = (
            self.denoiser.config.projection_class_embeddings_input_dim
            - 6 * self.denoiser.config.addition_time_embed_dim
        )
        return {**super().longest_conditioning(count), "pooled": self.zeros(count, pooled)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts by two CLIPs (P, tokens, d), and pooled by the second (P, d)."""
        context, _, pooled, _ = self.pipe.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        nonzero = torch.tensor([bool(text) for text in texts], device=context.device)
        if not self.pipe.config.force_zeros_for_empty_prompt:
            nonzero = torch.ones_like(nonzero)
        return {"context": context * nonzero[:, None, None], "pooled": pooled * nonzero[:, None]}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict noise (B, C, h, w), for images of the size of the samples, not cropped."""
        size = torch.tensor([*self.resolution, 0, 0, *self.resolution], device=x.device, dtype=x.dtype)
        added = {"text_embeds": tensors["pooled"], "time_ids": size.expand(len(x), -1)}
        return self.call_denoiser(x, timestep, encoder_hidden_states=tensors["context"], added_cond_kwargs=added)
