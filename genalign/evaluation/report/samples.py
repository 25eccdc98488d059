"""Thumbnails of saved samples on a page, as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from genalign.runtime.media import Thumbnail, medium_of_file

LIST_BYTES = 1_400_000  # of the samples of one list, as base64: two lists and the charts stay under 5 MB

Card = TypeVar("Card")


def thumbnail(folder: Path, name: str | None) -> Thumbnail:
    """Draw the file ``name`` in ``folder`` by the medium of its suffix; empty if the sample was not saved.

    Raises ValueError for a damaged file, an unknown suffix, or a clip without soundfile.
    """
    if name is None or not (folder / name).is_file():
        return Thumbnail()
    return medium_of_file(folder / name).thumbnail(folder / name)


def fitting(cards: Iterable[Card], samples: Callable[[Card], Sequence[Thumbnail]]) -> list[Card]:
    """Return the first ``cards`` whose samples together take at most ``LIST_BYTES``."""
    selected: list[Card] = []
    spent = 0
    for card in cards:
        spent += sum(map(len, samples(card)))
        if spent > LIST_BYTES:
            break
        selected.append(card)
    return selected
