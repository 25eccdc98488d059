"""The embedded checkpoints: ordinary diffusers and open_clip folders."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def resolve(path_or_id: str) -> str:
    """The folder of an embedded checkpoint, such as "shapes-sd3"; any other path or Hub id unchanged."""
    embedded = _HERE / path_or_id
    return str(embedded) if path_or_id in names() else path_or_id


def names() -> list[str]:
    """The embedded checkpoints."""
    return sorted(folder.name for folder in _HERE.iterdir() if folder.is_dir() and not folder.name.startswith("_"))
