"""Tiny random pipelines of several families, and calls of theirs with random embeddings for N samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from tests.pipelines.tiny_checkpoints import (
    CHANNELS,
    HEADS,
    audio_transformer,
    flux_transformer,
    oobleck,
    unet,
    unet_xl,
)

Pick = Sequence[int]
STEPS = 4
_WIDTH, _GUIDED = 16, {"guidance_scale": 3.0}
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


def _family(
    kind: type[DiffusionPipeline], scheduler: SchedulerMixin, count: int, shared: dict[str, Any], **parts: Any
) -> Family:
    """A pipeline of ``parts`` without text encoders, and embeddings for ``count`` samples; guidance doubles the NFE."""
    required = [name for name, value in signature(kind.__init__).parameters.items() if value.default is Parameter.empty]
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4, mid_block_add_attention=False
    )
    pipe = kind(**{**dict.fromkeys(required[1:]), "vae": vae, "scheduler": scheduler, **parts})
    source = torch.Generator().manual_seed(0)
    for module in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        for parameter in module.parameters():  # some output layers start at zero, which would hide mistakes
            nn.init.normal_(parameter, std=0.2, generator=source)
        module.eval()
    pipe.set_progress_bar_config(disable=True)

    nfe = 2 if shared.get("guidance_scale", 1.0) > 1 else 1
    source, shapes = torch.Generator().manual_seed(1), {"prompt_embeds": (3, _WIDTH), "pooled_prompt_embeds": (_WIDTH,)}
    samples = {
        prefix + name: torch.randn(count, *shape, generator=source)
        for name, shape in shapes.items()
        for prefix in ("", "negative_")[:nfe]
        if name in signature(kind.__call__).parameters
    }
    return Family(pipe, pipe.components.get("unet") or pipe.transformer, samples, shared, nfe)


def sd15(count: int = 4) -> Family:
    """Stable Diffusion 1.5 with guidance, on DDIM."""
    parts = {"unet": unet(_WIDTH), "requires_safety_checker": False}
    return _family(diffusers.StableDiffusionPipeline, diffusers.DDIMScheduler(**_DDIM), count, _GUIDED, **parts)


def sdxl(count: int = 4) -> Family:
    """SDXL without guidance, on DDIM."""
    kind, scheduler = diffusers.StableDiffusionXLPipeline, diffusers.DDIMScheduler(**_DDIM)
    return _family(kind, scheduler, count, {"guidance_scale": 1.0}, unet=unet_xl(_WIDTH, _WIDTH), add_watermarker=False)


def sd3(count: int = 4) -> Family:
    """Stable Diffusion 3 with guidance."""
    network = diffusers.SD3Transformer2DModel(
        **HEADS,
        **CHANNELS,
        sample_size=8,
        attention_head_dim=8,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=_WIDTH,
        pos_embed_max_size=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _family(diffusers.StableDiffusion3Pipeline, scheduler, count, _GUIDED, transformer=network)


def flux(count: int = 4) -> Family:
    """FLUX with distilled guidance and a shift that depends on the image's size."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    network = flux_transformer(_WIDTH, _WIDTH)
    return _family(diffusers.FluxPipeline, scheduler, count, {"height": 8, "width": 8}, transformer=network)


def stable_audio(count: int = 4, scheduler: SchedulerMixin | None = None) -> Family:
    """Stable Audio with guidance; on its own CosineDPMSolverMultistepScheduler, which needs torchsde, by default."""
    projection = diffusers.StableAudioProjectionModel(_WIDTH, _WIDTH, 0, 4)
    parts = {"vae": oobleck(), "transformer": audio_transformer(), "projection_model": projection}
    used = scheduler or diffusers.CosineDPMSolverMultistepScheduler()
    return _family(diffusers.StableAudioPipeline, used, count, _GUIDED, **parts)


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
