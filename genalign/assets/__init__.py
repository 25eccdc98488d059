"""The embedded checkpoints, ordinary diffusers and open_clip folders, and the presets of training configurations."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
_SCRIPTS = {
    "shapes-sd3": "scripts/pretrain/shapes_sd3.py",
    "shapes-clip": "scripts/pretrain/shapes_clip.py",
    "tones-audio": "scripts/pretrain/tones_audio.py autoencoder, then denoiser",
    "tones-clap": "scripts/pretrain/tones_audio.py clap",
}


def resolve(path_or_id: str) -> str:
    """Return the folder of an embedded checkpoint, such as "shapes-sd3"; any other path or Hub id unchanged.

    Raises FileNotFoundError for an embedded one that this installation does not have.
    """
    if path_or_id in names():
        return str(_HERE / path_or_id)
    if path_or_id in _SCRIPTS and not Path(path_or_id).exists():
        raise FileNotFoundError(
            f"the embedded model {path_or_id} is not in this installation: make it with python {_SCRIPTS[path_or_id]}"
            " in a checkout of the repository, or name another model"
        )
    return path_or_id


def names() -> list[str]:
    """Return the names of the embedded checkpoints of this installation."""
    folders = (folder.name for folder in _HERE.iterdir() if folder.is_dir() and not folder.name.startswith("_"))
    return sorted(set(folders) - {"presets"})


def presets() -> list[str]:
    """Return the names of the presets, such as sd35-medium-80gb."""
    return sorted(file.stem for file in (_HERE / "presets").glob("*.yaml"))


def preset(name: str) -> Path:
    """Return the file of a preset. Raises FileNotFoundError for an unknown name."""
    if name not in presets():
        raise FileNotFoundError(f"there is no preset {name!r}: choose from {', '.join(presets())}")
    return _HERE / "presets" / f"{name}.yaml"
