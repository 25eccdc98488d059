"""One network and its several weights: current, reference, averaged, and named snapshots."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from genalign.diffusion.lora import ADAPTER, put_on
from genalign.runtime.distributed import ALONE, Processes
from genalign.runtime.fsdp import Sharding, divided, lent, put_away, require_sharded, whole

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


class WeightSnapshot:
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
        return {str(index): whole(tensor) for index, tensor in enumerate(self.tensors)}

    def load(self, named: Mapping[str, Tensor]) -> None:
        """Put back what ``named()`` gave."""
        for index, tensor in enumerate(self.tensors):
            tensor.copy_(divided(named[str(index)], tensor))


class Policy:
    """``denoiser`` made trainable: by a new LoRA, by one that is ``has_adapter`` already (under the name ADAPTER), or whole
    where ``lora`` is None.

    The reference policy is the network with its adapters off, or a copy of the first weights where it is trained
    whole. Trainable weights are float32 whatever the network's dtype. ``config`` is PEFT's of the adapter.

    ``processes`` train the same policy, each on its share of the samples. With ``sharding`` the network is divided
    among them: they then run it, and read its weights, together.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        lora: Lora | None,
        ema_decay: float = 0.9,
        seed: int = 0,
        has_adapter: bool = False,
        processes: Processes = ALONE,
        sharding: Sharding | None = None,
    ) -> None:
        self.denoiser = denoiser.requires_grad_(False)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {ema_decay}")
        self.ema_decay, self.processes = ema_decay, processes
        self.updates = 0
        self.config = _adapted(denoiser, lora, seed, has_adapter)
        _require_gradients(denoiser, "lora_" if self.config else "")
        self.sharded = sharding is not None
        if sharding:
            sharding.apply(denoiser)
        self.parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        if sharding:
            require_sharded(self.parameters)
        self.average = WeightSnapshot(self.parameters)
        self._first = None if self.config else WeightSnapshot(self.parameters)

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
            for parameter in self.parameters:  # a divided network has shown the layers others meanwhile
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def using(self, snapshot: WeightSnapshot) -> Iterator[None]:
        """The weights of ``snapshot`` in place of the current ones; they are not to be trained meanwhile."""
        if self.sharded:
            with lent(self.denoiser, self.parameters, snapshot.tensors):
                yield
            return
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
        if self.sharded:
            put_away(self.denoiser)
        self.average.update(self.parameters, min(self.ema_decay, (1 + self.updates) / (10 + self.updates)))

    def sum_gradients(self) -> None:
        """Make the gradients of all processes one, the same in each: their sum."""
        processes = self.processes
        if processes.processes == 1:
            return
        found = torch.tensor([parameter.grad is not None for parameter in self.parameters], dtype=torch.int32)
        processes.sum_([found])
        gradients = []
        for parameter in itertools.compress(self.parameters, found.tolist()):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
        if not self.sharded:
            processes.sum_(gradients)
            return
        for gradient in gradients:  # a mean over the processes already
            gradient.mul_(processes.processes)

    def adapter_state(self) -> dict[str, Tensor]:
        """The current adapter in PEFT's names."""
        state = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)
        return {name: whole(tensor) for name, tensor in state.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Current and averaged weights by index, for a checkpoint of the run."""
        current = {f"current.{i}": whole(parameter.detach()) for i, parameter in enumerate(self.parameters)}
        return current | {f"average.{i}": whole(tensor) for i, tensor in enumerate(self.average.tensors)}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Put back what ``tensors()`` gave."""
        for i, (parameter, average) in enumerate(zip(self.parameters, self.average.tensors, strict=True)):
            parameter.copy_(divided(tensors[f"current.{i}"], parameter))
            average.copy_(divided(tensors[f"average.{i}"], average))
        if self.sharded:
            put_away(self.denoiser)
        self.updates = updates


def _adapted(denoiser: nn.Module, lora: Lora | None, seed: int, has_adapter: bool) -> LoraConfig | None:
    """The configuration of the adapter that ``denoiser`` wears now; None for one that is trained whole, in float32."""
    if lora and not has_adapter:
        _inject(denoiser, lora, seed)
    if lora or has_adapter:
        return cast(LoraConfig, cast(Any, denoiser).peft_config[ADAPTER])
    denoiser.float()
    return None


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


def _require_gradients(denoiser: nn.Module, named: str) -> None:
    """Make the parameters with ``named`` in their names trainable, in float32."""
    for name, parameter in denoiser.named_parameters():
        if named in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
