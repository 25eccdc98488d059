"""The folder of an evaluation, which any number of processes share and which resumes after an interruption.

    OUTPUT/evaluation.json            protocol, model and their hashes
    OUTPUT/prompts.jsonl              prompts with their metadata
    OUTPUT/images/... or audio/...    the samples
    OUTPUT/batches/00017.json         the records of batch 17, written after its samples and atomically
    OUTPUT/features/00017.safetensors its features, for scores of the whole set
    OUTPUT/costs/00017.json           its NFE and seconds
    OUTPUT/locks/00017                empty; locked by the process that works on the batch

and when all batches are done:

    OUTPUT/records.jsonl, summary.json, cost.json, report.html

A batch is made by one process, and does not depend on which: except for costs, the files are byte-identical on machines
of one kind. Locks keep two processes from one batch; on shared file systems without locks, ranks do.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.diffusion.lora import PEFT_CONFIG, adapter_file
from genalign.evaluation.evaluate import (
    Evaluation,
    EvaluationProtocol,
    SampleRecord,
    SetValue,
    record_as_dict,
    record_from_dict,
)
from genalign.evaluation.geneval.result_files import write_prompts
from genalign.runtime.files import Claims, load_state, save_state, write_json
from genalign.runtime.prompt_files import load_prompts
from genalign.types import Prompt, PromptSet, SetReward

MANIFEST, PROMPTS = "evaluation.json", "prompts.jsonl"


@dataclass(frozen=True)
class ModelIdentity:
    """The evaluated model: the settings that change its samples, a hash of its weights, its adapter and a hash of that.

    For samples of another program, ``model`` names their folder and ``fingerprint`` is a hash of their bytes.
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
    """The output folder of one evaluation."""

    path: Path

    def begin(self, new: Mapping[str, Any], prompts: PromptSet) -> None:
        """Create the folder, or resume one with the same ``manifest``. Raises FileExistsError for another manifest."""
        with self.claims.exclusive():
            old = self.manifest()
            if old is None:
                write_prompts(self.path / PROMPTS, prompts)
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

    def prompts(self) -> dict[tuple[str, str], Prompt]:
        """Read the prompts with their metadata, by task and text."""
        return {(prompt.task, prompt.text): prompt for prompt in load_prompts(self.path / PROMPTS).prompts}

    @property
    def claims(self) -> Claims:
        """The locks that keep processes from working on the same batch."""
        return Claims(self.path / "locks")

    def is_done(self, number: int) -> bool:
        """Whether the records of a batch, and with them its samples, are on disk."""
        return self._batch_file(number).is_file()

    def num_unfinished(self, count: int) -> int:
        """Count the batches 0..count-1 that are not finished."""
        return sum(not self.is_done(number) for number in range(count))

    def add(
        self, number: int, records: Sequence[SampleRecord], features: Mapping[str, Tensor], cost: Mapping[str, float]
    ) -> None:
        """Mark a batch as finished by writing its records; its samples must be on disk.

        Args:
            number: The number of the batch.
            records: The records of its samples.
            features: Features (B, d) by name, for scores of the whole set.
            cost: Calls and seconds.
        """
        if features:
            save_state(self.path / "features" / f"{number:05d}.safetensors", features, {})
        write_json(self.path / "costs" / f"{number:05d}.json", dict(cost))
        write_json(self._batch_file(number), [record_as_dict(record) for record in records])

    def features(self, count: int) -> dict[str, Tensor]:
        """Join the features (N, d) of the batches 0..count-1, by name, without rows that are not finite."""
        files = (self.path / "features" / f"{number:05d}.safetensors" for number in range(count))
        parts = [load_state(file)[0] for file in files]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: rows[rows.isfinite().all(1)] for name, rows in joined.items()}

    def finish(
        self, protocol: EvaluationProtocol, count: int, sets: Mapping[str, SetReward] | None = None
    ) -> Evaluation:
        """Join the batches 0..count-1 and write records, summary and cost, while holding ``claims.exclusive``.

        ``sets`` are rewards of the features of the same name. Raises ValueError if a batch is not finished.
        """
        if missing := self.num_unfinished(count):
            raise ValueError(f"{missing} of {count} batches in {self.path} are not finished: start the command again")
        rows = [row for number in range(count) for row in json.loads(self._batch_file(number).read_text("utf-8"))]
        features = self.features(count) if sets else {}
        values = {name: SetValue(reward(features[name]), len(features[name])) for name, reward in (sets or {}).items()}
        evaluation = Evaluation(protocol, tuple(map(record_from_dict, rows)), sets=values)
        evaluation.save(self.path)
        cost = Counter[str]()
        for path in sorted((self.path / "costs").glob("*.json")):
            cost.update(json.loads(path.read_text("utf-8")))
        write_json(self.path / "cost.json", cost)
        return evaluation

    def cost(self) -> dict[str, float]:
        """Read the calls and seconds of a finished evaluation; empty for one that does not record them."""
        path = self.path / "cost.json"
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}

    def _batch_file(self, number: int) -> Path:
        return self.path / "batches" / f"{number:05d}.json"


def _differing_settings(old: Any, new: Any, name: str = "") -> list[str]:
    """Name the settings in which two manifests differ, such as "protocol.guidance", except hashes of both."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [name.removeprefix("subject.")]
    keys = [key for key in dict.fromkeys((*old, *new)) if key not in ("hash", "protocol_hash", "lora")]
    prefix = f"{name}." if name else ""
    return [line for key in keys for line in _differing_settings(old.get(key), new.get(key), f"{prefix}{key}")]
