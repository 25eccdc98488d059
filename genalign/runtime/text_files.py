"""Read text files that people write: any Unicode encoding with a byte order mark, any line ends."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's, so it is tried first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Read UTF-8, or the encoding that the file's byte order mark names, without the mark; line ends become newlines.

    Raises FileNotFoundError, and ValueError for a file of another encoding.
    """
    content = path.read_bytes()
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise ValueError(f"{path} is not {encoding.removesuffix('-sig').upper()} ({wrong}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, stripped, with their numbers from 1. Raises as ``read_text``.

    Lines end only at a newline: a line or paragraph separator (U+2028, U+0085) may stand within JSON, or a prompt.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def parse_json(text: str, where: str) -> Any:
    """Parse JSON read from ``where``. Raises ValueError that names it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of lists within lists
        raise ValueError(f"{where}: not JSON ({error})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises FileNotFoundError, and ValueError that names the file."""
    return parse_json(read_text(path), str(path))
