"""Loading a pipeline of diffusers: the checks before any weights are read, and the components that are left out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from genalign.runtime.hub import hub_answers
from genalign.runtime.memory_options import Memory
from pipelines.checkpoint_files import (
    absent_components,
    check_folder,
    model_index,
    one_line_errors,
    require_weights,
    weight_variant,
)
from pipelines.checkpoint_settings import check_index
from pipelines.compilation import require_compiler
from pipelines.low_memory import quantization_arguments, require_quantization
from pipelines.options import Options, hub_access
from pipelines.text_cache import DroppedEncoders


def load_diffusers(
    path_or_id: str | Path,
    kind: type[DiffusionPipeline],
    denoiser_name: str,
    text_only: Collection[str],
    dtype: torch.dtype,
    options: Options,
) -> tuple[DiffusionPipeline, DroppedEncoders]:
    """Load the pipeline of a checkpoint by diffusers, after checks of its files, its settings and this machine.

    Args:
        path_or_id: A diffusers folder or a Hub id.
        kind: The pipeline class of diffusers.
        denoiser_name: The component that is quantized, if the memory options say so.
        text_only: Components that only encode texts; a text cache takes their place.
        dtype: The dtype of the weights.
        options: Options of opening a checkpoint.

    Returns:
        The pipeline, and the text encoders that it was loaded without, which are none without a text cache.

    Raises:
        ValueError: A checkpoint that does not fit ``kind``, a setting that genalign does not honor, damaged or missing
            weights, or options that this machine cannot run.
        FileNotFoundError: Missing files.
        PermissionError: A gated model of the Hub.
    """
    access = hub_access(options)
    check_folder(path_or_id, kind, access)
    index = model_index(path_or_id, access)
    check_index(index)
    files = _file_arguments(path_or_id, options)
    memory, device = options.get("memory", Memory()), options.get("device", "cpu")
    require_quantization(memory, device)
    if options.get("compile"):
        require_compiler(device, memory)

    quantization = quantization_arguments(memory, denoiser_name, dtype)
    absent = absent_components(path_or_id, kind, access)
    dropped = sorted({*text_only}.difference(absent) & {*index}) if options.get("text_cache") else []
    without = dict.fromkeys([*absent, *dropped])
    with one_line_errors(path_or_id):
        pipe: DiffusionPipeline = kind.from_pretrained(path_or_id, dtype=dtype, **files, **without, **quantization)
    for name, network in pipe.components.items():
        missing = [key for key, weight in getattr(network, "named_parameters", dict)() if weight.is_meta]
        if missing:
            raise ValueError(f"{path_or_id}/{name} has no weights for {missing[0]}: copy the whole folder")
    return pipe, DroppedEncoders(path_or_id, dropped, {"dtype": dtype, **files})


def _file_arguments(path_or_id: str | Path, options: Options) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say which files are read, and check those of a folder."""
    weights, variant = options.get("weights", "safetensors"), options.get("variant")
    files = {"variant": variant, "use_safetensors": weights == "safetensors"}
    if Path(path_or_id).is_dir():
        require_weights(path_or_id, weights, variant)
        return files | {"variant": variant or weight_variant(path_or_id, weights)}
    access = hub_access(options)
    return files | {"revision": access.revision, "token": access.secret(), "local_files_only": not hub_answers()}
