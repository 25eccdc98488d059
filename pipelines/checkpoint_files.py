"""Checks of a checkpoint before any large file is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers.pipelines
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from genalign.diffusion.lora import DIFFUSERS_WEIGHTS, OWN_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from genalign.runtime.hub import DEFAULT_ACCESS, HubAccess, download, is_hub_id
from genalign.runtime.text_files import parse_json, read_json
from genalign.training.out_of_memory import is_out_of_memory
from pipelines.checkpoint_settings import is_component

WeightFormat = Literal["safetensors", "bin"]


def check_folder(path_or_id: str | Path, kind: type[DiffusionPipeline], access: HubAccess = DEFAULT_ACCESS) -> None:
    """Check that a path is a complete diffusers folder, or a reachable Hub id, of the pipeline class ``kind``.

    Raises ValueError for another class or for code of its own, FileNotFoundError for missing files.
    """
    index = model_index(path_or_id, access)
    if (name := index["_class_name"]) != kind.__name__:
        raise ValueError(f"{path_or_id} holds a {name}, not a {kind.__name__}: use the pipeline of that family")
    require_components(path_or_id, kind)

    # A component of any other library would be run from the checkpoint's own files, or from a library of its choice
    for component, entry in index.items():
        library = entry[0] if is_component(entry) else None
        if library not in (None, "diffusers", "transformers") and not hasattr(diffusers.pipelines, str(library)):
            raise ValueError(
                f"{path_or_id} takes its {component} from {library!r}, which genalign does not run: only components of"
                " diffusers and transformers are loaded"
            )


def model_index(path_or_id: str | Path, access: HubAccess = DEFAULT_ACCESS) -> dict[str, Any]:
    """Read model_index.json, in which the entry of a component is its library and its class, or two nulls.

    The entry ``_class_name`` is the pipeline's class, or "no pipeline".

    Raises ValueError or FileNotFoundError for a path or an id without this file, or for a folder with a revision,
    PermissionError for a gated model.
    """
    folder = Path(path_or_id)
    file = folder / "model_index.json"
    if folder.exists() and access.revision is not None:
        raise ValueError(f"{folder} is a folder, which has no revision {access.revision!r}: leave model.revision out")
    if folder.is_dir() and not file.is_file():
        raise ValueError(f"{folder} has no model_index.json: give the folder that save_pretrained wrote")
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the diffusers folder (with model_index.json) or a Hub id")
    if not folder.exists():
        if not is_hub_id(path_or_id):
            raise FileNotFoundError(f"{path_or_id} is neither a folder nor a Hub id (owner/name)")
        file = download(str(path_or_id), "model_index.json", access)
    index = read_json(file)
    if not isinstance(index, dict):
        raise ValueError(f"{file} is no object of components: copy it again")
    return {"_class_name": "no pipeline", **index}


@contextlib.contextmanager
def one_line_errors(path_or_id: str | Path) -> Iterator[None]:
    """Raise ValueError, naming the checkpoint, for whatever a library raises on files that do not fit together.

    Its own ValueError and OSError pass, and so does an error of memory.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if "necessary `safetensors` weights" in str(error):  # diffusers', for a repository of the Hub
            raise ValueError(_only_pickled(path_or_id, "")) from error
        raise
    except Exception as error:  # tokenizers raises no other class
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        if type(error).__name__ == "UnpicklingError":  # torch's, whose message says how to run the code in a file
            raise ValueError(f"{path_or_id} has weights that are more than tensors, which is not opened") from error
        raise ValueError(
            f"{path_or_id} cannot be opened ({type(error).__name__}: {error}): copy the whole folder again, or make it"
            " by the versions of diffusers and transformers that are installed"
        ) from error


def absent_components(
    path_or_id: str | Path, kind: type[DiffusionPipeline], access: HubAccess = DEFAULT_ACCESS
) -> list[str]:
    """List the components to open a checkpoint without: those that it leaves out, and missing ones of no use here.

    Of no use for text to image or audio are filters and encoders of images: the optional components of ``kind`` that
    are neither a text encoder nor a tokenizer. A filter without its preprocessor is left out, too.
    """
    folder, index = Path(path_or_id), model_index(path_or_id, access)
    components = {name: None not in entry for name, entry in index.items() if is_component(entry)}
    optional = {name for name in kind._optional_components if not name.startswith(("text_encoder", "tokenizer"))}
    absent = {name for name, named in components.items() if not named}
    if folder.is_dir():
        absent |= {name for name in components if name in optional and not (folder / name).is_dir()}
    if "feature_extractor" in absent and "safety_checker" in components:
        absent.add("safety_checker")
    return sorted(absent)


def require_components(path_or_id: str | Path, kind: type[DiffusionPipeline]) -> None:
    """Check the folders of the needed components that a folder's model_index.json names, and their JSON files.

    Raises FileNotFoundError for a missing folder or vocabulary, ValueError for a file that is not JSON, or a
    configuration without settings.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        return
    named = {name for name, entry in model_index(folder).items() if is_component(entry)}
    needed = sorted(named.difference(absent_components(folder, kind)))
    if missing := [f"{name}/" for name in needed if not (folder / name).is_dir()]:
        raise FileNotFoundError(
            f"{path_or_id} lacks {', '.join(missing)}, which its model_index.json names: copy the whole folder that"
            " save_pretrained wrote"
        )
    for name in needed:
        for file in (folder / name).glob("[!.]*.json"):  # the libraries read plain UTF-8, and do not name the file
            content = parse_json(file.read_text("utf-8", "replace"), str(file))
            if file.name in ("config.json", "scheduler_config.json") and not (isinstance(content, dict) and content):
                raise ValueError(f"{file} holds no settings: copy it again")
        if name.startswith("tokenizer") and not _has_vocabulary(folder / name):
            raise FileNotFoundError(f"{folder / name} has no vocabulary: copy tokenizer.json or vocab.json too")


def _has_vocabulary(tokenizer: Path) -> bool:
    """Return whether a tokenizer's folder has one; transformers would open an empty one without."""
    names = {file.name for file in tokenizer.iterdir()}
    of_bpe = {"vocab.json", "merges.txt"}
    return not names.isdisjoint({"tokenizer.json", "spiece.model", "tokenizer.model"}) or of_bpe <= names


def require_weights(path_or_id: str | Path, weights: WeightFormat = "safetensors", variant: str | None = None) -> None:
    """Check the weights of a folder's networks by the headers of their files, without reading them.

    Args:
        path_or_id: The folder; a Hub id is not checked.
        weights: The kind of files that are read.
        variant: The variant of the weights, such as "fp16", which at least one network must have.

    Raises:
        FileNotFoundError: A network without such weights or with a missing part, or no network with the variant.
        ValueError: A damaged file, or weights that are pickles and were not asked for.
    """
    empty, pickled, names = list[str](), list[str](), list[str]()
    for folder in sorted(file.parent for file in Path(path_or_id).glob("*/config.json")):
        files = [file for file in folder.iterdir() if not file.name.startswith(".")]
        suffixes = {file.suffix for file in files}
        if f".{weights}" not in suffixes:
            (pickled if ".bin" in suffixes else empty).append(f"{folder.name}/")
        for file in files:
            if file.suffix == ".safetensors" and (problem := damage(file)):
                raise ValueError(f"{file} {problem}")
        _require_parts(folder, [file.name for file in files])
        names += [file.name for file in files if file.suffix == f".{weights}"]
    if empty:
        raise FileNotFoundError(f"{path_or_id} has no weights in {', '.join(empty)}: copy the .{weights} files too")
    if pickled:
        raise ValueError(_only_pickled(path_or_id, f" in {', '.join(pickled)}"))
    if variant and names and not any(re.search(rf"\.{re.escape(variant)}[.-]", name) for name in names):
        raise FileNotFoundError(f"{path_or_id} has no weights of the variant {variant!r}: leave model.variant out")


def _only_pickled(path_or_id: str | Path, place: str) -> str:
    return (
        f"{path_or_id} has only pickled weights (.bin){place}: take a checkpoint in safetensors, or ask for these by"
        " model.weights bin"
    )


def _require_parts(folder: Path, names: Sequence[str]) -> None:
    """Raise FileNotFoundError for weights in parts without a part or their index, by the ``names`` of the files."""
    # model.safetensors.index.json, or model.safetensors.index.fp16.json for a variant
    indexes = [name for name in names if ".safetensors.index." in name]
    for index in indexes:
        if missing := sorted({*read_json(folder / index)["weight_map"].values()}.difference(names)):
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: copy all parts of its weights")
    parts = [name for name in names if re.search(r"-\d+-of-\d+\.safetensors$", name)]
    if parts and not indexes:
        raise FileNotFoundError(
            f"{folder} has {parts[0]} without the .safetensors.index.json of all parts: copy it too"
        )


def damage(file: Path) -> str | None:
    """What is wrong with a safetensors file by its header and size, as the end of a message; None if nothing is."""
    with file.open("rb") as content:
        first = content.read(8)
        if first == b"version ":
            return "is a pointer of Git LFS, not the file: run git lfs pull"
        length, size = int.from_bytes(first, "little"), file.stat().st_size
        if len(first) == 8 and length <= size - 8:
            try:
                entries = json.loads(content.read(length))
                ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
                if 8 + length + max(ends, default=0) == size:
                    return None
            except (ValueError, KeyError, TypeError, AttributeError):
                pass
    return "is damaged or incomplete: copy or download it again"


def weight_variant(path_or_id: str | Path, weights: WeightFormat = "safetensors") -> str | None:
    """The variant of a folder's weights, such as "fp16", if a network has no others; None otherwise."""
    for folder in sorted(file.parent for file in Path(path_or_id).glob("*/config.json")):
        names = [file.name for file in folder.glob(f"*.{weights}") if not file.name.startswith(".")]
        variants = {match[1] for name in names if (match := re.search(rf"\.(\w+)(?:-\d+-of-\d+)?\.{weights}$", name))}
        if names and len(variants) == 1 and all(f".{next(iter(variants))}" in name for name in names):
            return variants.pop()
    return None


def component_file(path_or_id: str | Path, component: str, file: str, access: HubAccess = DEFAULT_ACCESS) -> Path:
    """Return the path of a small file of a component, downloaded from the Hub if need be.

    Raises FileNotFoundError or PermissionError if it is not there.
    """
    if not Path(path_or_id).is_dir():
        return download(str(path_or_id), f"{component}/{file}", access)
    path = Path(path_or_id) / component / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path_or_id} lacks {component}/{file}: copy the whole folder that save_pretrained wrote"
        )
    return path


def hub_adapter(source: str, access: HubAccess = DEFAULT_ACCESS) -> Path:
    """Download an adapter's file from the Hub, or find it in the cache. Raises FileNotFoundError if it is nowhere."""
    for name in (DIFFUSERS_WEIGHTS, OWN_WEIGHTS):
        with contextlib.suppress(FileNotFoundError):
            return download(source, name, access)
    download(source, PEFT_CONFIG, access)
    return download(source, PEFT_WEIGHTS, access)


def fingerprint(network: nn.Module) -> str:
    """Hash the names, shapes and first values of a network's weights to 16 hexadecimal characters.

    The dtype does not matter. Quantized weights, and weights on the meta device, are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if type(tensor) is not Tensor or tensor.is_meta:  # quantized weights are of a subclass
            continue
        first = tensor.detach().flatten()[:256].to("cpu", torch.float32).half()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]
