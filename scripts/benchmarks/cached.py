"""What was measured is kept, so that an interrupted measurement goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genalign.runtime.files import write_json


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, or gave before, as ``path`` (JSON) holds it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))
