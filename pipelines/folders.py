"""Checks of a checkpoint before anything large is read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn


def check_folder(path_or_id: str | Path, wanted: str) -> None:
    """Raise unless ``path_or_id`` is a diffusers folder or a reachable Hub id of the pipeline class ``wanted``."""
    if (found := pipeline_class(path_or_id)) != wanted:
        raise ValueError(f"{path_or_id} holds a {found}, not a {wanted}: use the pipeline of that family")


def pipeline_class(path_or_id: str | Path) -> str:
    """The diffusers class that a checkpoint names."""
    name: str = json.loads(_model_index(path_or_id).read_text()).get("_class_name", "no pipeline")
    return name


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
    return _from_hub(str(path_or_id))


def is_hub_id(source: str | Path) -> bool:
    """Whether it reads owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None


def _from_hub(repository: str) -> Path:
    try:
        return Path(hf_hub_download(repository, "model_index.json"))
    except GatedRepoError:
        raise PermissionError(
            f"{repository} is gated: accept its licence on its Hub page, then run `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repository} is not a folder here, not in the local cache, and the Hub did not give it"
            f" ({type(error).__name__}): check the path, or download it once while online"
        ) from error


def fingerprint(network: nn.Module) -> str:
    """16 hexadecimal characters over the names, shapes and first values of a network's weights, whatever its dtype;
    quantised weights are left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if type(tensor) is not Tensor:  # a subclass holds what is quantised
            continue
        first = tensor.detach().flatten()[:256].to("cpu", torch.float32).half()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]
