"""Settings that default to the model family's values, guidance and kernel, filled in for the record of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import Kernel, default_kernel
from genalign.types import Pipeline


def with_family_defaults(
    plain: Mapping[str, Any], pipeline: Pipeline, samplings: Mapping[str, Sampling | None]
) -> dict[str, Any]:
    """Replace nulls of ``guidance`` and ``recipe.kernel`` by the defaults of the model's family.

    Args:
        plain: The configuration as plain JSON.
        pipeline: The model.
        samplings: The sampling settings of each section.
    """
    resolved = dict(plain)
    for name, sampling in samplings.items():
        if sampling is not None:
            resolved[name] = {**plain[name], "guidance": sampling.guidance_scale(pipeline)}
    if "recipe" in plain:
        resolved["recipe"] = _with_kernel(plain["recipe"], default_kernel(pipeline.path))
    return resolved


def with_recorded_defaults(plain: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Replace nulls of ``guidance`` and ``kernel`` by their values in the configuration ``recorded`` of a run."""
    merged = dict(plain)
    for name, value in plain.items():
        own = recorded.get(name)
        if value is None and name in ("guidance", "kernel"):
            merged[name] = own
        elif isinstance(value, Mapping) and isinstance(own, Mapping):
            merged[name] = with_recorded_defaults(value, own)
    return merged


def _with_kernel(recipe: Mapping[str, Any], kernel: Kernel) -> dict[str, Any]:
    """Fill in the kernel of a recipe as plain JSON, or of the recipe within it."""
    arguments = dict(recipe.get("init_args") or {})
    if arguments.get("kernel", kernel) is None:
        path = f"{type(kernel).__module__}.{type(kernel).__qualname__}"
        arguments["kernel"] = {"class_path": path, "init_args": dict(vars(kernel))}
    if isinstance(arguments.get("recipe"), Mapping):
        arguments["recipe"] = _with_kernel(arguments["recipe"], kernel)
    return {**recipe, "init_args": arguments} if arguments else dict(recipe)
