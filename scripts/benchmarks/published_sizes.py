"""Pipelines at the widths of published checkpoints, from configurations by hand, with random weights.

Build them within ``FakeCuda`` and ``torch.device("cuda")``, where weights take no memory. ``blocks`` limits the number
of blocks of each kind; None builds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from pipelines import SD3, SDXL, Flux, StableAudio, StableDiffusion
from pipelines.base import DiffusersPipeline
from scripts.pretrain.shapes_tokenizers import clip_tokenizer, t5_tokenizer

_LATENT_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def _clip_tokenizer() -> Any:
    """A tokenizer of the shapes world that pads to CLIP's 77 tokens."""
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _t5_tokenizer(length: int) -> Any:
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = length
    return tokenizer


def _clip(width: int, layers: int, blocks: int | None, kind: Any = transformers.CLIPTextModel) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_hidden_layers=_limit(layers, blocks),
        projection_dim=width,
        hidden_act="quick_gelu" if width == 768 else "gelu",
    )
    return kind(config)


def _t5(width: int, inner: int, layers: int, blocks: int | None, activation: str = "gated-gelu") -> Any:
    config = transformers.T5Config(
        d_model=width,
        d_ff=inner,
        num_heads=width // 64,
        num_layers=_limit(layers, blocks),
        feed_forward_proj=activation,
    )
    return transformers.T5EncoderModel(config)


def _scheduler(name: str, **options: Any) -> Any:
    """A scheduler of diffusers, whose noise levels are on the CPU also where networks are built on the device."""
    with torch.device("cpu"):
        return getattr(diffusers, name)(**options)


def _vae(channels: int, **options: Any) -> diffusers.AutoencoderKL:
    """The autoencoder of factor 8 of all image families here."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        sample_size=1024,
        **options,
    )


def _limit(count: int, blocks: int | None) -> int:
    return count if blocks is None else min(count, blocks)


def sd35_medium(blocks: int | None = None, texts: bool = True, positions: int = 384) -> DiffusionPipeline:
    """Stable Diffusion 3.5 Medium: 13 blocks with dual attention and 11 without.

    Without ``texts`` it has tokenizers alone; ``positions`` is the side of its grid of positions, in tokens.
    """
    dual, plain = _limit(13, blocks), _limit(11, blocks)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=dual + plain,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=positions,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )
    vae = _vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    projected = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer,
        _scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0),
        vae,
        _clip(768, 12, blocks, projected) if texts else None,
        _clip_tokenizer(),
        _clip(1280, 32, blocks, projected) if texts else None,
        _clip_tokenizer(),
        _t5(4096, 10240, 24, blocks) if texts else None,
        _t5_tokenizer(256),
    )


def flux_dev(blocks: int | None = None) -> DiffusionPipeline:
    """FLUX.1-dev: 19 double blocks and 38 single ones, with distilled guidance."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=_limit(19, blocks),
        num_single_layers=_limit(38, blocks),
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    vae = _vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = _scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True)
    texts = _clip(768, 12, blocks), _clip_tokenizer(), _t5(4096, 10240, 24, blocks), _t5_tokenizer(512)
    return diffusers.FluxPipeline(scheduler, vae, *texts, transformer)


def sd15(blocks: int | None = None) -> DiffusionPipeline:
    """Stable Diffusion 1.5: the blocks that are limited are those of each width, of which the way up has one more."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2 if blocks is None else 1,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    scheduler = _scheduler("PNDMScheduler", **_LATENT_DIFFUSION, skip_prk_steps=True, set_alpha_to_one=False)
    texts = _clip(768, 12, blocks), _clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        _vae(4, scaling_factor=0.18215), *texts, unet, scheduler, None, None, requires_safety_checker=False
    )


def sdxl(blocks: int | None = None) -> DiffusionPipeline:
    """Stable Diffusion XL: the blocks that are limited are those of each width, and within attention layers."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2 if blocks is None else 1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, _limit(10, blocks)),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    scheduler = _scheduler("EulerDiscreteScheduler", **_LATENT_DIFFUSION, timestep_spacing="leading")
    projected = _clip(1280, 32, blocks, transformers.CLIPTextModelWithProjection)
    texts = _clip(768, 12, blocks), projected, _clip_tokenizer(), _clip_tokenizer()
    vae = _vae(4, scaling_factor=0.13025, force_upcast=True)
    return diffusers.StableDiffusionXLPipeline(vae, *texts, unet, scheduler, add_watermarker=False)


def stable_audio_open(blocks: int | None = None) -> DiffusionPipeline:
    """Stable Audio Open 1.0: stereo of up to 47 s at 44.1 kHz."""
    transformer = diffusers.StableAudioDiTModel(num_layers=_limit(24, blocks))
    vae = diffusers.AutoencoderOobleck()
    projection = diffusers.StableAudioProjectionModel(768, 768, min_value=0, max_value=512)
    scheduler = _scheduler("CosineDPMSolverMultistepScheduler")
    t5 = _t5(768, 3072, 12, blocks, "relu")
    return diffusers.StableAudioPipeline(vae, t5, projection, _t5_tokenizer(128), transformer, scheduler)


MODELS: dict[str, tuple[Callable[[int | None], DiffusionPipeline], type[DiffusersPipeline], dict[str, Any]]] = {
    "sd35_medium": (sd35_medium, SD3, {"height": 512, "width": 512, "max_sequence_length": 128}),
    "flux_dev": (flux_dev, Flux, {"height": 512, "width": 512, "max_sequence_length": 128}),
    "sdxl": (sdxl, SDXL, {}),
    "sd15": (sd15, StableDiffusion, {}),
    "stable_audio_open": (stable_audio_open, StableAudio, {"seconds": 20.0}),
}
"""How each is built, the family that opens it, and the options of the size that it is trained at."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new weights of ``dtype``, within the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
