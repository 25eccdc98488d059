"""Attention to embeddings of users beside that to the text (PPD, arXiv 2501.06655), in any network of diffusers.

Each layer that attends to the text gets new keys K' and values V' of the user's embedding, and its output Z becomes
Z + softmax(Q K'^T / sqrt(d)) V', with the layer's own queries Q. V' is zero at the start, so training starts
at the network itself. The embedding of a sample without a user is zero, as are its keys and values: such samples are
the network's own.

P prompts, B samples, n tokens of width e in an embedding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from genalign.diffusion.noise import derived_seed, seeded_uniform
from genalign.runtime.distributed import seeded
from genalign.runtime.files import load_state, save_state, with_prefix, without_prefix
from genalign.types import Prompt, users_of

USER = "user"
"""The name of the users' embeddings in a conditioning."""

USERS_FILE = "users.safetensors"
"""The file of users beside an adapter that was trained with them."""

PROJECTIONS = "user_projections"
"""The name that a layer has its keys and values of users under."""


@dataclass(frozen=True)
class Users:
    """The embeddings of users, and the trained projections of a network, if there are any.

    Attributes:
        embeddings: An embedding (n, e) for each user, by name; all of one shape.
        projections: The weights of keys and values by the names of ``projection_state``; empty before training.
    """

    embeddings: Mapping[str, Tensor]
    projections: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        shapes = {tuple(embedding.shape) for embedding in self.embeddings.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"users have embeddings of one shape (tokens, width), not of {sorted(shapes) or 'none'}")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of ``save``. Raises FileNotFoundError or ValueError for another."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: write one with genalign learn-users")
        tensors, _ = load_state(path)
        embeddings = without_prefix("user.", tensors)
        if not embeddings:
            raise ValueError(f"{path} has no embedding of a user: write one with genalign learn-users")
        return cls(embeddings, without_prefix("projection.", tensors))

    def save(self, path: Path) -> None:
        """Write embeddings and projections to a safetensors file."""
        tensors = with_prefix("user.", dict(self.embeddings)) | with_prefix("projection.", dict(self.projections))
        save_state(path, tensors, {})

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (n, e) of an embedding."""
        tokens, width = next(iter(self.embeddings.values())).shape
        return tokens, width

    def rows(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (P, n, e) of the prompts' users: zeros for none, a weighted sum for several.

        Raises ValueError for a user without an embedding.
        """
        return torch.stack([self._of(prompt) for prompt in prompts])

    def _of(self, prompt: str) -> Tensor:
        total = torch.zeros(self.shape)
        for user, weight in users_of(prompt).items():
            if user not in self.embeddings:
                raise ValueError(
                    f"user {user!r} has no embedding ({len(self.embeddings)} others have): add one with genalign"
                    " learn-users --known FILE, or leave the user out"
                )
            total += weight * self.embeddings[user].float()
        return total


class UserProjections(nn.Module):
    """Keys K' and values V' of a layer: linear maps from the width of an embedding, without biases; V' starts at zero.

    ``embeddings`` (B, n, e) are those of the batch that is being computed, None for none. Without ``is_on`` the layer
    is the network's own.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.to_key, self.to_value = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        nn.init.zeros_(self.to_value.weight)
        self.embeddings: Tensor | None = None
        self.is_on = True

    def forward(self, query: Tensor) -> Tensor:
        """Attend from queries (B, heads, L, d) to the users, as (B, L, heads d)."""
        assert self.embeddings is not None, "the layer's hook asks first"
        if len(self.embeddings) != len(query):
            raise ValueError(
                f"this network divides its batch ({len(query)} of {len(self.embeddings)} samples), which users cannot"
                " follow: leave model.users out"
            )
        heads, width = query.shape[1], query.shape[3]
        keys, values = (
            project(self.embeddings).to(query.dtype).unflatten(2, (heads, width)).transpose(1, 2)
            for project in (self.to_key, self.to_value)
        )
        weights = torch.softmax(query @ keys.transpose(2, 3) / math.sqrt(width), dim=-1)
        attended: Tensor = (weights @ values).transpose(1, 2).flatten(2)
        return attended


def attach_users(network: nn.Module, users: Users, seed: int = 0) -> None:
    """Give each layer of ``network`` that attends to the text keys and values of users, new or those of the file.

    Raises ValueError for a network without such layers, or a file of another network.
    """
    layers = {name: layer for name, layer in network.named_modules() if _attends_to_text(layer)}
    if not layers:
        raise ValueError(
            f"{type(network).__name__} has no attention to the text that could also see users: leave model.users out"
        )
    device = next(network.parameters()).device
    with seeded(derived_seed(seed, "users")):
        for layer in layers.values():
            projections = UserProjections(users.shape[1], int(cast(Any, layer).to_q.out_features))
            setattr(layer, PROJECTIONS, projections.to(device))
            layer.register_forward_hook(_add_users, with_kwargs=True)
    if users.projections:
        load_projections(network, users.projections)


@torch.no_grad()
def load_projections(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy trained keys and values of users (``projection_state``) into a network that attends to users.

    Raises ValueError for those of another network.
    """
    own = projection_state(network)
    if wrong := [name for name in own.keys() | state.keys() if _shape(own, name) != _shape(state, name)]:
        raise ValueError(f"the users were trained with another network than this one ({min(wrong)} differs)")
    for name, tensor in state.items():
        own[name].copy_(tensor)


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def projection_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all keys and values of users by name; they share their memory with the network."""
    return {name: weight.data for name, weight in network.named_parameters() if f".{PROJECTIONS}." in f".{name}"}


def projections_of(network: nn.Module) -> list[UserProjections]:
    """List the keys and values of users of a network; none where it has no users."""
    return [module for module in network.modules() if isinstance(module, UserProjections)]


@contextlib.contextmanager
def without_users(network: nn.Module) -> Iterator[None]:
    """Run ``network`` within the context as if no sample had a user."""
    projections = projections_of(network)
    for projection in projections:
        projection.is_on = False
    try:
        yield
    finally:
        for projection in projections:
            projection.is_on = True


@contextlib.contextmanager
def seeing(network: nn.Module, embeddings: Tensor | None) -> Iterator[None]:
    """Run ``network`` within the context on samples of these users (B, n, e)."""
    projections = projections_of(network)
    for projection in projections:
        projection.embeddings = embeddings
    try:
        yield
    finally:
        for projection in projections:
            projection.embeddings = None


def with_user_dropout(prompts: Sequence[Prompt], fraction: float, name: str) -> list[Prompt]:
    """Take the user from a ``fraction`` of the prompts of a round, drawn by its seed ``name``."""
    drawn = seeded_uniform([derived_seed(name, "user dropout", place) for place in range(len(prompts))]).tolist()
    result = []
    for prompt, draw in zip(prompts, drawn, strict=True):
        if draw < fraction:
            others = {name: value for name, value in (prompt.metadata or {}).items() if name != "user"}
            prompt = Prompt(prompt.text, others)
        result.append(prompt)
    return result


def _attends_to_text(layer: Any) -> bool:
    """Whether a module is an attention layer of diffusers whose keys are of the text, alone or beside the image's."""
    if not all(hasattr(layer, name) for name in ("to_q", "to_out", "heads")) or not layer.to_out:
        return False
    is_joint = getattr(layer, "add_k_proj", None) is not None
    is_cross = bool(getattr(layer, "is_cross_attention", False))
    return (is_joint or is_cross) and getattr(layer, "rescale_output_factor", 1.0) == 1.0


def _add_users(layer: Any, inputs: tuple[Tensor, ...], named: Mapping[str, Any], output: Any) -> Any:
    """Add softmax(Q K'^T / sqrt(d)) V' of users, through the layer's output projection, to what it outputs."""
    projections = getattr(layer, PROJECTIONS)
    if projections.embeddings is None or not projections.is_on:
        return output
    hidden = inputs[0] if inputs else named["hidden_states"]
    query = layer.to_q(hidden)
    width = query.shape[-1] // layer.heads
    normalize = getattr(layer, "norm_q", None)
    across_heads = normalize is not None and getattr(normalize, "weight", query).shape[-1] != width
    if normalize is not None and across_heads:
        query = normalize(query)
    query = query.unflatten(2, (layer.heads, width)).transpose(1, 2)
    if normalize is not None and not across_heads:
        query = normalize(query)
    project = layer.to_out[0]
    attended = projections(query)
    added = project(attended) - project(attended.new_zeros(1, 1, attended.shape[2]))  # without the bias once more
    if isinstance(output, tuple):
        return (output[0] + added.to(output[0].dtype), *output[1:])
    return output + added.to(output.dtype)
