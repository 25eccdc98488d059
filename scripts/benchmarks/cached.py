"""Caches measurements on disk, so that an interrupted benchmark resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genalign.runtime.files import write_json


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, or gave before, as ``path`` (JSON) holds it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))
