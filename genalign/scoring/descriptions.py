"""What identifies a reward or a judge in a file, in JSON types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from genalign.runtime.media import image_files


def describe(part: Any) -> Any:
    """Describe a reward, or a part of one, in JSON types: its own ``description``, its class and settings, or its name.

    A folder of images is described by the names and sizes of its files, wherever it lies.
    """
    if isinstance(part, Path):
        files = [[path.relative_to(part).as_posix(), path.stat().st_size] for path in image_files(part)]
        return {"images": len(files), "hash": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}
    if isinstance(description := getattr(part, "description", None), Mapping):
        return dict(description)
    if is_dataclass(part) and not isinstance(part, type):
        return {
            "class": type(part).__name__,
            **{item.name: describe(getattr(part, item.name)) for item in fields(part)},
        }
    if isinstance(part, Mapping):
        return {str(key): describe(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [describe(value) for value in part]
    if part is None or isinstance(part, str | int | float):
        return part
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"
