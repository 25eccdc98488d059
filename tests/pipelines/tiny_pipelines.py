"""Tiny random pipelines of several families, and calls of theirs with random embeddings for N samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

Pick = Sequence[int]
STEPS = 4
_WORDS, _WIDTH = 3, 16
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_DDIM = {**_BETAS, "clip_sample": False, "set_alpha_to_one": False}


@dataclass(frozen=True)
class Family:
    """A pipeline, the keyword arguments that differ among its samples (each (N, ...)), and those that all share."""

    pipe: DiffusionPipeline
    network: nn.Module
    samples: dict[str, Tensor]
    shared: dict[str, Any]
    nfe: int

    def call(self, rows: Pick, generators: Sequence[torch.Generator] | None = None) -> dict[str, Any]:
        """The arguments for the samples ``rows``; their generators are new, seeded by the rows, unless given."""
        mine = {name: tensor[list(rows)] for name, tensor in self.samples.items()}
        return {**self.shared, **mine, "generator": list(generators or fresh(rows)), "num_inference_steps": STEPS}

    def run(self, rows: Pick, **extra: Any) -> Tensor:
        """The final latents of the samples ``rows``."""
        result: Tensor = self.pipe(**self.call(rows), **extra, output_type="latent", return_dict=False)[0]
        return result

    def on(self, kind: type[SchedulerMixin], **options: Any) -> Family:
        """Itself, now with a scheduler of ``kind`` and the usual noise levels of latent diffusion."""
        self.pipe.scheduler = kind(**{**_BETAS, **options})
        return self


def fresh(rows: Pick) -> list[torch.Generator]:
    """One new generator for each row, seeded by it."""
    return [torch.Generator().manual_seed(row) for row in rows]


@contextmanager
def counted(family: Family) -> Iterator[list[int]]:
    """The batch sizes of the network's calls."""
    sizes: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        sizes.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = family.network.register_forward_pre_hook(count, with_kwargs=True)
    yield sizes
    handle.remove()


def _embeddings(count: int, **widths: int) -> dict[str, Tensor]:
    """(count, 3, width) for names with a positive width, (count, -width) for the others."""
    source = torch.Generator().manual_seed(1)
    return {
        name: torch.randn((count, _WORDS, width) if width > 0 else (count, -width), generator=source)
        for name, width in widths.items()
    }


def _vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=channels, mid_block_add_attention=False
    )


def _unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=2,
        cross_attention_dim=_WIDTH,
        **options,
    )


def _finish(
    pipe: DiffusionPipeline, network: nn.Module, samples: dict[str, Tensor], shared: dict[str, Any], nfe: int
) -> Family:
    source = torch.Generator().manual_seed(0)
    for module in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        for parameter in module.parameters():  # some output layers start at zero, which would hide mistakes
            nn.init.normal_(parameter, std=0.2, generator=source)
        module.eval()
    pipe.set_progress_bar_config(disable=True)
    return Family(pipe, network, samples, shared, nfe)


def sd15(count: int = 4) -> Family:
    """Stable Diffusion 1.5 with guidance, on DDIM."""
    unet = _unet()
    pipe = StableDiffusionPipeline(
        _vae(), None, None, unet, DDIMScheduler(**_DDIM), None, None, requires_safety_checker=False
    )
    samples = _embeddings(count, prompt_embeds=_WIDTH, negative_prompt_embeds=_WIDTH)
    return _finish(pipe, unet, samples, {"guidance_scale": 3.0}, nfe=2)


def sdxl(count: int = 4) -> Family:
    """SDXL without guidance, on DDIM."""
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=_WIDTH + 6 * 4,
    )
    pipe = StableDiffusionXLPipeline(
        _vae(), None, None, None, None, unet, DDIMScheduler(**_DDIM), add_watermarker=False
    )
    samples = _embeddings(count, prompt_embeds=_WIDTH, pooled_prompt_embeds=-_WIDTH)
    return _finish(pipe, unet, samples, {"guidance_scale": 1.0}, nfe=1)


def sd3(count: int = 4) -> Family:
    """Stable Diffusion 3 with guidance."""
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=_WIDTH,
        pos_embed_max_size=4,
    )
    pipe = StableDiffusion3Pipeline(
        network, FlowMatchEulerDiscreteScheduler(shift=3.0), _vae(), None, None, None, None, None, None
    )
    samples = _embeddings(
        count,
        prompt_embeds=_WIDTH,
        negative_prompt_embeds=_WIDTH,
        pooled_prompt_embeds=-_WIDTH,
        negative_pooled_prompt_embeds=-_WIDTH,
    )
    return _finish(pipe, network, samples, {"guidance_scale": 3.0}, nfe=2)


def flux(count: int = 4) -> Family:
    """FLUX with distilled guidance and a shift that depends on the image's size."""
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, _vae(), None, None, None, None, network)
    samples = _embeddings(count, prompt_embeds=_WIDTH, pooled_prompt_embeds=-_WIDTH)
    return _finish(pipe, network, samples, {"height": 8, "width": 8}, nfe=1)


def stable_audio(count: int = 4, scheduler: SchedulerMixin | None = None) -> Family:
    """Stable Audio with guidance; on its own CosineDPMSolverMultistepScheduler, which needs torchsde, unless given."""
    network = StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=_WIDTH,
        cross_attention_input_dim=_WIDTH,
        global_states_input_dim=2 * _WIDTH,
        time_proj_dim=8,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 1],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=16,
    )
    projection = StableAudioProjectionModel(_WIDTH, _WIDTH, 0, 4)
    used = scheduler or CosineDPMSolverMultistepScheduler()
    pipe = StableAudioPipeline(vae, None, projection, None, network, used)
    samples = _embeddings(count, prompt_embeds=_WIDTH, negative_prompt_embeds=_WIDTH)
    return _finish(pipe, network, samples, {"guidance_scale": 3.0}, nfe=2)


FAMILIES: dict[str, Callable[..., Family]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}
