"""The embeddings of a pipeline's texts, and the batches in which they are encoded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from genalign.types import Conditioning

Encode = Callable[[list[str]], dict[str, Tensor]]
"""Encodes P texts to named tensors (P, ...) on the CPU."""

BATCH = 64
_CACHE_BYTES = 4 << 30  # one prompt of FLUX takes 4 MiB


class TextEmbeddings:
    """Embeddings by text on the CPU, up to 4 GiB: those used longest ago are dropped first, and encoded again.

    The last bits of an embedding depend on the batch in which its text is encoded; so each text is encoded in the same
    batch every time.
    """

    def __init__(self) -> None:
        self._embeddings: dict[str, dict[str, Tensor]] = {}  # by text, the one used longest ago first
        self._batches: dict[str, list[str]] = {}  # the batch in which a text is encoded
        self._on_device: tuple[dict[str, Tensor], Mapping[str, Tensor]] = {}, {}  # an embedding, and its copy there

    def conditioning(self, prompts: Sequence[str], needed: Collection[str], encode: Encode) -> Conditioning:
        """Return the embeddings of prompts (P, ...) on the CPU, padded with zeros at the end of shorter texts.

        ``needed`` are the prompts and any other texts that must be available; ``encode`` encodes those that are not.
        """
        missing = sorted(text for text in needed if text not in self._embeddings)
        new = [text for text in missing if text not in self._batches]
        self.encode_together([new[start : start + BATCH] for start in range(0, len(new), BATCH)])
        self._embed(missing, encode)
        self._drop_unused(needed)
        rows = [self._embeddings[text] for text in prompts]
        return Conditioning({name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]})

    def on_device(self, text: str, device: torch.device) -> Mapping[str, Tensor]:
        """Return the latest embedding of a text on ``device``, where it stays until another one is needed."""
        embedding = self._embeddings[text]
        if self._on_device[0] is not embedding:  # the bits of an embedding differ by the batch that encoded it
            self._on_device = embedding, Conditioning(embedding).to(device).tensors
        return self._on_device[1]

    @contextlib.contextmanager
    def separate(self) -> Iterator[None]:
        """Encode texts, within the context, without an effect on the batches in which texts are encoded later."""
        batches, embeddings = dict(self._batches), dict(self._embeddings)
        try:
            yield
        finally:
            self._batches, self._embeddings = batches, embeddings

    @property
    def encoded(self) -> list[list[str]]:
        """The batches in which texts were encoded so far."""
        return list({id(batch): batch for batch in self._batches.values()}.values())

    def encode_together(self, batches: Sequence[Sequence[str]]) -> None:
        """Encode the texts of each batch together as soon as one of them is needed.

        ``batches`` are ``encoded`` of an earlier process. Embeddings that exist already stay.
        """
        for batch in map(list, batches):
            self._batches |= dict.fromkeys(batch, batch)

    @torch.no_grad()
    def _embed(self, texts: Sequence[str], encode: Encode) -> None:
        """Encode texts, each together with the others of its batch."""
        for text in texts:
            if text in self._embeddings:
                continue  # since an earlier one of these texts has the same batch
            batch = self._batches[text]
            tensors = encode(batch)
            for place, member in enumerate(batch):  # copies, which are freed one by one
                self._embeddings[member] = {name: tensor[place].clone() for name, tensor in tensors.items()}

    def _drop_unused(self, needed: Collection[str]) -> None:
        """Drop the embeddings used longest ago if there is no room for them, but none of ``needed``."""
        latest = {text: self._embeddings.pop(text) for text in sorted(needed)}
        free = _CACHE_BYTES - sum(tensor.nbytes for row in latest.values() for tensor in row.values())
        for text, row in reversed([*self._embeddings.items()]):
            free -= sum(tensor.nbytes for tensor in row.values())
            if free < 0:
                del self._embeddings[text]
        self._embeddings |= latest
