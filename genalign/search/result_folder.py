"""The output folder of a search, which several processes share and which a new start continues after a kill.

OUTPUT/config.json                                               the settings of the search
OUTPUT/images/00017.png, lineage/00017.json, prompts/00017.json  results of prompt 17; prompts/ is written last
OUTPUT/top/00017/images/00001.png, plain/images/00017.png        its next best samples, and what plain sampling makes
OUTPUT/locks/00017                                               empty; locked while a process works on the prompt
OUTPUT/scores.jsonl                                              the rows of all finished prompts, in order
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from genalign.runtime.files import Claims, write_json, write_text
from genalign.runtime.media import Writer, write_samples
from genalign.search.results import SearchResult


@dataclass(frozen=True)
class SearchFolder:
    """The results of a search, one sample for each prompt."""

    path: Path

    @property
    def claims(self) -> Claims:
        """The locks of prompts that processes work on."""
        return Claims(self.path / "locks")

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Return whether a search of these settings was started. Raises FileExistsError for one of other settings."""
        path = self.path / "config.json"
        if not path.exists():
            return False
        if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(config)):
            raise FileExistsError(f"{self.path} holds a search of other settings: choose another output, or remove it")
        return True

    def begin(self, config: Mapping[str, Any]) -> None:
        """Create the folder, or continue a search of the same settings. Raises FileExistsError for other settings."""
        with self.claims.exclusive():
            if not self.holds(config):
                write_json(self.path / "config.json", config)

    def _row(self, index: int) -> Path:
        return self.path / "prompts" / f"{index:05d}.json"

    def done(self, index: int) -> bool:
        """Return whether a prompt is finished."""
        return self._row(index).is_file()

    def add(self, index: int, result: SearchResult, write: Writer = write_samples) -> None:
        """Write the result of one prompt: its files first, its row last.

        Args:
            index: Position of the prompt.
            result: The search of this prompt alone.
            write: Writes the samples.
        """
        row = result.per_prompt[0].save(self.path, index, write)
        row["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        lineage = {"chosen": result.winners[0], "lives": result.lineage}
        write_json(self.path / "lineage" / f"{index:05d}.json", lineage)
        write_json(self._row(index), row)

    def conclude(self) -> None:
        """Write the rows of all finished prompts into one file. Call it within ``claims.exclusive()``."""
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._row(0).parent.glob("*.json"))]
        write_text(self.path / "scores.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
