"""The embedded checkpoints: ordinary diffusers and open_clip folders."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
_MADE_BY = {
    "shapes-sd3": "scripts/pretrain/shapes_sd3.py",
    "shapes-clip": "scripts/pretrain/shapes_clip.py",
    "tones-audio": "scripts/pretrain/tones_audio.py autoencoder, then denoiser",
    "tones-clap": "scripts/pretrain/tones_audio.py clap",
}


def resolve(path_or_id: str) -> str:
    """The folder of an embedded checkpoint, such as "shapes-sd3"; any other path or Hub id unchanged.

    Raises FileNotFoundError for an embedded one that this installation does not have.
    """
    if path_or_id in names():
        return str(_HERE / path_or_id)
    if path_or_id in _MADE_BY and not Path(path_or_id).exists():
        raise FileNotFoundError(
            f"the embedded model {path_or_id} is not in this installation: make it with python {_MADE_BY[path_or_id]}"
            " in a checkout of the repository, or name another model"
        )
    return path_or_id


def names() -> list[str]:
    """The embedded checkpoints."""
    return sorted(folder.name for folder in _HERE.iterdir() if folder.is_dir() and not folder.name.startswith("_"))
