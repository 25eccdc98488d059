"""Checks of a checkpoint before anything large is read."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import diffusers.pipelines
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn


def check_folder(path_or_id: str | Path, wanted: str) -> None:
    """Raise unless ``path_or_id`` is a diffusers folder or a reachable Hub id of the pipeline class ``wanted``."""
    if (found := pipeline_class(path_or_id)) != wanted:
        raise ValueError(f"{path_or_id} holds a {found}, not a {wanted}: use the pipeline of that family")
    require_components(path_or_id)
    require_weights(path_or_id)
    require_no_code(path_or_id)


def require_no_code(path_or_id: str | Path) -> None:
    """Raise ValueError for a component that is neither of diffusers nor of transformers: whatever else a checkpoint
    names would be found, and run, in its own files or in a library of its choice.
    """
    for name, entry in model_index(path_or_id).items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if library not in (None, "diffusers", "transformers") and not hasattr(diffusers.pipelines, str(library)):
            raise ValueError(
                f"{path_or_id} takes its {name} from {library!r}, code that is not of diffusers or transformers: it is"
                " not run here"
            )


def pipeline_class(path_or_id: str | Path) -> str:
    """The diffusers class that a checkpoint names."""
    name: str = model_index(path_or_id).get("_class_name", "no pipeline")
    return name


def model_index(path_or_id: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: a component's entry is its library and class, or two nulls."""
    index: dict[str, Any] = json.loads(_model_index(path_or_id).read_text())
    return index


def require_components(path_or_id: str | Path) -> None:
    """Raise FileNotFoundError where a folder lacks a component that its model_index.json names."""
    if not Path(path_or_id).is_dir():
        return
    named = [name for name, entry in model_index(path_or_id).items() if isinstance(entry, list) and None not in entry]
    if lacking := [name for name in named if not (Path(path_or_id) / name).is_dir()]:
        raise FileNotFoundError(
            f"{path_or_id} lacks {', '.join(f'{name}/' for name in lacking)}, which its model_index.json names: copy"
            " the whole folder that save_pretrained wrote"
        )


def require_weights(path_or_id: str | Path) -> None:
    """Raise FileNotFoundError where a network of a folder has a configuration and no weights."""
    configured = [file.parent for file in Path(path_or_id).glob("*/config.json")]
    if empty := [folder.name for folder in configured if not has_weights(folder)]:
        raise FileNotFoundError(
            f"{path_or_id} has no weights in {', '.join(f'{name}/' for name in sorted(empty))}: copy the .safetensors"
            " files too"
        )


def has_weights(folder: Path) -> bool:
    """Whether a component's folder has weight files."""
    return any(file.suffix in (".safetensors", ".bin") for file in folder.glob("*"))


def component_file(path_or_id: str | Path, component: str, file: str) -> Path:
    """A small file of a component, downloaded where it must be. Raises ``FileNotFoundError`` or ``PermissionError``
    where it cannot be had.
    """
    if not Path(path_or_id).is_dir():
        return _from_hub(str(path_or_id), f"{component}/{file}")
    found = Path(path_or_id) / component / file
    if not found.is_file():
        raise FileNotFoundError(
            f"{path_or_id} lacks {component}/{file}: copy the whole folder that save_pretrained wrote"
        )
    return found


def local_folder(path_or_id: str | Path) -> Path:
    """Where the files of a checkpoint are, as far as they were downloaded."""
    return _model_index(path_or_id).parent


def _model_index(path_or_id: str | Path) -> Path:
    folder = Path(path_or_id)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} has no model_index.json: give the folder that save_pretrained wrote")
        return folder / "model_index.json"
    if folder.exists():
        raise ValueError(f"{folder} is a file: give the diffusers folder (with model_index.json) or a Hub id")
    if not is_hub_id(path_or_id):
        raise FileNotFoundError(f"{path_or_id} is neither a folder nor a Hub id (owner/name)")
    return _from_hub(str(path_or_id), "model_index.json")


def is_hub_id(source: str | Path) -> bool:
    """Whether it reads owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None


@functools.cache
def hub_answers(seconds: float = 3.0) -> bool:
    """Whether the Hub can be reached from here at all: its client would try again for some 20 s before it says so. Not
    tried behind a proxy.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((str(address.hostname), address.port or 443), seconds).close()
    except OSError:
        return False
    return True


def _from_hub(repository: str, file: str) -> Path:
    try:
        return Path(hf_hub_download(repository, file, local_files_only=not hub_answers()))
    except GatedRepoError:
        raise PermissionError(
            f"{repository} is gated: accept its licence at https://huggingface.co/{repository}, then run"
            " `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repository} is not a folder here, not in the local cache, and the Hub did not give it"
            f" ({type(error).__name__}): check the path, or download it once while online"
        ) from error


def fingerprint(network: nn.Module) -> str:
    """16 hexadecimal characters over the names, shapes and first values of a network's weights, whatever its dtype;
    quantised weights, and those on the meta device, are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if type(tensor) is not Tensor or tensor.is_meta:  # a subclass holds what is quantised
            continue
        first = tensor.detach().flatten()[:256].to("cpu", torch.float32).half()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]
