"""Folders of evaluations that resume after an interruption.

    OUTPUT/evaluation.json            protocol, model and their hashes
    OUTPUT/locks/...                  empty; locked by the process that works on a piece

and, in evaluations that are saved batch by batch:

    OUTPUT/images/... or audio/...    the samples
    OUTPUT/batches/00017.json         the records of batch 17, written after its samples and atomically
    OUTPUT/records.jsonl, summary.json      when all batches are done
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genalign.diffusion.lora import PEFT_CONFIG, adapter_file
from genalign.evaluation.evaluate import EvaluationProtocol, SampleRecord, record_as_dict, record_from_dict
from genalign.runtime.files import Claims, write_json

MANIFEST = "evaluation.json"


@dataclass(frozen=True)
class ModelIdentity:
    """The evaluated model: the settings that change its samples, a hash of its weights, its adapter and a hash of that.

    For images from another program, ``model`` names their folder and ``fingerprint`` is a hash of their bytes.
    """

    model: Mapping[str, Any]
    fingerprint: str
    lora: str | None = None
    lora_hash: str | None = None


def adapter_hash(source: Path) -> str:
    """16 hexadecimal characters over the weight file of an adapter, and PEFT's configuration beside it.

    Raises as ``adapter_file``.
    """
    path = adapter_file(source)
    config = path.parent / PEFT_CONFIG
    return content_hash(path.parent, [config, path] if config.is_file() else [path])


def content_hash(folder: Path, files: Iterable[Path]) -> str:
    """16 hexadecimal characters over the names and bytes of files in a folder."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def manifest(protocol: EvaluationProtocol, identity: ModelIdentity) -> dict[str, Any]:
    """Describe an evaluation for evaluation.json.

    Models may be compared if their ``protocol_hash`` is equal; ``hash`` covers the model and its adapter as well, but
    not the adapter's path.
    """
    model = {"model": dict(identity.model), "fingerprint": identity.fingerprint, "lora_hash": identity.lora_hash}
    content = json.dumps({"protocol": protocol.as_dict(), **model}, sort_keys=True)
    return {
        "hash": hashlib.sha256(content.encode()).hexdigest()[:16],
        "protocol_hash": protocol.hash,
        "subject": asdict(identity),
        "protocol": protocol.as_dict(),
    }


@dataclass(frozen=True)
class EvaluationFolder:
    """The output folder of one evaluation, with its manifest and locks."""

    path: Path

    def begin(self, new: Mapping[str, Any]) -> None:
        """Create the folder, or resume one with the same ``manifest``. Raises FileExistsError for another manifest."""
        with self.claims.exclusive():
            old = self.manifest()
            if old is None:
                write_json(self.path / MANIFEST, new)
            elif old["hash"] != new["hash"]:
                differing = ", ".join(_differing_settings(old, json.loads(json.dumps(new))))
                raise FileExistsError(
                    f"{self.path} holds an evaluation with other settings ({differing}): choose another output, or"
                    " remove it"
                )

    def manifest(self) -> dict[str, Any] | None:
        """Read the manifest of the evaluation that this folder holds, if any."""
        path = self.path / MANIFEST
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    @property
    def claims(self) -> Claims:
        """The locks that keep processes from working on the same piece."""
        return Claims(self.path / "locks")


@dataclass(frozen=True)
class BatchFolder(EvaluationFolder):
    """The output folder of an evaluation that is saved batch by batch; each batch belongs to one rank."""

    def read(self, number: int) -> list[SampleRecord] | None:
        """Read the records of a batch; None for an unfinished batch."""
        path = self._batch_file(number)
        return [record_from_dict(row) for row in json.loads(path.read_text("utf-8"))] if path.is_file() else None

    def add(self, number: int, records: Sequence[SampleRecord]) -> None:
        """Mark a batch as finished by writing its records; its samples must be on disk."""
        write_json(self._batch_file(number), [record_as_dict(record) for record in records])

    def _batch_file(self, number: int) -> Path:
        return self.path / "batches" / f"{number:05d}.json"


def _differing_settings(old: Any, new: Any, name: str = "") -> list[str]:
    """Name the settings in which two manifests differ, such as "protocol.guidance", except hashes of both."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [name.removeprefix("subject.")]
    keys = [key for key in dict.fromkeys((*old, *new)) if key not in ("hash", "protocol_hash", "lora")]
    prefix = f"{name}." if name else ""
    return [line for key in keys for line in _differing_settings(old.get(key), new.get(key), f"{prefix}{key}")]
