"""People's preferences between two images of a prompt, in the formats that they are published in.

Pick-a-Pic: columns caption, jpg_0 and jpg_1 (the files' bytes), label_0 and label_1 (1 and 0; 0.5 twice for a tie).
HPD: prompt, image_path (a list of files) and human_preference (as many numbers, 1 for the preferred image). Other rows:
prompt, image_0 and image_1 (files), and label_0.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genalign.runtime.media import inside, read_image
from genalign.runtime.text_files import numbered_lines, parse_json

_TEXTS = ("caption", "prompt", "text")
_USERS = ("user", "user_id")


@dataclass(frozen=True)
class JudgedImage:
    """An image of a comparison.

    Attributes:
        prompt: The text that both were made from.
        score: 1 where it was preferred, 0 where the other was, 0.5 for a tie.
        comparison: The name of the comparison.
        content: The path of the file, or its bytes.
        user: The name of who compared; None where the file does not say.
    """

    prompt: str
    score: float
    comparison: str
    content: Path | bytes
    user: str | None = None

    def read(self) -> Tensor:
        """Read the image (3, H, W) in [0, 1]. Raises ValueError for bytes that are no image."""
        if isinstance(self.content, Path):
            return read_image(self.content)
        try:
            with Image.open(io.BytesIO(self.content), formats=("JPEG", "PNG", "WEBP")) as file:
                pixels = np.array(file.convert("RGB"))
        except (OSError, ValueError) as error:
            raise ValueError(f"comparison {self.comparison} has bytes that are no image: {error}") from None
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def read_preferences(path: Path) -> list[JudgedImage]:
    """Read the images of all comparisons of a .jsonl or .parquet file, two or more for each.

    Raises FileNotFoundError for the file or an image that it names, ValueError naming the row that cannot be used.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: give a .jsonl or .parquet file of preferences")
    images = [image for number, row in enumerate(_rows(path), start=1) for image in _images(path, number, row)]
    if not images:
        raise ValueError(f"{path} has no comparison")
    missing = [image.content for image in images if isinstance(image.content, Path) and not image.content.is_file()]
    if missing:
        raise FileNotFoundError(
            f"there is no {missing[0]}, which {path} names ({len(missing)} of its {len(images)} images are missing)"
        )
    return images


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".jsonl":
        for number, line in numbered_lines(path):
            yield parse_json(line, f"{path}, line {number}")
    elif path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"reading {path} needs pyarrow: pip install 'genalign[parquet]'") from None
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    else:
        raise ValueError(f"{path} is no file of preferences: give a .jsonl or .parquet file")


def _images(path: Path, number: int, row: Mapping[str, Any]) -> list[JudgedImage]:
    """The images of one comparison."""
    where = f"{path}, row {number}"
    text = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), None)
    if text is None:
        raise ValueError(f"{where} has no text under {', '.join(_TEXTS)}")
    if "image_path" in row and "human_preference" in row:
        contents: Sequence[Any] = [inside(path.parent, name) for name in row["image_path"]]
        scores = [float(value) for value in row["human_preference"]]
    elif "label_0" in row and ("jpg_0" in row or "image_0" in row):
        kind = "jpg" if "jpg_0" in row else "image"
        contents = [_content(path.parent, row[f"{kind}_{place}"]) for place in (0, 1)]
        first = float(row["label_0"])
        scores = [first, float(row.get("label_1", 1 - first))]
    else:
        raise ValueError(
            f"{where} is no comparison: it needs jpg_0, jpg_1 and label_0 (Pick-a-Pic), image_path and human_preference"
            " (HPD), or image_0, image_1 and label_0"
        )
    if len(contents) != len(scores) or len(scores) < 2:
        raise ValueError(f"{where} has {len(contents)} images and {len(scores)} labels: give as many, and two or more")
    user = next((str(row[name]) for name in _USERS if row.get(name) is not None), None)
    return [
        JudgedImage(text, score, str(number), content, user) for score, content in zip(scores, contents, strict=True)
    ]


def _content(folder: Path, value: Any) -> Path | bytes:
    """A file in the folder, or bytes, which datasets wrap into an object."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) else inside(folder, str(value))
