"""Folders of evaluations that go on where a kill stopped them.

    OUTPUT/evaluation.json            protocol, model and their hashes
    OUTPUT/locks/...                  empty; locked by the process that works on a piece

and, batch by batch, of evaluations in a world:

    OUTPUT/images/... or audio/...    the samples
    OUTPUT/batches/00017.json         the records of batch 17: written last, so that they are whole or absent
    OUTPUT/records.jsonl, summary.json      when all batches are done
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import Protocol, Record, record_as_dict, record_from_dict
from genalign.runtime.file_locks import Claims
from genalign.runtime.files import write_json

MANIFEST = "evaluation.json"


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the settings of a model that change its images, the fingerprint of its weights, and, where it
    wears an adapter, its folder and the hash of its files. Of images that were made elsewhere: their folder and the
    hash of their bytes.
    """

    model: Mapping[str, Any]
    fingerprint: str
    lora: str | None = None
    lora_hash: str | None = None


def adapter_hash(source: Path) -> str:
    """16 hexadecimal characters over the weight files of an adapter, a folder or one file. FileNotFoundError for a
    source without.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{source} has no .safetensors file: give the lora/ folder of a run, or a file; download a Hub's first"
        )
    return content_hash(source, files)


def content_hash(folder: Path, files: Iterable[Path]) -> str:
    """16 hexadecimal characters over the names and bytes of files in a folder."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def manifest(protocol: Protocol, subject: Subject) -> dict[str, Any]:
    """What an evaluation is of. ``protocol_hash`` is the same for all models that may be compared; ``hash`` is over the
    model and its adapter as well, but not over the folder that this came from.
    """
    model = {"model": dict(subject.model), "fingerprint": subject.fingerprint, "lora_hash": subject.lora_hash}
    whole = json.dumps({"protocol": protocol.as_dict(), **model}, sort_keys=True)
    return {
        "hash": hashlib.sha256(whole.encode()).hexdigest()[:16],
        "protocol_hash": protocol.hash,
        "subject": asdict(subject),
        "protocol": protocol.as_dict(),
    }


@dataclass(frozen=True)
class EvaluationFolder:
    """Where an evaluation is kept."""

    path: Path

    def begin(self, found: Mapping[str, Any]) -> None:
        """Make the folder, or go on in one of the same ``manifest``. FileExistsError for one of another."""
        with self.claims.exclusive():
            known = self.manifest()
            if known is None:
                write_json(self.path / MANIFEST, found)
            elif known["hash"] != found["hash"]:
                differing = ", ".join(_differences(known, json.loads(json.dumps(found))))
                raise FileExistsError(
                    f"{self.path} holds an evaluation with other settings ({differing}): choose another output, or"
                    " remove it"
                )

    def manifest(self) -> dict[str, Any] | None:
        """What was begun here; None for nothing."""
        path = self.path / MANIFEST
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    @property
    def claims(self) -> Claims:
        """Who works on what."""
        return Claims(self.path / "locks")


@dataclass(frozen=True)
class BatchFolder(EvaluationFolder):
    """Where an evaluation is kept batch by batch; the batches of two processes are never the same."""

    def _file(self, number: int) -> Path:
        return self.path / "batches" / f"{number:05d}.json"

    def read(self, number: int) -> list[Record] | None:
        """The records of a finished batch; None for one that is not."""
        path = self._file(number)
        return [record_from_dict(row) for row in json.loads(path.read_text("utf-8"))] if path.is_file() else None

    def add(self, number: int, records: Sequence[Record]) -> None:
        """Finish a batch whose samples are there."""
        write_json(self._file(number), [record_as_dict(record) for record in records])


def _differences(known: Any, found: Any, name: str = "") -> list[str]:
    """The settings in which two manifests differ, as "protocol.guidance"; hashes of both are left out."""
    if not (isinstance(known, dict) and isinstance(found, dict)):
        return [] if known == found else [name.removeprefix("subject.")]
    keys = [key for key in dict.fromkeys((*known, *found)) if key not in ("hash", "protocol_hash", "lora")]
    prefix = f"{name}." if name else ""
    return [line for key in keys for line in _differences(known.get(key), found.get(key), f"{prefix}{key}")]
