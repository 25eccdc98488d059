"""Tiny random pipelines of several families, and calls of theirs with random embeddings for N samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from tests.pipelines.tiny_checkpoints import audio_transformer, flux_transformer, oobleck, unet, unet_xl

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


def _vae(channels: int = 4) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=channels, mid_block_add_attention=False
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
    network, scheduler = unet(_WIDTH), diffusers.DDIMScheduler(**_DDIM)
    pipe = diffusers.StableDiffusionPipeline(
        _vae(), None, None, network, scheduler, None, None, requires_safety_checker=False
    )
    samples = _embeddings(count, prompt_embeds=_WIDTH, negative_prompt_embeds=_WIDTH)
    return _finish(pipe, network, samples, {"guidance_scale": 3.0}, nfe=2)


def sdxl(count: int = 4) -> Family:
    """SDXL without guidance, on DDIM."""
    network, scheduler = unet_xl(_WIDTH, _WIDTH), diffusers.DDIMScheduler(**_DDIM)
    pipe = diffusers.StableDiffusionXLPipeline(
        _vae(), None, None, None, None, network, scheduler, add_watermarker=False
    )
    samples = _embeddings(count, prompt_embeds=_WIDTH, pooled_prompt_embeds=-_WIDTH)
    return _finish(pipe, network, samples, {"guidance_scale": 1.0}, nfe=1)


def sd3(count: int = 4) -> Family:
    """Stable Diffusion 3 with guidance."""
    network = diffusers.SD3Transformer2DModel(
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
    pipe = diffusers.StableDiffusion3Pipeline(
        network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), _vae(), None, None, None, None, None, None
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
    network = flux_transformer(_WIDTH, _WIDTH)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, _vae(), None, None, None, None, network)
    samples = _embeddings(count, prompt_embeds=_WIDTH, pooled_prompt_embeds=-_WIDTH)
    return _finish(pipe, network, samples, {"height": 8, "width": 8}, nfe=1)


def stable_audio(count: int = 4, scheduler: SchedulerMixin | None = None) -> Family:
    """Stable Audio with guidance; on its own CosineDPMSolverMultistepScheduler, which needs torchsde, by default."""
    network, projection = audio_transformer(), diffusers.StableAudioProjectionModel(_WIDTH, _WIDTH, 0, 4)
    used = scheduler or diffusers.CosineDPMSolverMultistepScheduler()
    pipe = diffusers.StableAudioPipeline(oobleck(), None, projection, None, network, used)
    samples = _embeddings(count, prompt_embeds=_WIDTH, negative_prompt_embeds=_WIDTH)
    return _finish(pipe, network, samples, {"guidance_scale": 3.0}, nfe=2)


FAMILIES: dict[str, Callable[..., Family]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}

SCHEDULERS: list[tuple[type[SchedulerMixin], dict[str, Any]]] = [
    (diffusers.EulerDiscreteScheduler, {}),
    (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
    (diffusers.EulerAncestralDiscreteScheduler, {}),
    (diffusers.DPMSolverMultistepScheduler, {}),
    (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (diffusers.UniPCMultistepScheduler, {}),
    (diffusers.DEISMultistepScheduler, {}),
    (diffusers.SASolverScheduler, {}),
    (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    (diffusers.HeunDiscreteScheduler, {}),
]


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    """Compare tensors up to a share of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * float(expected.abs().max()))
