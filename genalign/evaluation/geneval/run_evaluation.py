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

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genalign.evaluation.evaluate import Evaluation, Protocol, Record
from genalign.evaluation.folder import MANIFEST, EvaluationFolder, Subject
from genalign.evaluation.geneval.image_sources import Source
from genalign.evaluation.geneval.judge import Judge, Judgement
from genalign.evaluation.geneval.result_files import Result, summary, write_results
from genalign.evaluation.geneval.scoring import Detection
from genalign.runtime.distributed import RankShare
from genalign.runtime.files import write_json, write_text
from genalign.types import Prompt, PromptSet

SCORES = ("relaxed", "strict", "partial")


def verifier(judge: Judge) -> str:
    """A judge's description as the text that a protocol records."""
    return json.dumps(judge.description, sort_keys=True)


@dataclass(frozen=True)
class GenEvalFolder(EvaluationFolder):
    """Where an evaluation on GenEval's prompts is kept, prompt by prompt."""

    def subject(self) -> Subject:
        """Whose evaluation was begun here. FileNotFoundError where none was."""
        found = self.manifest()
        if found is None:
            raise FileNotFoundError(f"{self.path} has no {MANIFEST}: give the output of genalign evaluate geneval")
        return Subject(**found["subject"])

    def _row(self, index: int) -> Path:
        return self.path / "prompts" / f"{index:05d}.json"

    def done(self, index: int) -> bool:
        """Whether a prompt is finished."""
        return self._row(index).is_file()

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


@dataclass(frozen=True)
class Work:
    """Prompts whose images are judged."""

    source: Source
    prompts: PromptSet
    judge: Judge
    folder: GenEvalFolder

    def do(self, share: RankShare) -> Iterator[int]:
        """Every prompt of a share that is not finished; the number of each as it is. One that another process holds is
        left to it.
        """
        todo = [index for index in share.indices(len(self.prompts)) if not self.folder.done(index)]
        if todo:
            self.source.warm_up(self.prompts.prompts[0])
        for index in todo:
            with self.folder.claims.try_claim(index) as held:
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
