"""The file of a learned reward: trained weights, and what builds the network that they belong to. No pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.reward_learning.heads import AttentionHead, IdentityHead, LinearHead, MLPHead
from genalign.reward_learning.network import Head, HeadShape, Pool, RewardEncoder, RewardNetwork
from genalign.reward_learning.uncertainty import LaplacePosterior
from genalign.runtime.files import load_state, save_state

REWARD = "reward.safetensors"
"""The file of a learned reward in the folder of its training."""

_FORMAT = "genalign learned reward 1"
_HEADS: Mapping[str, Callable[..., HeadShape]] = {
    shape.__name__: shape for shape in (LinearHead, MLPHead, AttentionHead, IdentityHead)
}


@dataclass(frozen=True)
class RewardDescription:
    """What builds the network of a learned reward.

    Attributes:
        encoder: Import path of the encoder's class.
        encoder_arguments: Its arguments.
        encoder_fingerprint: The fingerprint of its frozen weights.
        head: Name of the head's shape, a class of ``genalign.reward_learning.heads``.
        head_arguments: Its arguments.
        members: Number of members.
        dimensions: The names of the dimensions.
        nuisances: The names of the nuisances.
        sample_rate: The sample rate in Hz of the sound that it takes; None for images.
        centered: Whether the scores of a prompt have an origin that members share, so they can be compared.
    """

    encoder: str
    encoder_arguments: Mapping[str, Any]
    encoder_fingerprint: str
    head: str
    head_arguments: Mapping[str, Any]
    members: int
    dimensions: tuple[str, ...]
    nuisances: tuple[str, ...]
    sample_rate: int | None
    centered: bool

    @classmethod
    def of(
        cls,
        network: RewardNetwork,
        shape: HeadShape,
        dimensions: Sequence[str],
        nuisances: Sequence[str] = (),
        centered: bool = False,
    ) -> RewardDescription:
        """Describe a network. Raises ValueError for a head of a class that a file cannot name."""
        kind, encoder = type(shape), network.encoder
        if kind.__name__ not in _HEADS or not is_dataclass(shape):
            raise ValueError(f"{kind.__name__} is not a head of genalign.reward_learning.heads, which files restore")
        path = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
        names = tuple(dimensions), tuple(nuisances)
        read, head = (path, encoder.arguments, encoder.fingerprint()), (kind.__name__, asdict(shape))
        return cls(*read, *head, len(network.heads), *names, encoder.sample_rate, centered)

    def build(
        self, encoder: RewardEncoder, output: int, pool: Pool, posterior: LaplacePosterior | None = None
    ) -> RewardNetwork:
        """Build the network, whose weights have no meaning yet.

        Args:
            encoder: The encoder.
            output: The number of the output that is the score.
            pool: How the members become one.
            posterior: The posterior of this output, if there is one.

        Raises:
            ValueError: The pool compares members, and there is one without a posterior.
        """
        shape, outputs = _HEADS[self.head](**self.head_arguments), len(self.dimensions) + len(self.nuisances)
        with torch.random.fork_rng(devices=[]):
            heads: list[Head] = [shape.build(encoder.width, outputs) for _ in range(self.members)]
        return RewardNetwork(encoder, heads, output, pool, posterior)


def save_reward(
    path: Path, network: RewardNetwork, description: RewardDescription, posteriors: Sequence[LaplacePosterior]
) -> None:
    """Write a learned reward; ``posteriors`` are of its dimensions, or none."""
    tensors = network.trained() | network.buffers_of_scores()
    for column, posterior in enumerate(posteriors):
        tensors |= {f"laplace.{column}.covariance": posterior.covariance, f"laplace.{column}.center": posterior.center}
    precisions = [posterior.precision for posterior in posteriors]
    save_state(path, tensors, {"format": _FORMAT, **asdict(description), "precisions": precisions})


@dataclass(frozen=True)
class RewardFile:
    """A learned reward as it was read: its description, its tensors, and the posteriors of its dimensions, if any."""

    description: RewardDescription
    tensors: Mapping[str, Tensor]
    posteriors: tuple[LaplacePosterior, ...]

    @classmethod
    def read(cls, path: Path) -> RewardFile:
        """Read a file, or that of the folder ``path``. Raises FileNotFoundError without one, ValueError for another."""
        file = path / REWARD if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}: train a reward with genalign reward train")
        tensors, meta = load_state(file)
        if meta.pop("format", None) != _FORMAT or meta.get("head") not in _HEADS:
            raise ValueError(f"{file} is not a learned reward: train one with genalign reward train")
        precisions = meta.pop("precisions")
        posteriors = tuple(
            LaplacePosterior(tensors[f"laplace.{column}.covariance"], tensors[f"laplace.{column}.center"], precision)
            for column, precision in enumerate(precisions)
        )
        meta |= {name: tuple(meta[name]) for name in ("dimensions", "nuisances")}
        return cls(RewardDescription(**meta), tensors, posteriors)

    @torch.no_grad()
    def load_into(self, network: RewardNetwork) -> None:
        """Copy the weights into a network of the description. Raises ValueError where they do not fit."""
        if network.encoder.fingerprint() != self.description.encoder_fingerprint:
            raise ValueError(
                f"the encoder {self.description.encoder} of {dict(self.description.encoder_arguments)} has other"
                " weights than in training, so scores would mean nothing: restore its checkpoint, or train the"
                " reward again"
            )
        own = network.trained() | network.buffers_of_scores()
        saved = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("laplace.")}
        if {name: tensor.shape for name, tensor in own.items()} != {n: tensor.shape for n, tensor in saved.items()}:
            raise ValueError(
                f"the weights do not fit the encoder {self.description.encoder} of"
                f" {dict(self.description.encoder_arguments)}: give the encoder that the reward was trained on"
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])
