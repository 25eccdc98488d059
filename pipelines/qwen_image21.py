"""Qwen-Image 2.1: a block-causal stream of text and latents, and pictures with transparency."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import QwenImage21Pipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipelines.family import most_likely, rescale, unscale
from pipelines.flows import FlowPipeline, by_text_length, even_sigmas


class QwenImage21(FlowPipeline):
    """A ``QwenImage21Pipeline``, from texts only; it is meant to be sampled without guidance.

    Its autoencoder decodes red, green, blue and opacity: samples are the picture on white. The place of the image's
    tokens depends on the length of the text: only samples with equally long texts go through the network together, so
    a sample is the same alone and in any batch, where diffusers pads the texts. Texts are not cut;
    ``max_sequence_length`` is the length that memory estimates take.
    """

    kind = QwenImage21Pipeline
    takes_users = False
    text_tokens = 512

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latent pixels of images of 1024 pixels."""
        side = 1024 // int(self.pipe.vae_scale_factor)
        return side, side

    @property
    def image_tokens(self) -> int:
        """The number of tokens that the network takes an image in: one for each latent pixel."""
        return self.height * self.width

    def default_sigmas(self, num_steps: int) -> list[float]:
        """Return the sigmas of the checkpoint (``sample_sigmas``), or T at equal distances, from 1 to 1 / T.

        Raises ValueError for another number of steps than the checkpoint's sigmas.
        """
        own: list[float] | None = self.pipe.config.sample_sigmas
        if own is None:
            return even_sigmas(num_steps)
        if len(own) != num_steps:
            raise ValueError(
                f"this checkpoint is sampled in {len(own)} steps, at the sample_sigmas of its model_index.json: set"
                f" sampling.num_steps to {len(own)}, not {num_steps}, or sampling.sigmas to other noise levels"
            )
        return list(own)

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for texts of ``max_sequence_length`` tokens."""
        context = self.zeros(count, self.max_sequence_length, self.denoiser.config.context_in_dim)
        return {"context": context, "mask": torch.ones(context.shape[:2], dtype=torch.long)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts (P, tokens, d), with a mask (P, tokens) that is 0 after a text's end."""
        context, mask, _ = self.pipe.encode_prompt(texts, None, self.device)
        if mask is None:  # all texts have the same length
            mask = torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        return {"context": context, "mask": mask}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity (B, C, h, w), by one call for all samples with texts of one length."""

        def predict(rows: Tensor, length: int) -> Tensor:
            # a slot of the mask for each token of the text, and for four tokens of the image
            slots = torch.arange(length + self.image_tokens // 4, device=tensors["mask"].device) >= length
            tokens = self.call_denoiser(
                hidden_states=x[rows].flatten(2).transpose(1, 2),
                timestep=timestep[rows] / 1000,
                encoder_hidden_states=tensors["context"][rows, :length],
                img_shapes=[[(1, self.height, self.width)]] * len(rows),
                img_mask=slots.expand(len(rows), -1),
            )
            return tokens[:, -self.image_tokens :].transpose(1, 2).reshape(len(rows), -1, self.height, self.width)

        with _MasksOnMeta() if x.is_meta else contextlib.nullcontext():
            return by_text_length(self.denoiser, tensors["mask"], x.device, predict)

    def run_vae(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) as videos of one frame to pictures (B, 4, H, W) in [-1, 1]."""
        frames = unscale(latents, self.pipe.vae.config)[:, :, None].to(self.pipe.vae.dtype)
        images: Tensor = self.pipe.vae.decode(frames, return_dict=False)[0][:, :, 0]
        return images

    def run_encoder(self, samples: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1], as opaque pictures, to latents (B, C, h, w)."""
        opaque = torch.cat([samples, torch.ones_like(samples[:, :1])], dim=1)
        frames = (2 * opaque - 1)[:, :, None].to(self.pipe.vae.dtype)
        return rescale(most_likely(self.pipe.vae.encode(frames))[:, :, 0], self.pipe.vae.config)

    def postprocess(self, decoded: Tensor) -> Tensor:
        """Bring pictures (B, 4, H, W) into [0, 1], and lay them on white (B, 3, H, W)."""
        return on_white(super().postprocess(decoded))


class _MasksOnMeta(TorchFunctionMode):
    """The selection of meta tensors by masks on the CPU, whose values the network reads on its way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.where and isinstance(args[1], Tensor):
            args = (args[0].to(args[1].device), *args[1:])
        return func(*args, **(kwargs or {}))


def on_white(images: Tensor) -> Tensor:
    """Lay pictures with opacity (B, 4, H, W) in [0, 1] on white; those without (B, 3, H, W) stay."""
    colors, opacity = images[:, :3], images[:, 3:]
    return colors * opacity + (1 - opacity) if opacity.shape[1] else colors
