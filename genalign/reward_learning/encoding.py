"""Tokens of the items of preference data: computed once by a frozen encoder and stored, or in every step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genalign.reward_learning.examples import Item
from genalign.reward_learning.item_scores import batches_of_one_shape
from genalign.reward_learning.network import RewardEncoder
from genalign.runtime.files import write_json
from genalign.runtime.text_files import read_json
from genalign.types import AnyCallable, Prompt


class ItemTokens(Protocol):
    """The tokens of items by their numbers."""

    @property
    def nuisances(self) -> Tensor:
        """The measured nuisances (N, J) of all items, on the CPU."""

    def tokens(self, rows: Tensor) -> Tensor:
        """Return tokens (b, n, d) of the items ``rows`` (b,), on the device of training."""


def read_sample(item: Item, encoder: RewardEncoder) -> Tensor:
    """Read the sample of an item as an encoder takes it, an image (3, H, W) or a waveform (C, L).

    Raises:
        ValueError: The file is damaged, or the encoder is of the other modality or another sample rate.
    """
    sample, rate = item.sample.read_with_rate()
    if rate == encoder.sample_rate:
        return sample
    name, what = type(encoder).__name__, f"a sample of {item.prompt.text!r}"
    if rate is None:
        raise ValueError(
            f"{name} is an encoder of sound, and {what} is an image: take an encoder of images, such as ClipTokens"
        )
    if encoder.sample_rate is None:
        raise ValueError(f"{name} is an encoder of images, and {what} is sound: take one of sound, such as ClapTokens")
    raise ValueError(
        f"{what} is at {rate} Hz, and the encoder takes {encoder.sample_rate}: set its sample_rate, or resample the"
        " clips"
    )


def _require_as_many_tokens(encoded: Tensor, count: int, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for tokens (b, n, d) of samples of ``prompts`` that are more or fewer than ``count``."""
    if encoded.shape[1] != count:
        raise ValueError(
            f"a sample of {prompts[0].text!r} has {encoded.shape[1]} tokens, and others have {count}: give clips of one"
            " length, or an encoder with pooled tokens"
        )


@dataclass(frozen=True)
class LiveTokens:
    """Tokens that an encoder computes whenever they are needed, with a gradient for its trained weights.

    Samples of one shape are read together, so images may differ in size.

    Args:
        encoder: The encoder.
        items: The items.
        nuisances: The measured nuisances (N, J) of the items.
        device: Torch device of the samples.
        batch_size: Largest number of samples that the encoder reads at once.
    """

    encoder: RewardEncoder
    items: Sequence[Item]
    nuisances: Tensor
    device: str = "cpu"
    batch_size: int = 64

    def tokens(self, rows: Tensor) -> Tensor:
        """Return tokens (b, n, d) of the items ``rows`` (b,). Raises ValueError where n differs."""
        items = [self.items[row] for row in rows.tolist()]

        def read(place: int) -> tuple[Tensor, Prompt]:
            return read_sample(items[place], self.encoder), items[place].prompt

        order, parts = list[int](), list[Tensor]()
        for places, samples, prompts in batches_of_one_shape(range(len(items)), read, self.batch_size):
            encoded: Tensor = self.encoder(samples.to(self.device, non_blocking=True), prompts)
            order += places
            parts.append(encoded.float())
            _require_as_many_tokens(encoded, parts[0].shape[1], prompts)
        tokens = torch.cat(parts)
        in_order = torch.tensor(order).argsort().to(tokens.device, non_blocking=True)
        return tokens[in_order]


@dataclass(frozen=True)
class StoredTokens:
    """Tokens (N, n, d) float32 that a frozen encoder computed once, in memory or in a file that is mapped to it."""

    stored: npt.NDArray[np.float32] | Tensor
    nuisances: Tensor
    device: str = "cpu"

    def tokens(self, rows: Tensor) -> Tensor:
        tokens = torch.as_tensor(self.stored[rows.numpy()])
        return tokens.to(self.device, non_blocking=True)


def measured_nuisances(items: Sequence[Item], encoder: RewardEncoder, nuisances: Mapping[str, AnyCallable]) -> Tensor:
    """Measure nuisances (N, J) of items, one by one. Raises ValueError for one that is not finite."""
    rows = torch.empty(len(items), len(nuisances))
    for row, item in enumerate(items if nuisances else ()):
        rows[row] = _nuisances_of(read_sample(item, encoder)[None], [item.prompt], nuisances)[0]
    return rows


def _nuisances_of(samples: Tensor, prompts: Sequence[Prompt], nuisances: Mapping[str, AnyCallable]) -> Tensor:
    columns = [nuisance(samples, prompts).detach().float().cpu() for nuisance in nuisances.values()]
    values = torch.stack(columns, dim=1) if columns else torch.empty(len(samples), 0)
    for name, column in zip(nuisances, values.unbind(1), strict=True):
        if not bool(column.isfinite().all()):
            raise ValueError(f"the nuisance {name!r} is not finite for a sample of {prompts[0].text!r}")
    return values


@dataclass(frozen=True)
class TokenFolder:
    """Tokens of items in a folder: tokens.npy (N, n, d), nuisances.npy (N, J), and items.json, which says what is done.

    A killed run continues after the last complete batch. Items are known by the digest of their file and their prompt,
    so that a folder of other items, of other nuisances, or of an encoder with other weights is written again.
    """

    folder: Path

    @torch.no_grad()
    def encode(
        self,
        encoder: RewardEncoder,
        items: Sequence[Item],
        nuisances: Mapping[str, AnyCallable] | None = None,
        batch_size: int = 64,
        device: str = "cpu",
        advance: Callable[[int], None] = lambda count: None,
    ) -> StoredTokens:
        """Encode the items that are not yet, and return the tokens of all.

        Args:
            encoder: A frozen encoder, on ``device``.
            items: The items.
            nuisances: Functions of samples and prompts to numbers, by name.
            batch_size: Largest number of items in a batch; a batch has samples of one shape.
            device: Torch device of the samples.
            advance: Called with the number of items whenever some are done.

        Raises:
            ValueError: A sample cannot be read or encoded, or the samples have different numbers of tokens.
        """
        measures = dict(nuisances or {})
        listed = _description(encoder, items, measures, batch_size)
        done = self._done(listed)
        if not done:
            (self.folder / "items.json").unlink(missing_ok=True)  # before the files that it is about are overwritten
        advance(done)
        tokens = None if done == 0 else np.load(self.folder / "tokens.npy", mmap_mode="r+")
        values = None if done == 0 else np.load(self.folder / "nuisances.npy", mmap_mode="r+")
        self.folder.mkdir(parents=True, exist_ok=True)
        while done < len(items):
            batch, samples = self._next_batch(items[done : done + batch_size], encoder)
            prompts = [item.prompt for item in batch]
            encoded = encoder(samples.to(device), prompts).float().cpu()
            if tokens is None or values is None:
                shapes = (len(items), *encoded.shape[1:]), (len(items), len(measures))
                tokens, values = (
                    np.lib.format.open_memmap(self.folder / name, "w+", np.float32, shape)
                    for name, shape in zip(("tokens.npy", "nuisances.npy"), shapes, strict=True)
                )
            _require_as_many_tokens(encoded, tokens.shape[1], prompts)
            tokens[done : done + len(batch)] = encoded.numpy()
            values[done : done + len(batch)] = _nuisances_of(samples, prompts, measures).numpy()
            tokens.flush()
            values.flush()
            done += len(batch)
            write_json(self.folder / "items.json", {**listed, "done": done})
            advance(len(batch))
        assert tokens is not None and values is not None, "there are items"
        return StoredTokens(tokens, torch.from_numpy(np.array(values)), device)

    @staticmethod
    def _next_batch(items: Sequence[Item], encoder: RewardEncoder) -> tuple[list[Item], Tensor]:
        """Read the first of the items whose samples have one shape."""
        samples = [read_sample(items[0], encoder)]
        for item in items[1:]:
            sample = read_sample(item, encoder)
            if sample.shape != samples[0].shape:
                break
            samples.append(sample)
        return list(items[: len(samples)]), torch.stack(samples)

    def _done(self, listed: Mapping[str, object]) -> int:
        """Return how many items are encoded already; 0 where the folder is of others."""
        if not (self.folder / "items.json").is_file():
            return 0
        before = read_json(self.folder / "items.json")
        done = before.pop("done", 0) if isinstance(before, dict) else 0
        return int(done) if before == json.loads(json.dumps(listed)) else 0


def _description(
    encoder: RewardEncoder, items: Sequence[Item], nuisances: Mapping[str, AnyCallable], batch_size: int
) -> dict[str, object]:
    """Describe as JSON types what tokens are of: the encoder with its weights, the nuisances, and the items by hash.

    A nuisance is described by its import path, or as it prints if it is an object with settings.
    """
    paths = {name: getattr(function, "__qualname__", None) for name, function in nuisances.items()}
    return {
        "encoder": type(encoder).__qualname__,
        "arguments": encoder.arguments,
        "weights": encoder.fingerprint(),
        "nuisances": {
            name: f"{function.__module__}.{paths[name]}" if paths[name] else repr(function)
            for name, function in nuisances.items()
        },
        "batch_size": batch_size,
        "items": [hashlib.sha256(f"{item.digest}\n{item.prompt.text}".encode()).hexdigest()[:32] for item in items],
    }
