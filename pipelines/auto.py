"""Opening a checkpoint with the wrapper of its family."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Unpack

import torch

from genalign import assets
from genalign.runtime.hub import DEFAULT_ACCESS, HubAccess
from pipelines.ace_step import AceStep
from pipelines.audio_ldm2 import AudioLDM2
from pipelines.base import DiffusersPipeline
from pipelines.checkpoint_files import model_index
from pipelines.flux import Flux
from pipelines.flux2 import Flux2Klein
from pipelines.options import Options, hub_access
from pipelines.qwen_image import QwenImage
from pipelines.qwen_image21 import QwenImage21
from pipelines.sana import Sana
from pipelines.sd3 import SD3
from pipelines.stable_audio import StableAudio
from pipelines.stable_diffusion import SDXL, StableDiffusion
from pipelines.z_image import ZImage

FAMILIES: dict[str, type[DiffusersPipeline]] = {
    family.kind.__name__: family
    for family in (
        *(SD3, Flux, Flux2Klein, StableDiffusion, SDXL, Sana, QwenImage, QwenImage21, ZImage),
        *(StableAudio, AceStep, AudioLDM2),
    )
}
"""The wrapper of each pipeline class of diffusers, by its name."""


def load(
    path_or_id: str | Path, *, family: str | None = None, dtype: torch.dtype = torch.float32, **options: Unpack[Options]
) -> DiffusersPipeline:
    """Open an embedded model, a diffusers folder or a Hub id of any family, recognized by its model_index.json.

    ``family`` is the import path of a class to open it with instead, such as one of your own. Raises FileNotFoundError
    if there is no such folder, or ValueError for another kind of folder, checkpoint or class.
    """
    source = assets.resolve(str(path_or_id))
    return family_of(source, family, hub_access(options)).load(source, dtype=dtype, **options)


def family_of(
    path_or_id: str | Path, family: str | None = None, access: HubAccess = DEFAULT_ACCESS
) -> type[DiffusersPipeline]:
    """Return the class at the import path ``family``, or the wrapper class of a checkpoint. Raises as ``load`` does."""
    if family is not None:
        return import_family(family)
    name = model_index(path_or_id, access)["_class_name"]
    if name not in FAMILIES:
        raise ValueError(
            f"{path_or_id} holds a {name}, which genalign has no wrapper for: use one of {', '.join(FAMILIES)}, or"
            " set model.family to the import path of a class of your own"
        )
    return FAMILIES[name]


def import_family(path: str) -> type[DiffusersPipeline]:
    """Import a family by its import path. Raises ValueError for anything but a complete class of one."""
    module, _, name = path.rpartition(".")
    try:
        family = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model.family {path!r} cannot be imported ({error}): write the import path of a class, as in"
            " my_families.AuraFlow, from a module in the working directory or an installed package"
        ) from None
    advice = "give a subclass of pipelines.base.DiffusersPipeline, or of a family such as pipelines.SD3"
    if not (isinstance(family, type) and issubclass(family, DiffusersPipeline)):
        raise ValueError(f"model.family {path!r} is no pipeline of genalign: {advice}")
    missing = sorted(family.__abstractmethods__) + ([] if hasattr(family, "kind") else ["kind"])
    if missing:
        raise ValueError(f"model.family {path!r} does not define {', '.join(missing)}: {advice}")
    return family
