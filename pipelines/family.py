"""What a family of checkpoints defines, and the defaults that most families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from genalign.diffusion.paths import GaussianPath
from genalign.runtime.fsdp import compute_dtype
from genalign.types import Grid, NoiseLevel
from pipelines.options import Options


class Family(ABC):
    """How one family encodes prompts and calls its network, its noise levels, guidance, shapes and decoder.

    ``pipelines.base.DiffusersPipeline`` does everything else by these methods. A family is a subclass of that class: it
    defines ``kind`` and the abstract methods, and overrides the defaults that do not fit.
    """

    kind: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str] = "transformer"  # the component that is trained
    patch: ClassVar[int] = 2  # the side of the network's patches in latent pixels
    default_negative: ClassVar[str | None] = ""  # the negative prompt; None where guidance leads away from no text
    distilled_default: ClassVar[float] = 3.5  # the guidance scale that a guidance-distilled network takes as an input
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    sampling_encoders: ClassVar[tuple[str, ...]] = ()  # encoders that sampling needs, too: a text cache keeps them
    decoders: ClassVar[tuple[str, ...]] = ("vae",)  # the components from latents to samples
    lora_in_diffusers: ClassVar[bool] = True  # whether diffusers saves and loads adapters of this family
    takes_users: ClassVar[bool] = True  # whether its network, if it attends to texts apart, runs whole batches

    pipe: Any  # the pipeline of diffusers, whose components differ by family
    device: torch.device
    height: int  # of an image's latents, as is the width
    width: int
    max_sequence_length: int
    negative_prompt: str
    distilled_guidance: float | None

    # Noise levels

    @property
    @abstractmethod
    def first_order(self) -> type[SchedulerMixin]:
        """The scheduler of diffusers that supplies the noise levels, whatever solver a checkpoint ships."""

    @property
    @abstractmethod
    def path(self) -> GaussianPath:
        """The interpolation that the network was trained on."""

    @abstractmethod
    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the first-order sampling grid of the checkpoint's scheduler, or of explicit ``sigmas``."""

    @abstractmethod
    def level(self, u: Tensor) -> NoiseLevel:
        """Return noise levels for training at u in [0, 1] (B,)."""

    # Texts

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode P texts to named tensors (P, ...), with the text encoders on the device."""

    @abstractmethod
    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros in the shape of the conditioning of ``count`` longest prompts, for memory estimates."""

    @property
    def text_tokens(self) -> int:
        """The default of ``max_sequence_length``."""
        return int(self.pipe.tokenizer.model_max_length)

    def encoding_settings(self) -> dict[str, Any]:
        """Return the settings that an embedding depends on, besides its text and the weights, as JSON types."""
        return {"max_sequence_length": self.max_sequence_length, "device": self.device.type}

    # The network

    @property
    def denoiser(self) -> Any:
        """The network of diffusers that predicts noise, velocity or clean latents, and is trained."""
        return self.pipe.components[self.denoiser_name]

    @abstractmethod
    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Call the denoiser once, without guidance or casts, and return its output (B, C, ...).

        Latents ``x`` (B, C, ...), timesteps (B,) and conditioning (B, ...) are on the device.
        """

    def call_denoiser(self, *inputs: Any, **named: Any) -> Tensor:
        """Call the denoiser by its own arguments, and return its output (B, ...)."""
        output: Tensor = self.denoiser(*inputs, **named, return_dict=False)[0]
        return output

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros of ``shape`` on the pipeline's device, in the denoiser's dtype."""
        return torch.zeros(shape, device=self.device, dtype=compute_dtype(self.denoiser))

    # Guidance

    @property
    def guidance_default(self) -> float:
        """The guidance scale of the family: that of its diffusers pipeline, or of the model card."""
        return 1.0

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return False

    @property
    def network_guidance(self) -> float:
        """The guidance scale that a guidance-distilled network takes as an input."""
        return self.distilled_default if self.distilled_guidance is None else self.distilled_guidance

    def require_guidance(self, guidance: float) -> None:
        """Raise ValueError for classifier-free guidance of a guidance-distilled network."""
        if guidance > 1 and self.is_distilled:
            raise ValueError(
                f"this model has guidance distilled into it: set sampling.guidance to 1, not {guidance}, and the"
                " network's own guidance by model.distilled_guidance"
            )

    @property
    def takes_negative(self) -> bool:
        """Whether a negative prompt can be set."""
        return not self.is_distilled

    @property
    def unconditional(self) -> str | None:
        """The text that guidance leads away from; None where it leads away from other conditioning than a text's."""
        return self.negative_prompt if self.negative_prompt else self.default_negative

    def apply_guidance(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Combine two predictions (B, C, ...) by classifier-free guidance (arXiv 2207.12598)."""
        return unconditional + guidance * (conditional - unconditional)

    # Shapes

    @property
    def latent_channels(self) -> int:
        """The number C of channels of the latents."""
        return int(self.denoiser.config.in_channels)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the checkpoint's images in latent pixels."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape (C, h, w) of one sample's latents."""
        return self.latent_channels, self.height, self.width

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape (3, H, W) of one image in pixels."""
        factor = int(self.pipe.vae_scale_factor)
        return 3, self.height * factor, self.width * factor

    @property
    def resolution(self) -> tuple[int, ...]:
        """Height and width of images in pixels, or the length of audio in audio samples."""
        return self.sample_shape[1:]

    @property
    def sample_rate(self) -> int | None:
        """The sample rate of audio in Hz; None for images."""
        return None

    def _set_size(self, options: Options) -> None:
        """Set ``height`` and ``width`` of the latents from the size of images in pixels."""
        if options.get("seconds") is not None:
            raise ValueError("this model makes images: leave seconds out, and give height and width")
        factor = int(self.pipe.vae_scale_factor)
        multiple, height, width = factor * self.patch, options.get("height"), options.get("width")
        for pixels in (height, width):
            if pixels is not None and (pixels < 1 or pixels % multiple):
                raise ValueError(f"height and width must be multiples of {multiple} for this model, not {pixels}")
        own_height, own_width = self.latent_size
        self.height = own_height if height is None else height // factor
        self.width = own_width if width is None else width // factor

    # From latents to samples

    def run_vae(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, ...) with the VAE, without casts or postprocessing: images (B, 3, H, W) in [-1, 1]."""
        unscaled = unscale(latents, self.pipe.vae.config).to(self.pipe.vae.dtype)
        images: Tensor = self.pipe.vae.decode(unscaled, return_dict=False)[0]
        return images

    def postprocess(self, decoded: Tensor) -> Tensor:
        """Bring decoded samples (B, ...) into their range: images in [0, 1]."""
        return (decoded / 2 + 0.5).clamp(0, 1)

    # From samples to latents

    def run_encoder(self, samples: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] with the VAE to latents (B, C, ...), as ``run_vae`` decodes them."""
        vae = self.pipe.vae
        return rescale(most_likely(vae.encode((2 * samples - 1).to(vae.dtype))), vae.config)

    @property
    def upcasts_vae(self) -> bool:
        """Whether the VAE runs in float32 where the options say float16, in which it overflows."""
        return False


def unscale(latents: Tensor, vae_config: Any) -> Tensor:
    """Undo the scaling of latents (B, C, ...), by statistics of each channel or by one factor and shift."""
    mean, std = getattr(vae_config, "latents_mean", None), getattr(vae_config, "latents_std", None)
    if mean is None or std is None:
        return latents / float(vae_config.scaling_factor) + (getattr(vae_config, "shift_factor", None) or 0.0)
    shape = (-1, *[1] * (latents.ndim - 2))
    offset, spread = (torch.tensor(values).view(shape).to(latents) for values in (mean, std))
    return latents * spread / getattr(vae_config, "scaling_factor", 1.0) + offset


def rescale(latents: Tensor, vae_config: Any) -> Tensor:
    """Scale latents (B, C, ...) of a VAE as the denoiser takes them: the inverse of ``unscale``."""
    zero, one = unscale(torch.zeros_like(latents), vae_config), unscale(torch.ones_like(latents), vae_config)
    return (latents - zero) / (one - zero)


def most_likely(encoded: Any) -> Tensor:
    """The latents (B, C, ...) of a VAE's answer: the mode of a distribution, or the latents themselves."""
    latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return latents
