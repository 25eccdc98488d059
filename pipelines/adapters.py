"""The adapters on a pipeline's networks: put on from a file, saved, and merged into the weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from genalign.diffusion.lora import (
    ADAPTER,
    DIFFUSERS_WEIGHTS,
    adapter_file,
    inject_lora,
    merge_lora,
    multiply_in_input_dtype,
    save_peft,
    sort_metadata,
    student_metadata,
)
from genalign.diffusion.own_adapter import OwnAdapter, kind_of
from genalign.runtime.files import apply_umask, write_json
from genalign.runtime.hub import HubAccess, is_hub_id
from pipelines.adapter_files import read_adapter
from pipelines.checkpoint_files import damage, hub_adapter

logger = logging.getLogger(__name__)

_BASE_FILE = "base.json"  # beside an adapter: the fingerprint of the denoiser that it was trained on


class Adapters:
    """The adapters on the denoiser and the text encoders of one pipeline.

    Args:
        pipe: The pipeline of diffusers.
        denoiser_name: The component that is trained.
        encoder_names: The components that encode texts, which a file may have layers for, too.
        in_diffusers: Whether diffusers saves and loads adapters of this family.
        base: Fingerprint of the denoiser; None for a quantized one, which has another fingerprint than its checkpoint.
        access: Access to adapters on the Hub.
    """

    def __init__(
        self,
        pipe: Any,
        denoiser_name: str,
        encoder_names: Sequence[str],
        in_diffusers: bool,
        base: str | None,
        access: HubAccess,
    ) -> None:
        self.pipe, self.denoiser_name, self.encoder_names = pipe, denoiser_name, encoder_names
        self.in_diffusers, self.base, self.access = in_diffusers, base, access
        self._is_loaded = False  # whether there is an adapter from a file
        self._kind: str | None = None  # of one that is no plain LoRA
        self._on_encoders: dict[str, LoraConfig] = {}  # by component
        self._in_input_dtype: tuple[Any, int] = None, 0  # the denoiser's adapters after ``multiply_in_input_dtype``

    @property
    def are_on_encoders(self) -> bool:
        """Whether text encoders have adapters."""
        return bool(self._on_encoders)

    def load(self, source: str | Path, hint: str = "") -> Mapping[str, str]:
        """Put on an adapter: a run's folder, a folder or file of diffusers, PEFT, kohya or ComfyUI, or a Hub id.

        Args:
            source: The adapter.
            hint: Ends the message where the file's entries do not fit the networks.

        Returns:
            What the file says of a few-step student, see ``student_metadata``.

        Raises:
            ValueError: An adapter of another base checkpoint, or a file with an entry that fits none of the networks.
            FileNotFoundError: No adapter, or pickled weights alone, which are not opened.
        """
        on_hub = is_hub_id(source) and not Path(source).exists()
        path = hub_adapter(str(source), self.access) if on_hub else adapter_file(source)
        base = path.parent / _BASE_FILE
        if self.base is not None and base.is_file() and json.loads(base.read_text())["fingerprint"] != self.base:
            raise ValueError(f"the adapter in {source} was trained on another base checkpoint than this one")
        if (problem := damage(path)) is not None:
            raise ValueError(f"{path} {problem}")
        if own := OwnAdapter.read(path):
            own.attach_to(self.pipe.components[self.denoiser_name])
            self._is_loaded, self._kind = True, kind_of(path)
            logger.info("the adapter %s, %s, is on %s", path, self._kind, self.denoiser_name)
            return student_metadata(path)
        names = [self.denoiser_name, *self.encoder_names]
        networks = {name: network for name in names if (network := self.pipe.components.get(name)) is not None}
        try:
            convert = self._diffusers_names if self.in_diffusers else None
            adapters = read_adapter(path, networks, self.denoiser_name, convert)
        except ValueError as error:
            raise ValueError(f"{error}{hint}") from None
        for name, adapter in adapters.items():
            config = adapter.peft_config()
            inject_lora(networks[name], config, adapter.state)
            if name != self.denoiser_name:
                networks[name].requires_grad_(False)
                self._on_encoders[name] = config
            layers = sum(entry.endswith("lora_A.weight") for entry in adapter.state)
            logger.info("the adapter %s is on %d layers of %s", path, layers, name)
        self._is_loaded = True
        return student_metadata(path)

    def _diffusers_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the names of another implementation's adapter to diffusers'."""
        kind: Any = type(self.pipe)
        unet = {"unet_config": self.pipe.unet.config} if self.denoiser_name == "unet" else {}
        converted = kind.lora_state_dict(dict(state), **unet)
        if not isinstance(converted, tuple):
            return dict(converted)
        names, alphas = converted
        return {**names, **{name: torch.tensor(value) for name, value in (alphas or {}).items()}}

    def save(
        self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig, metadata: Mapping[str, str] = {}
    ) -> None:
        """Write the denoiser's adapter as diffusers' ``load_lora_weights`` expects it, with rank and alpha.

        Adapters on text encoders, with which samples are generated, are written too. PEFT's format is written for a
        family whose adapters diffusers does not load, and for biases of the network, which diffusers' format has no
        names for; genalign's own format for an adapter that is no plain LoRA.

        Args:
            directory: The folder.
            state: The tensors of the denoiser's adapter by PEFT's names.
            config: Its configuration.
            metadata: Further entries of the file's header.

        Raises:
            ValueError: Adapters on text encoders in another format than diffusers', which hold one network's adapter.
        """
        own = OwnAdapter.of(self.pipe.components[self.denoiser_name], state, config)
        if not own.is_plain and not self._on_encoders:
            own.write(directory, metadata)
        elif self.in_diffusers and config.bias == "none" and own.is_plain:
            parts: dict[str, tuple[Mapping[str, Tensor], LoraConfig]] = {self.denoiser_name: (state, config)}
            for name, own in self._on_encoders.items():
                parts[name] = get_peft_model_state_dict(self.pipe.components[name], adapter_name=ADAPTER), own
            layers: dict[str, Any] = {}
            for name, (tensors, settings) in parts.items():
                plain = settings.to_dict().items()
                layers[f"{name}_lora_layers"] = dict(tensors)
                layers[f"{name}_lora_adapter_metadata"] = {k: sorted(v) if isinstance(v, set) else v for k, v in plain}
            type(self.pipe).save_lora_weights(directory, **layers)
            sort_metadata(directory / DIFFUSERS_WEIGHTS, metadata)
            apply_umask(directory)
        elif self._on_encoders:
            raise ValueError(
                "the adapter's layers of the text encoders cannot be saved in this format: train without them"
            )
        else:
            save_peft(directory, state, config, metadata)
        if self.base is not None:
            write_json(directory / _BASE_FILE, {"fingerprint": self.base})

    def merge(self) -> None:
        """Merge the adapters from a file, if there are any, into the weights of their networks.

        Raises ValueError for an adapter that is no plain LoRA.
        """
        if self._kind is not None:
            raise ValueError(f"{self._kind} cannot be merged into the weights: export it with --format genalign")
        if self._is_loaded:
            for name in (self.denoiser_name, *self._on_encoders):
                merge_lora(self.pipe.components[name])
            self._is_loaded, self._on_encoders = False, {}

    def multiply_in_input_dtype(self) -> None:
        """Let adapters that were put on the denoiser since the last call multiply in the dtype of their input."""
        denoiser: nn.Module = self.pipe.components[self.denoiser_name]
        adapters, (earlier, count) = getattr(denoiser, "peft_config", None), self._in_input_dtype
        if adapters is not None and (adapters is not earlier or len(adapters) != count):
            multiply_in_input_dtype(denoiser)
            self._in_input_dtype = adapters, len(adapters)
