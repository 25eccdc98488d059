"""Saved samples on a page: thumbnails, as many as fit, and the sample grids of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from genalign.evaluation.report.reading import Row, rounds_done
from genalign.runtime.media import Thumbnail, data_uri, medium_of_file, opened_image

LIST_BYTES = 1_400_000  # of the samples of one list, as base64
GRID_SIDE = 640  # pixels of a picture of several samples
GRID_ROUNDS, CLIP_ROUNDS, CLIPS = 6, 3, 4  # grids of images; grids of clips, and the clips of each

Card = TypeVar("Card")
Drawing = tuple[Thumbnail, str]
"""A sample drawn, and the address of its file from the page; empty if there is none, or if it is played."""


def thumbnail(folder: Path, name: str | None) -> Thumbnail:
    """Draw the file ``name`` in ``folder`` by the medium of its suffix; empty if the sample was not saved.

    Raises ValueError for a damaged file, an unknown suffix, or a clip without soundfile.
    """
    if name is None or not (folder / name).is_file():
        return Thumbnail()
    return medium_of_file(folder / name).thumbnail(folder / name)


def drawing(folder: Path, name: str | None, page: Path) -> Drawing:
    """Draw the file ``name`` in ``folder`` for a page in the folder ``page``."""
    return _linked(thumbnail(folder, name), folder / (name or ""), page)


def _linked(picture: Thumbnail, file: Path, page: Path) -> Drawing:
    address = quote(Path(os.path.relpath(file, page)).as_posix())
    return picture, address if picture.picture and not picture.sound else ""


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


def samples_over_rounds(folder: Path, rows: Sequence[Row]) -> dict[int, list[Drawing]]:
    """The sample grids after the first round, the last and some in between, by the number of rounds.

    A grid is one picture or several clips; if not all grids fit, there are fewer in between.
    """
    grids = [row for row in rows if row.get("sample_grid") and (folder / row["sample_grid"][0]).is_file()]
    if not grids:
        return {}
    limit = GRID_ROUNDS if grids[0]["sample_grid"][0].endswith(".png") else CLIP_ROUNDS
    steps = max(1, min(limit, len(grids)) - 1)
    indices = sorted({round(step * (len(grids) - 1) / steps) for step in range(steps + 1)})
    by_importance = [grids[i] for i in (indices[-1], *indices[:-1])]
    cards = (
        (
            rounds_done(row),
            [_linked(_drawn(folder, name), folder / name, folder) for name in row["sample_grid"][:CLIPS]],
        )
        for row in by_importance
    )
    return dict(sorted(fitting(cards, lambda card: [picture for picture, _ in card[1]])))


def _drawn(folder: Path, name: str) -> Thumbnail:
    """Draw a grid larger than a thumbnail of one image: as it is, or reduced to ``GRID_SIDE`` pixels."""
    path = folder / name
    if path.suffix != ".png" or not path.is_file():
        return thumbnail(folder, name)
    with opened_image(path) as image:
        if max(image.size) <= GRID_SIDE:
            return Thumbnail(data_uri("image/png", path.read_bytes()))
        small = image.convert("RGB")
    small.thumbnail((GRID_SIDE, GRID_SIDE))
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=90)
    return Thumbnail(data_uri("image/webp", buffer.getvalue()))
