"""Low-rank adapters of any network through PEFT: inject, load, merge and save, without a loader per pipeline."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genalign.runtime.files import apply_umask

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
OWN_WEIGHTS = "genalign_adapter.safetensors"
"""The file of an adapter that is no plain LoRA, see ``genalign.diffusion.own_adapter``."""
STUDENT_GUIDANCE = "genalign.student_guidance"
"""The entry of an adapter's header for the CFG scale that is distilled into a few-step student."""
_PREFIX = "base_model.model."


def inject_lora(network: nn.Module, config: LoraConfig, state: Mapping[str, Tensor] | None = None) -> None:
    """Add the adapter ADAPTER to ``network``, with the weights ``state`` under PEFT's names, or with new weights.

    Raises:
        ValueError: ``state`` does not hold exactly the weights of such an adapter.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict  # takes seconds

    try:
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        if state is None:
            return
        result = set_peft_model_state_dict(network, dict(state), adapter_name=ADAPTER)
        mismatches = [name for name in result.missing_keys if "lora_" in name] + list(result.unexpected_keys)
    except (RuntimeError, ValueError) as error:  # PEFT's, for shapes and for targets that are not there
        mismatches = [str(error).strip().splitlines()[-1].strip()]
    if mismatches:
        raise ValueError(
            f"the adapter does not fit this network, at {mismatches[0]}: choose an adapter of the same base model"
        )
    if meta := [name for name, tensor in network.named_parameters() if "lora_" in name and tensor.is_meta]:
        raise ValueError(f"{len(meta)} weights of the adapter were not loaded, such as {meta[0]}: give the whole file")


@contextlib.contextmanager
def adapters_enabled(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Turn the adapters of ``network`` on or off within the context; afterwards they are as they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    before = [not layer.disable_adapters for layer in layers]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]  # which PEFT changes
    for layer in layers:
        layer.enable_adapters(enabled)
    try:
        yield
    finally:
        for layer, was_enabled in zip(layers, before, strict=True):
            layer.enable_adapters(was_enabled)
        for parameter in trained:
            parameter.requires_grad_(True)


def disable_adapters(network: nn.Module) -> None:
    """Turn the adapters of ``network`` off; their weights stay trainable if they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def multiply_in_input_dtype(network: nn.Module) -> None:
    """Let the adapters of ``network`` multiply in the dtype of autocast, without a float32 copy of each layer's input.

    PEFT casts the input of a layer to the dtype of the adapter's weights, which autocast casts back.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def adapter_file(source: str | Path) -> Path:
    """Find the weight file of an adapter: a .safetensors file, a folder with one, or a folder whose lora/ has one.

    Raises FileNotFoundError if there is none, ValueError for several; pickled weights are not opened.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a .safetensors file: pickled weights are not opened, convert them first")
        return path
    if not path.exists():
        raise FileNotFoundError(f"there is no adapter {path}: give a run's folder, a .safetensors file or a Hub id")
    for folder in (path, path / "lora"):
        for name in (OWN_WEIGHTS, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
            if (folder / name).is_file():
                return folder / name
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files[:5])
            raise ValueError(f"{folder} has {len(files)} .safetensors files ({names}): give one of them")
    pickles = [file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    reason = f": {pickles[0]} is pickled, which is not opened, convert it first" if pickles else ""
    raise FileNotFoundError(
        f"{path} has no .safetensors file of an adapter{reason or ': give a run with lora/, or the file itself'}"
    )


def merge_lora(network: nn.Module) -> None:
    """Add the adapter to the weights of ``network`` and remove its layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds

    adapted = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(adapter_names=[ADAPTER])
        network.set_submodule(name, layer.get_base_layer())
    del cast(Any, network).peft_config


def save_peft(
    directory: Path, state: Mapping[str, Tensor], config: LoraConfig, metadata: Mapping[str, str] = {}
) -> None:
    """Write an adapter folder that ``peft.PeftModel.from_pretrained`` reads; ``metadata`` go into the file's header."""
    ordered = copy.copy(config)  # PEFT keeps sets of names, whose order differs between processes
    vars(ordered).update({key: sorted(value) for key, value in vars(config).items() if isinstance(value, set)})
    ordered.save_pretrained(str(directory))
    tensors = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / PEFT_WEIGHTS, metadata={"format": "pt"})
    if metadata:
        sort_metadata(directory / PEFT_WEIGHTS, metadata)
    apply_umask(directory)


def student_metadata(path: Path) -> dict[str, str]:
    """Read from the header of an adapter's file what it says of a few-step student; empty for any other."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return {name: value for name, value in metadata.items() if name == STUDENT_GUIDANCE}


def sort_metadata(path: Path, added: Mapping[str, str] = {}) -> None:
    """Add entries to the metadata of a safetensors file, and sort it by name, so equal weights give equal bytes.

    safetensors writes several entries of metadata, such as those of diffusers' adapters, in random order.
    """
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **added}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    os.replace(temporary, path)
