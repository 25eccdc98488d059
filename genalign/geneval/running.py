"""An evaluation that any number of processes share, and that goes on where a kill stopped it.

    OUTPUT/evaluation.json            protocol, model and their hashes
    OUTPUT/images/00017/...           the images of prompt 17, in GenEval's layout
    OUTPUT/prompts/00017.json         its scores, detections and reasons: written last, so that it is whole or absent
    OUTPUT/locks/00017                empty; locked by the process that works on the prompt
    OUTPUT/records.jsonl, summary.json, results.jsonl, summary.txt      when all prompts are done

A prompt's images are made together, whoever makes them, so that every division of the work gives the same bytes on
like machines. Locks (flock) keep two processes from one prompt; where a shared file system has none between machines,
their ranks do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genalign.checkpoints import write_json, write_text
from genalign.claims import Claims
from genalign.evaluation import Evaluation, Protocol, Record
from genalign.geneval.files import Result, summary, write_results
from genalign.geneval.judging import Judge, Judgement
from genalign.geneval.scoring import Detection
from genalign.geneval.sources import Source
from genalign.processes import Share
from genalign.types import Prompt, PromptSet

SCORES = ("relaxed", "strict", "partial")
_MANIFEST = "evaluation.json"


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the settings of a model that change its images, the fingerprint of its weights, and, where it
    wears an adapter, its folder and the hash of its files. Of images that were made elsewhere: their folder and the
    hash of their bytes."""

    model: Mapping[str, Any]
    fingerprint: str
    lora: str | None = None
    lora_hash: str | None = None


def adapter_hash(source: Path) -> str:
    """16 hexadecimal characters over the weight files of an adapter, a folder or one file. FileNotFoundError for a
    source without."""
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


def verifier(judge: Judge) -> str:
    """A judge's description as the text that a protocol records."""
    return json.dumps(judge.description, sort_keys=True)


def manifest(protocol: Protocol, subject: Subject) -> dict[str, Any]:
    """What an evaluation is of. ``protocol_hash`` is the same for all models that may be compared; ``hash`` is over the
    model and its adapter as well, but not over the folder that this came from."""
    model = {"model": dict(subject.model), "fingerprint": subject.fingerprint, "lora_hash": subject.lora_hash}
    whole = json.dumps({"protocol": protocol.as_dict(), **model}, sort_keys=True)
    return {
        "hash": hashlib.sha256(whole.encode()).hexdigest()[:16],
        "protocol_hash": protocol.hash,
        "subject": asdict(subject),
        "protocol": protocol.as_dict(),
    }


@dataclass(frozen=True)
class GenEvalFolder:
    """Where an evaluation is kept."""

    path: Path

    def begin(self, found: Mapping[str, Any]) -> None:
        """Make the folder, or go on in one of the same ``manifest``. FileExistsError for one of another."""
        with self.claims.alone():
            known = self.manifest()
            if known is None:
                write_json(self.path / _MANIFEST, found)
            elif known["hash"] != found["hash"]:
                differing = ", ".join(_differences(known, json.loads(json.dumps(found))))
                raise FileExistsError(
                    f"{self.path} holds an evaluation with other settings ({differing}): choose another output, or"
                    " remove it"
                )

    def manifest(self) -> dict[str, Any] | None:
        """What was begun here; None for nothing."""
        path = self.path / _MANIFEST
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def subject(self) -> Subject:
        """Whose evaluation was begun here. FileNotFoundError where none was."""
        found = self.manifest()
        if found is None:
            raise FileNotFoundError(f"{self.path} has no {_MANIFEST}: give the output of genalign evaluate geneval")
        return Subject(**found["subject"])

    def _row(self, index: int) -> Path:
        return self.path / "prompts" / f"{index:05d}.json"

    def done(self, index: int) -> bool:
        """Whether a prompt is finished."""
        return self._row(index).is_file()

    @property
    def claims(self) -> Claims:
        """Who works on what."""
        return Claims(self.path / "locks")

    def write(self, index: int, row: Mapping[str, Any]) -> None:
        """Finish a prompt whose images are there."""
        write_json(self._row(index), row)

    def rows(self, count: int) -> list[dict[str, Any]]:
        """What was written of each of the prompts 0..count-1. Raises ValueError where one is not finished."""
        if missing := [index for index in range(count) if not self.done(index)]:
            raise ValueError(f"{len(missing)} of {count} prompts in {self.path} are not finished: start it again")
        return [json.loads(self._row(index).read_text(encoding="utf-8")) for index in range(count)]

    def finish(self, protocol: Protocol, count: int) -> Evaluation:
        """Put the prompts together and write the files that are about all of them. Call it ``claims.alone``."""
        rows = self.rows(count)
        made = Evaluation(protocol, tuple(record for row in rows for record in _records(row)))
        made.save(self.path)
        results = [result for row in rows for result in _results(row)]
        write_results(self.path / "results.jsonl", results)
        write_text(self.path / "summary.txt", summary(results) + "\n")
        return made


def _differences(known: Any, found: Any, name: str = "") -> list[str]:
    """The settings in which two manifests differ, as "protocol.guidance"; hashes of both are left out."""
    if not (isinstance(known, dict) and isinstance(found, dict)):
        return [] if known == found else [name.removeprefix("subject.")]
    keys = [key for key in dict.fromkeys((*known, *found)) if key not in ("hash", "protocol_hash", "lora")]
    prefix = f"{name}." if name else ""
    return [line for key in keys for line in _differences(known.get(key), found.get(key), f"{prefix}{key}")]


@dataclass(frozen=True)
class Work:
    """Prompts whose images are judged."""

    source: Source
    prompts: PromptSet
    judge: Judge
    folder: GenEvalFolder

    def do(self, share: Share) -> Iterator[int]:
        """Every prompt of a share that is not finished; the number of each as it is. One that another process holds is
        left to it."""
        todo = [index for index in share.of(len(self.prompts)) if not self.folder.done(index)]
        if todo:
            self.source.warm_up(self.prompts.prompts[0])
        for index in todo:
            with self.folder.claims.claimed(index) as held:
                if not held or self.folder.done(index):
                    continue
                self.folder.write(index, self._row(index))
            yield index

    def left(self) -> int:
        """How many prompts are not finished."""
        return sum(not self.folder.done(index) for index in range(len(self.prompts)))

    def _row(self, index: int) -> dict[str, Any]:
        prompt = self.prompts.prompts[index]
        samples: list[dict[str, Any]] = []
        for shot in self.source(index, prompt):
            judged = self.judge(shot.images, [prompt] * len(shot.images))
            samples += map(sample_row, shot.files, shot.seeds, judged)
        return prompt_row(index, prompt, samples)


def prompt_row(index: int, prompt: Prompt, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of a prompt, ready for JSON, with the ``sample_row`` of each of its images."""
    return {"index": index, "prompt": prompt.text, "metadata": prompt.metadata, "samples": samples}


def sample_row(file: str, seed: int, found: Judgement | None) -> dict[str, Any]:
    """What is kept of an image."""
    return {"image": file, "seed": seed, **_judged(found)}


def _judged(found: Judgement | None) -> dict[str, Any]:
    if found is None:
        return {"scores": dict.fromkeys(SCORES), "reason": "", "detections": []}
    made = found.verdict
    scores = {"relaxed": float(made.relaxed), "strict": float(made.strict), "partial": made.partial}
    return {"scores": scores, "reason": made.reason, "detections": [asdict(item) for item in found.detections]}


def _records(row: Mapping[str, Any]) -> Iterator[Record]:
    task = Prompt(row["prompt"], row["metadata"]).task
    for number, sample in enumerate(row["samples"]):
        scores = {name: math.nan if value is None else value for name, value in sample["scores"].items()}
        yield Record(row["prompt"], task, number, sample["seed"], sample["image"], scores)


def _results(row: Mapping[str, Any]) -> Iterator[Result]:
    """The images that were judged, as GenEval reports them."""
    prompt = Prompt(row["prompt"], row["metadata"])
    for sample in row["samples"]:
        if sample["scores"]["relaxed"] is not None:
            found = [Detection(**{**item, "box": tuple(item["box"])}) for item in sample["detections"]]
            correct = bool(sample["scores"]["relaxed"])
            yield Result.of(sample["image"], prompt, correct, sample["reason"], found)
