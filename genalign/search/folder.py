"""A search's folder, which any number of processes share, and which goes on where a kill stopped it.

OUTPUT/config.json                the search
OUTPUT/images/00017.png, lineage/00017.json, prompts/00017.json   of prompt 17; the last is written last: its row
OUTPUT/locks/00017                empty; locked by the process that works on the prompt
OUTPUT/scores.jsonl               the rows of all that are finished, in order
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genalign.runtime.file_locks import Claims
from genalign.runtime.files import write_json, write_text
from genalign.runtime.media import Writer, write_samples
from genalign.search.run_search import SearchResult


@dataclass(frozen=True)
class SearchFolder:
    """One sample of each prompt, added whole."""

    path: Path

    @property
    def claims(self) -> Claims:
        """Who works on what."""
        return Claims(self.path / "locks")

    def begun(self, config: Mapping[str, Any]) -> bool:
        """Whether it holds this search. Raises FileExistsError for one of another configuration."""
        known = self.path / "config.json"
        if not known.exists():
            return False
        if json.loads(known.read_text(encoding="utf-8")) != json.loads(json.dumps(config)):
            raise FileExistsError(f"{self.path} holds a search of other settings: choose another output, or remove it")
        return True

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the folder, or go on in one of the same search. Raises FileExistsError for another."""
        with self.claims.exclusive():
            if not self.begun(config):
                write_json(self.path / "config.json", config)

    def _row(self, index: int) -> Path:
        return self.path / "prompts" / f"{index:05d}.json"

    def done(self, index: int) -> bool:
        """Whether a prompt is finished."""
        return self._row(index).is_file()

    def add(
        self, index: int, prompt: str, names: Sequence[str], result: SearchResult, write: Writer = write_samples
    ) -> None:
        """The result of one prompt: its files first, its row last."""
        (image,) = write(result.samples, self.path, index)
        write_json(self.path / "lineage" / f"{index:05d}.json", {"chosen": result.chosen[0], "lives": result.lineage})
        known = [value if math.isfinite(value) else None for value in result.scores[0].tolist()]
        row = {
            "index": index,
            "prompt": prompt,
            "scores": dict(zip(names, known, strict=True)),
            "image": image,
            "calls": dict(result.ledger.counts),
            "seconds": result.seconds,
        }
        write_json(self._row(index), row)

    def conclude(self) -> None:
        """Put the rows of all finished prompts together. Call it within ``claims.exclusive()``."""
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._row(0).parent.glob("*.json"))]
        write_text(self.path / "scores.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
