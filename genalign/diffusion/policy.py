"""One network with several sets of weights: current, reference, moving average, and snapshots."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from genalign.diffusion.hypernetwork import (
    HYPERNETWORK,
    Hypernetwork,
    add_hypernetwork,
    hypernetwork_of,
    without_hypernetwork,
)
from genalign.diffusion.lora import ADAPTER, adapters_enabled, inject_lora
from genalign.diffusion.noise_shift import make_noise_hypernetwork, shifts_noise, without_shift
from genalign.diffusion.user_attention import PROJECTIONS, projections_of, without_users
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, seeded
from genalign.runtime.files import with_prefix, without_prefix
from genalign.runtime.fsdp import (
    Sharding,
    full_tensor,
    gathered,
    gathered_state,
    local_tensor,
    reshard,
    shard_like,
    with_shards,
)

if TYPE_CHECKING:
    from peft import LoraConfig

ATTENTION = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
"""The names in diffusers of the projections of attention layers, including the text projections of joint layers."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on linear layers.

    Args:
        rank: Rank of the adapter's matrices.
        alpha: Scale of the adapter, which is multiplied by alpha / rank.
        targets: Ends of the names of the layers, such as to_q; null takes all projections of all attention layers.
        hypernetwork: A network that makes gates for the adapter's ranks, from the state of sampling or from the prompt
            (HyperAlign); null trains a plain LoRA.
        frozen: Leave the adapter as it is, new or that of init_lora, and train the attention to users (model.users)
            alone, as in PPD.
    """

    rank: int = 32
    alpha: float = 64
    targets: Sequence[str] | None = None
    hypernetwork: Hypernetwork | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, not {self.rank}")

    def target_modules(self, network: nn.Module) -> Sequence[str]:
        """Resolve the targets against ``network``. Raises ValueError for a target that matches no layer."""
        names = [name for name, _ in network.named_modules() if PROJECTIONS not in name]
        targets = ATTENTION if self.targets is None else self.targets
        unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
        if self.targets is None:
            return [target for target in targets if target not in unmatched]
        if unmatched:
            raise ValueError(f"this network has no layer named {', '.join(unmatched)}: change lora.targets")
        return self.targets


class WeightSnapshot:
    """A copy of the trainable weights, each rank's shards of them if they are sharded.

    Args:
        parameters: The weights.
        on_cpu: Hold the copy on the CPU, in pinned memory if the weights are on a GPU.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], on_cpu: bool = False) -> None:
        self.parameters = parameters
        self.tensors = list[Tensor]()
        for tensor in map(local_tensor, parameters):
            if not on_cpu or tensor.device.type in ("cpu", "meta"):
                self.tensors.append(tensor.clone())
            elif not tensor.is_cuda:
                self.tensors.append(tensor.cpu())
            else:  # without waiting for the GPU
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
                self.tensors.append(pinned.copy_(tensor, non_blocking=True))
        if self.is_elsewhere and parameters[0].is_cuda:
            torch.cuda.synchronize()  # once for all copies

    @property
    def is_elsewhere(self) -> bool:
        """Whether the copy is on another device than the weights."""
        return any(t.device != p.device for t, p in zip(self.tensors, self.parameters, strict=True))

    @torch.no_grad()
    def update(self, decay: float = 0.0) -> None:
        """Move towards the current weights: decay 0 copies them, decay near 1 averages slowly."""
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            tensor.lerp_(local_tensor(parameter).to(tensor.device), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by index; those of a sharded network are gathered, on rank 0."""
        pairs = zip(self.tensors, self.parameters, strict=True)
        return {str(index): gathered(with_shards(tensor, like)) for index, (tensor, like) in enumerate(pairs)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the weights that ``state_dict()`` returned."""
        for index, (tensor, like) in enumerate(zip(self.tensors, self.parameters, strict=True)):
            tensor.copy_(local_tensor(shard_like(state[str(index)], like)))


def _add_adapter(denoiser: nn.Module, lora: Lora, seed: int, has_adapter: bool) -> None:
    """Add a new adapter to a network, unless it has one, and give it the hypernetwork that it lacks."""
    with seeded(seed):  # B starts at zero and gates at 1, so training starts at the reference policy
        if not has_adapter:
            from peft import LoraConfig  # takes seconds

            targets = list(lora.target_modules(denoiser))
            config = LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights="gaussian"
            )
            inject_lora(denoiser, config)
        if lora.hypernetwork and hypernetwork_of(denoiser) is None:
            add_hypernetwork(denoiser, lora.hypernetwork)


class Policy:
    """A trainable denoiser with its reference policy and a moving average of its weights.

    The reference policy is the network with its adapters off or, for full fine-tuning, a copy of the first weights.
    Trainable weights are float32 whatever the network's dtype. In full fine-tuning the network computes in float32,
    too, unless it is sharded; and the reference, the average and other snapshots wait on the CPU until they are used.

    Args:
        denoiser: The network; all weights but the trainable ones are frozen.
        lora: The adapter to train; None trains every weight.
        ema_decay: The decay, per optimizer step, of the exponential moving average of the weights.
        seed: The seed of the weights of a new adapter.
        has_adapter: Whether the network already has an adapter named ADAPTER to train further.
        processes: The process group, whose ranks train the same policy on different samples.
        sharding: FSDP over these ranks, which then run the network and read its weights together.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        lora: Lora | None,
        ema_decay: float = 0.9,
        seed: int = 0,
        has_adapter: bool = False,
        processes: ProcessGroup = SINGLE_PROCESS,
        sharding: Sharding | None = None,
    ) -> None:
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {ema_decay}")
        self.denoiser = denoiser.requires_grad_(False)
        self.ema_decay, self.processes = ema_decay, processes
        self.updates = 0
        self.config: LoraConfig | None = None
        if lora:
            _add_adapter(denoiser, lora, seed, has_adapter)
        if sharding and hypernetwork_of(denoiser):
            raise ValueError("a hypernetwork is not sharded by FSDP: leave lora.hypernetwork out, or launch without it")
        if lora or has_adapter:
            self.config = cast("LoraConfig", cast(Any, denoiser).peft_config[ADAPTER])
        elif sharding is None:
            denoiser.float()
        self._is_frozen = lora is not None and lora.frozen
        for name, parameter in denoiser.named_parameters():
            if self.config is None:
                parameter.requires_grad_(True)
            elif "lora_" in name or name.startswith(f"{HYPERNETWORK}.") or f".{PROJECTIONS}." in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(not (self._is_frozen and "lora_" in name))
        _require_users_fit(denoiser, lora, self.config is not None and sharding is None)
        self.sharded = sharding is not None
        if sharding:
            sharding.apply(denoiser, master_weights=self.config is None)  # which replaces the parameters
        self.parameters = list(filter(lambda parameter: parameter.requires_grad, denoiser.parameters()))
        self.average = self.snapshot()
        self._first = None if self.config else self.snapshot()
        self._current: WeightSnapshot | None = None  # memory for the weights that a snapshot on the CPU displaces

    @property
    def snapshots(self) -> tuple[WeightSnapshot, ...]:
        """The copies of the trainable weights: their average and, for full fine-tuning, the first weights."""
        return (self.average,) if self._first is None else (self.average, self._first)

    @property
    def device(self) -> torch.device:
        """The device of the trainable weights."""
        return self.parameters[0].device

    def snapshot(self) -> WeightSnapshot:
        """Copy the current weights: an adapter's on its device, those of a whole network on the CPU."""
        return WeightSnapshot(self.parameters, on_cpu=self.config is None)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Run the network as the policy that training started from, which sees no users, within the context."""
        if self._first is not None:
            with self.using(self._first):
                yield
            return
        if self._is_frozen:  # the adapter is a part of the network
            with without_users(self.denoiser):
                yield
            return
        try:
            with adapters_enabled(self.denoiser, False), without_shift(self.denoiser), without_users(self.denoiser):
                yield
        finally:
            for parameter in self.parameters:  # FSDP gave the layers other parameters meanwhile
                parameter.requires_grad_(True)

    @property
    def shifts_noise(self) -> bool:
        """Whether the adapter is a noise hypernetwork, which is off except for the shift of the initial noise."""
        return shifts_noise(self.denoiser)

    @property
    def is_plain_lora(self) -> bool:
        """Whether the adapter is a LoRA that other programs can use."""
        return self.config is not None and not self.shifts_noise and hypernetwork_of(self.denoiser) is None

    def shift_noise(self) -> None:
        """Make the adapter a noise hypernetwork. Raises ValueError for a whole network, or one with users."""
        if self.config is None:
            raise ValueError("a noise hypernetwork is an adapter, and the whole network is trained: set lora")
        if projections_of(self.denoiser):
            raise ValueError(f"a noise hypernetwork {_WITHOUT_USERS}")
        if not self.shifts_noise:
            make_noise_hypernetwork(self.denoiser)

    def trained_prediction(self) -> contextlib.AbstractContextManager[None]:
        """Run the network with its adapter on within the context, as the shift of a noise hypernetwork needs it."""
        return adapters_enabled(self.denoiser, True)

    @contextlib.contextmanager
    def using(self, snapshot: WeightSnapshot) -> Iterator[None]:
        """Run the network with the weights of ``snapshot``, within the context; not for training."""
        if self.sharded or snapshot.is_elsewhere:
            with self._copied_in(snapshot):
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

    @contextlib.contextmanager
    def _copied_in(self, snapshot: WeightSnapshot) -> Iterator[None]:
        """Copy ``snapshot`` into the weights within the context, and copy these back.

        FSDP gathers from the memory that the weights had when they were sharded, so they cannot be replaced.
        """
        current, self._current = self._current or self.snapshot(), None  # None for a context within this one
        self._copy(to=current.tensors)
        self._copy(snapshot.tensors)
        try:
            yield
        finally:
            self._copy(current.tensors)
            self._current = current

    @torch.no_grad()
    def _copy(self, tensors: Sequence[Tensor] = (), to: Sequence[Tensor] = ()) -> None:
        """Copy ``tensors`` into the weights, or the weights ``to`` tensors.

        The CPU does not wait for a GPU, whose copies are in order: it changes a snapshot in ``WeightSnapshot.update``
        alone, after a copy that blocks.
        """
        own = [local_tensor(parameter.data) for parameter in self.parameters]  # data: a graph may wait for its backward
        for source, target in zip(tensors or own, to or own, strict=True):
            target.copy_(source, non_blocking=source.is_cuda or target.is_cuda)
        if self.sharded and tensors:
            reshard(self.denoiser)

    def drift(self) -> Tensor:
        """Return the squared distance () of the trained network's weights from the reference policy's, with a gradient.

        That of a LoRA, |s B A|^2, is the sum over layers of s^2 tr((A A^T) (B^T B)), without forming the product.
        Raises ValueError for a frozen adapter, or one with a hypernetwork.
        """
        if self._first is not None:
            first = zip(self.parameters, self._first.tensors, strict=True)
            return torch.stack([(now - was.to(now.device)).square().sum() for now, was in first]).sum()
        if hypernetwork_of(self.denoiser):
            raise ValueError(
                "the weights of an adapter with a hypernetwork differ between samples, and have no distance: set"
                " ascent.anchor in place of ascent.weight_distance"
            )
        if self._is_frozen:
            raise ValueError(
                "lora.frozen trains the attention to users alone, for which there is no distance of weights: set"
                " ascent.anchor in place of ascent.weight_distance"
            )
        from peft.tuners.lora import LoraLayer  # takes seconds

        squares = []
        for layer in self.denoiser.modules():
            if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
                a, b = (factors[ADAPTER].weight.flatten(1) for factors in (layer.lora_A, layer.lora_B))
                squares.append(layer.scaling[ADAPTER] ** 2 * ((a @ a.T) * (b.T @ b)).sum())
        return torch.stack(squares).sum()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Run the network with the moving average of the weights, within the context, to evaluate or save it."""
        return self.using(self.average)

    def update_average(self) -> None:
        """Update the moving average after an optimizer step; its decay is smaller in the first steps."""
        self.updates += 1
        if self.sharded:
            reshard(self.denoiser)
        self.average.update(min(self.ema_decay, (1 + self.updates) / (10 + self.updates)))

    def set_weights(self, snapshot: WeightSnapshot) -> None:
        """Copy ``snapshot`` into the weights, which are trained on from there."""
        self._copy(snapshot.tensors)

    @torch.no_grad()
    def shorten_update(self, before: WeightSnapshot, fraction: float) -> None:
        """Keep a ``fraction`` of the step from the weights ``before`` to the current ones."""
        for parameter, start in zip(self.parameters, before.tensors, strict=True):
            weight = local_tensor(parameter)
            weight.lerp_(start.to(weight.device, non_blocking=True), 1 - fraction)
        if self.sharded:
            reshard(self.denoiser)

    def sum_gradients(self) -> None:
        """Replace each rank's gradients by their sum over all ranks."""
        processes = self.processes
        if processes.world_size == 1:
            return
        has_gradient = torch.tensor([parameter.grad is not None for parameter in self.parameters], dtype=torch.int32)
        processes.all_reduce_([has_gradient])
        gradients = []
        for parameter in itertools.compress(self.parameters, has_gradient.tolist()):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
        if not self.sharded:
            processes.all_reduce_(gradients)
            return
        for gradient in gradients:  # FSDP has taken the mean over ranks already
            gradient.mul_(processes.world_size)

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the current adapter under PEFT's names, and its hypernetwork under the prefix HYPERNETWORK."""
        from peft import get_peft_model_state_dict  # takes seconds

        state = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER)
        hypernetwork = hypernetwork_of(self.denoiser)
        own = with_prefix(f"{HYPERNETWORK}.", hypernetwork.state_dict()) if hypernetwork else {}
        return {name: full_tensor(tensor) for name, tensor in {**without_hypernetwork(state), **own}.items()}

    def network_state(self) -> dict[str, Tensor] | None:
        """Return the state dict of a sharded network, on rank 0, for which every rank must call this; else None."""
        return gathered_state(self.denoiser) if self.sharded else None

    def tensors(self) -> dict[str, Tensor]:
        """Return the current and the averaged weights by index, for a checkpoint of the run."""
        current = {f"current.{i}": gathered(parameter.detach()) for i, parameter in enumerate(self.parameters)}
        return current | with_prefix("average.", self.average.state_dict())

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Restore what ``tensors()`` returned, after ``updates`` optimizer steps."""
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(shard_like(tensors[f"current.{i}"], parameter))
        self.average.load_state_dict(without_prefix("average.", tensors))
        if self.sharded:
            reshard(self.denoiser)
        self.updates = updates


_WITHOUT_USERS = "is not trained beside the attention to users, which needs a plain LoRA: leave model.users out"


def _require_users_fit(denoiser: nn.Module, lora: Lora | None, takes_users: bool) -> None:
    """Raise ValueError where nothing, or not only an adapter and the attention to users, would be trained."""
    has_users = bool(projections_of(denoiser))
    if lora is not None and lora.frozen and not has_users:
        raise ValueError("lora.frozen leaves nothing to train: set model.users, or lora.frozen to false")
    if has_users and hypernetwork_of(denoiser):
        raise ValueError(f"a hypernetwork {_WITHOUT_USERS}")
    if has_users and not takes_users:
        raise ValueError(
            "the attention to users is trained beside an adapter, on one copy of the network: set lora, with frozen to"
            " train the users alone, and leave FSDP out"
        )
