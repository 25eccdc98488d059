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


class UNetPipeline(DiffusersPipeline):
    """A family on x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, told integer timesteps of its training."""

    denoiser_name = "unet"
    patch = 1

    @property
    def path(self) -> VPPath:
        """By what the checkpoint's scheduler says the network predicts."""
        return VPPath(self.pipe.scheduler.config.prediction_type)

    def _require_no_sigmas(self, sigmas: Sequence[float] | None) -> None:
        if sigmas is not None:
            raise ValueError(
                "this family's network knows whole timesteps alone, so that noise levels cannot be chosen freely: give"
                " sampling.num_steps without sampling.sigmas"
            )

    def level(self, u: Tensor) -> NoiseLevel:
        """The noise level of the timestep nearest to u in [0, 1] (B,) of the training range."""
        cumulated = DDIMScheduler.from_config(self.pipe.scheduler.config).alphas_cumprod.double()
        timestep = (u.double().cpu() * (len(cumulated) - 1)).round().long()
        alpha_squared = cumulated[timestep].to(u.device)
        return NoiseLevel(timestep.double().to(u.device), alpha_squared.sqrt(), (1 - alpha_squared).sqrt())


class StableDiffusion(UNetPipeline):
    """A ``StableDiffusionPipeline`` on DDIM's grid (1.5: epsilon; 2.1 at 768 px: v prediction)."""

    kind = StableDiffusionPipeline
    first_order = DDIMScheduler

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """DDIM's timesteps, and the noise level that its last step goes to."""
        self._require_no_sigmas(sigmas)
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_steps)
        last = scheduler.final_alpha_cumprod.double().reshape(1)
        alpha_squared = torch.cat([scheduler.alphas_cumprod.double()[scheduler.timesteps], last])
        return Grid(scheduler.timesteps.double(), alpha_squared.sqrt(), (1 - alpha_squared).sqrt())

    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        context, _ = self.pipe.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)
        return {"context": context}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(x, timestep, encoder_hidden_states=tensors["context"], return_dict=False)[0]
        return output


class SDXL(UNetPipeline):
    """A ``StableDiffusionXLPipeline`` on the grid of EulerDiscreteScheduler, whose moves are DDIM's in other
    coordinates: x / alpha and sigma / alpha. The empty prompt is all zeros where the checkpoint says so.
    """

    kind = StableDiffusionXLPipeline
    first_order = EulerDiscreteScheduler

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """The Euler scheduler's timesteps and levels; the last is without noise."""
        self._require_no_sigmas(sigmas)
        scheduler: Any = EulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_steps)
        ratio = scheduler.sigmas.double()
        alpha = (1 + ratio**2).rsqrt()
        return Grid(scheduler.timesteps.double(), alpha, ratio * alpha)

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """As every family; the pooled text is what the network takes beside six numbers of sizes."""
        config = self._config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().longest_conditioning(count), "pooled": self.zeros(count, pooled)}

    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        context, _, pooled, _ = self.pipe.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        told = torch.tensor([bool(text) for text in texts], device=context.device)
        if not self.pipe.config.force_zeros_for_empty_prompt:
            told = torch.ones_like(told)
        return {"context": context * told[:, None, None], "pooled": pooled * told[:, None]}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        size = torch.tensor([*self.resolution, 0, 0, *self.resolution], device=x.device, dtype=x.dtype)
        output: Tensor = self.denoiser(
            x,
            timestep,
            encoder_hidden_states=tensors["context"],
            added_cond_kwargs={"text_embeds": tensors["pooled"], "time_ids": size.expand(len(x), -1)},
            return_dict=False,
        )[0]
        return output
