"""Which weights of a base model the measurements of a folder are of, so that those of two bases are never mixed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from genalign import assets
from genalign.runtime.files import write_json


def weights_digest(folder: Path) -> str:
    """A digest of all weights below the folder of a model, by their names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def require_base(folder: Path, model: str) -> None:
    """Write into a folder of measurements, as base.json, which weights of ``model`` they are of.

    Exits where its subfolders already hold measurements of other weights, or of weights that it does not name.
    """
    path = folder / "base.json"
    present = {"model": model, "weights": weights_digest(Path(assets.resolve(model)))}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == present:
        return
    if any(folder.glob("*/*")):
        raise SystemExit(
            f"{folder} was made with other weights of {model} than the present ones, or does not say with which:"
            " delete it, or name another folder by --work"
        )
    write_json(path, present)
