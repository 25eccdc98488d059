"""Latent diffusion with a UNet: Stable Diffusion 1.5, 2.1, SDXL, and Playground v2.5 and CosXL on EDM's path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from pipelines.noise_schedules import EDM_SCHEDULERS, EDMSchedule, NoiseSchedule, ScheduledPipeline, VPSchedule
from pipelines.options import Options


class UNetPipeline(ScheduledPipeline):
    """A family on the variance-preserving path, or with an EDM scheduler on the path alpha = 1.

    The embedding of the guidance scale, which networks distilled to a few steps take, is ``distilled_guidance``.
    """

    denoiser_name = "unet"
    patch = 1

    def __init__(self, pipe: DiffusionPipeline, **options: Unpack[Options]) -> None:
        super().__init__(pipe, **options)
        inputs, channels = self.denoiser.config.in_channels, self.pipe.vae.config.latent_channels
        if inputs != channels:
            raise ValueError(
                f"the network has in_channels {inputs} for latents of {channels} channels, so it takes more than a"
                " prompt (inpainting, editing): use the text-to-image checkpoint"
            )

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the checkpoint's scheduler."""
        scheduler = self.pipe.scheduler
        return EDMSchedule(scheduler) if isinstance(scheduler, EDM_SCHEDULERS) else VPSchedule(scheduler)

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return self.denoiser.config.time_cond_proj_dim is not None

    def guidance_embedding(self, x: Tensor) -> Tensor | None:
        """Embed the guidance scale of a distilled network for latents (B, C, h, w); None for any other network."""
        if not self.is_distilled:
            return None
        scale = torch.full((len(x),), self.network_guidance - 1)
        embedding: Tensor = self.pipe.get_guidance_scale_embedding(scale, self.denoiser.config.time_cond_proj_dim)
        return embedding.to(x.device, x.dtype, non_blocking=True)

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for texts of the greatest length."""
        return {"context": self.zeros(count, self.max_sequence_length, self.denoiser.config.cross_attention_dim)}


class StableDiffusion(UNetPipeline):
    """A ``StableDiffusionPipeline`` (1.5: epsilon; 2.1 at 768 px: v prediction)."""

    kind = StableDiffusionPipeline
    guidance_default = distilled_default = 7.5

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts by CLIP (P, tokens, d)."""
        context, _ = self.pipe.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)
        return {"context": context}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict noise or v (B, C, h, w)."""
        context, guidance = tensors["context"], self.guidance_embedding(x)
        return self.call_denoiser(x, timestep, encoder_hidden_states=context, timestep_cond=guidance)


class SDXL(UNetPipeline):
    """A ``StableDiffusionXLPipeline``.

    The embeddings of the empty prompt are zeros if the checkpoint's configuration says so.
    """

    kind = StableDiffusionXLPipeline
    guidance_default = distilled_default = 5.0

    @property
    def upcasts_vae(self) -> bool:
        """Whether the VAE runs in float32 where it would run in float16: what its configuration says."""
        return bool(self.pipe.vae.config.get("force_upcast"))

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
        size = torch.tensor([*self.resolution, 0, 0, *self.resolution], dtype=x.dtype).to(x.device, non_blocking=True)
        added = {"text_embeds": tensors["pooled"], "time_ids": size.expand(len(x), -1)}
        context, guidance = tensors["context"], self.guidance_embedding(x)
        return self.call_denoiser(
            x, timestep, encoder_hidden_states=context, timestep_cond=guidance, added_cond_kwargs=added
        )
