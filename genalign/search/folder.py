"""A search's folder: one sample of each prompt, added whole, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genalign.checkpoints import write_json, write_text
from genalign.media import Writer, write_images
from genalign.search.running import Result

_SCORES = "scores.jsonl"


@dataclass(frozen=True)
class SearchFolder:
    """Samples, lineage/ and scores.jsonl, a line for each finished prompt."""

    path: Path

    def finished(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows that are finished; none for a folder that is still to be made. Raises FileExistsError for one of
        another configuration."""
        known = self.path / "config.json"
        if known.exists() and json.loads(known.read_text(encoding="utf-8")) != json.loads(json.dumps(config)):
            raise FileExistsError(f"{self.path} holds a search of other settings: choose another output, or remove it")
        return [json.loads(line) for line in self._whole_lines()]

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the folder, or go on in it without a row that an interruption cut off."""
        write_json(self.path / "config.json", config)
        write_text(self.path / _SCORES, "".join(f"{line}\n" for line in self._whole_lines()))

    def _whole_lines(self) -> list[str]:
        scores = self.path / _SCORES
        return scores.read_text(encoding="utf-8").split("\n")[:-1] if scores.exists() else []

    def add(
        self, index: int, prompt: str, names: Sequence[str], result: Result, write: Writer = write_images
    ) -> dict[str, Any]:
        """The result of one prompt: its files first, its row last, which is returned."""
        (image,) = write(result.images, self.path, index)
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
        with (self.path / _SCORES).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")
        return row
