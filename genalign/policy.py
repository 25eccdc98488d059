"""One network and its several weights: current, reference, averaged, and named snapshots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from genalign.adapters import ADAPTER, put_on

ATTENTION = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
"""The names that diffusers gives to the projections of attention layers, those of a joint layer's text included."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the linear layers whose names end in one of ``targets``; None takes every projection of
    every attention layer that the network has."""

    rank: int = 32
    alpha: float = 64
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, not {self.rank}")

    def found_in(self, network: nn.Module) -> Sequence[str]:
        """The targets. Raises ValueError where the network has no layer of such a name."""
        names = [name for name, _ in network.named_modules()]
        wanted = ATTENTION if self.targets is None else self.targets
        unmatched = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names)]
        if self.targets is None:
            return [target for target in wanted if target not in unmatched]
        if unmatched:
            raise ValueError(f"this network has no layer named {', '.join(unmatched)}: change lora.targets")
        return self.targets


class Snapshot:
    """A copy of the trainable weights, on the same device."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.tensors = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter], decay: float = 0.0) -> None:
        """Move towards ``parameters``: decay 0 copies, decay near 1 averages slowly."""
        for tensor, parameter in zip(self.tensors, parameters, strict=True):
            tensor.lerp_(parameter.detach(), 1 - decay)

    def named(self) -> dict[str, Tensor]:
        """By index."""
        return {str(index): tensor for index, tensor in enumerate(self.tensors)}

    def load(self, named: Mapping[str, Tensor]) -> None:
        """Put back what ``named()`` gave."""
        for index, tensor in enumerate(self.tensors):
            tensor.copy_(named[str(index)])


class Policy:
    """``denoiser`` made trainable: by a new LoRA, by one that is ``worn`` already (under the name ADAPTER), or whole
    where ``lora`` is None.

    The reference policy is the network with its adapters off, or a copy of the first weights where it is trained
    whole. Trainable weights are float32 whatever the network's dtype. ``config`` is PEFT's of the adapter.
    """

    def __init__(
        self, denoiser: nn.Module, lora: Lora | None, averaging: float = 0.9, seed: int = 0, worn: bool = False
    ) -> None:
        self.denoiser = denoiser.requires_grad_(False)
        if not 0 <= averaging < 1:
            raise ValueError(f"averaging must be a decay in [0, 1), not {averaging}")
        self.averaging = averaging
        self.updates = 0
        if lora and not worn:
            _inject(denoiser, lora, seed)
        self.config: LoraConfig | None = cast(Any, denoiser).peft_config[ADAPTER] if lora or worn else None
        self.parameters = _adapters(denoiser) if self.config else _whole(denoiser)
        self.average = Snapshot(self.parameters)
        self._first = None if self.config else Snapshot(self.parameters)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The policy that training started from."""
        if self._first is not None:
            with self.using(self._first):
                yield
            return
        layers = [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @contextlib.contextmanager
    def using(self, snapshot: Snapshot) -> Iterator[None]:
        """The weights of ``snapshot`` in place of the current ones; they are not to be trained meanwhile."""
        current = [parameter.data for parameter in self.parameters]
        for parameter, tensor in zip(self.parameters, snapshot.tensors, strict=True):
            parameter.data = tensor
        try:
            yield
        finally:
            for parameter, tensor in zip(self.parameters, current, strict=True):
                parameter.data = tensor

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The exponential moving average of the weights, for evaluation and for saving."""
        return self.using(self.average)

    def update_average(self) -> None:
        """One step of the average, to be called after every optimiser step; it starts fast."""
        self.updates += 1
        self.average.update(self.parameters, min(self.averaging, (1 + self.updates) / (10 + self.updates)))

    def adapter_state(self) -> dict[str, Tensor]:
        """The current adapter in PEFT's names."""
        return dict(get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER))

    def tensors(self) -> dict[str, Tensor]:
        """Current and averaged weights by index, for a checkpoint of the run."""
        current = {f"current.{i}": parameter.detach() for i, parameter in enumerate(self.parameters)}
        return current | {f"average.{i}": tensor for i, tensor in enumerate(self.average.tensors)}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Put back what ``tensors()`` gave."""
        for i, (parameter, average) in enumerate(zip(self.parameters, self.average.tensors, strict=True)):
            parameter.copy_(tensors[f"current.{i}"])
            average.copy_(tensors[f"average.{i}"])
        self.updates = updates


def _inject(denoiser: nn.Module, lora: Lora, seed: int) -> None:
    """Put new adapters on; B starts at zero, so that training starts at the reference."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.found_in(denoiser)),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        put_on(denoiser, config)


def _adapters(denoiser: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for name, parameter in denoiser.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def _whole(denoiser: nn.Module) -> list[nn.Parameter]:
    denoiser.float().requires_grad_(True)
    return list(denoiser.parameters())
