"""Opening a checkpoint with the wrapper of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch

from genalign import assets
from pipelines.ace_step import AceStep
from pipelines.base import DiffusersPipeline, Options
from pipelines.checkpoint_files import model_index
from pipelines.flux import Flux
from pipelines.qwen_image import QwenImage
from pipelines.sana import Sana
from pipelines.sd3 import SD3
from pipelines.stable_audio import StableAudio
from pipelines.stable_diffusion import SDXL, StableDiffusion

FAMILIES: dict[str, type[DiffusersPipeline]] = {
    family.kind.__name__: family for family in (SD3, Flux, StableDiffusion, SDXL, Sana, QwenImage, StableAudio, AceStep)
}
"""The wrapper of each pipeline class of diffusers, by its name."""


def load(
    path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, **options: Unpack[Options]
) -> DiffusersPipeline:
    """Open an embedded model, a diffusers folder or a Hub id of any family, recognized by its model_index.json.

    Raises FileNotFoundError if there is none, or ValueError for another kind of folder or checkpoint.
    """
    source = assets.resolve(str(path_or_id))
    return family_of(source).load(source, dtype=dtype, **options)


def family_of(path_or_id: str | Path) -> type[DiffusersPipeline]:
    """Return the wrapper class of a checkpoint. Raises as ``load`` does."""
    name = model_index(path_or_id)["_class_name"]
    if name not in FAMILIES:
        raise ValueError(
            f"{path_or_id} holds a {name}, which genalign has no wrapper for: use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]
