"""The engine of every evaluation: batches of samples are made, saved and scored, each by one process.

``evaluate`` divides the batches over the ranks of a training run, which all need the result. ``evaluate_share`` works
in a folder that any number of processes share: a batch belongs to the process that holds its lock, and one that is
finished is not done again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.evaluation.evaluate import (
    Evaluation,
    EvaluationProtocol,
    SampleRecord,
    record_as_dict,
    record_from_dict,
)
from genalign.evaluation.folder import EvaluationFolder
from genalign.evaluation.scorers import SampleScorer
from genalign.evaluation.sources import SampleSource, SourceBatch
from genalign.runtime.distributed import SINGLE_PROCESS, ProcessGroup, RankShare
from genalign.runtime.media import writer
from genalign.runtime.progress import SILENT, Progress
from genalign.scoring.budget import Ledger
from genalign.types import FeatureFunction

SampleWriter = Callable[[SourceBatch, Path, int], list[str]]
"""Saves a batch, whose first sample has a number, in a folder; returns the files' names relative to the folder."""


def numbered_files(sample_rate: int | None) -> SampleWriter:
    """Save samples as images/00000.png, ..., or as audio/00000.wav, ... at ``sample_rate`` Hz."""
    write = writer(sample_rate)
    return lambda batch, folder, first: write(batch.samples, folder, first)


def evaluate(
    source: SampleSource,
    scorer: SampleScorer,
    protocol: EvaluationProtocol,
    output: Path | None = None,
    write: SampleWriter | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    progress: Progress = SILENT,
) -> Evaluation:
    """Score all samples of ``source`` on the ranks of a run, each of which returns the whole evaluation.

    Args:
        source: The samples.
        scorer: Scores the samples.
        protocol: The settings that the source was made by, saved with the results.
        output: A folder, visible to all ranks, for the samples and at the end the evaluation; None saves nothing.
        write: Saves a batch of samples in ``output``; None numbers the files.
        processes: Ranks that share the batches.
        progress: Display of the samples of this rank.

    Raises:
        ValueError: There is no sample.
        RewardError: A reward cannot be used.
    """
    if not source.specs:
        raise ValueError("an evaluation needs at least one sample")
    write, own = write or numbered_files(None), list[list[Any]]()
    with progress.phase("sampling", len(source.specs)) as advance:
        for number in processes.batch_numbers(len(source)):
            if number < len(source):
                records, _ = _scored_batch(source, number, scorer, output, write, {})
                own.append([number, [record_as_dict(record) for record in records]])
                advance(len(records) * processes.world_size)
            else:
                list(source.batch(number % len(source)))  # so that every rank runs a sharded network

    # Gather the batches of all ranks, and join them in order
    gathered = sorted((row for rank in processes.all_gather_object(own) for row in rank), key=lambda row: row[0])
    evaluation = Evaluation(protocol, tuple(record_from_dict(row) for _, batch in gathered for row in batch))
    if output and processes.is_main:
        evaluation.save(output)
    return evaluation


def evaluate_share(
    source: SampleSource,
    scorer: SampleScorer,
    folder: EvaluationFolder,
    write: SampleWriter,
    features: Mapping[str, FeatureFunction] | None = None,
    share: RankShare = SINGLE_PROCESS,
    ledger: Ledger | None = None,
    progress: Progress = SILENT,
) -> None:
    """Score a rank's share of ``source`` in a folder, without batches that are finished or that other processes hold.

    Args:
        source: The samples.
        scorer: Scores the samples.
        folder: The folder of the evaluation, whose ``finish`` joins the batches.
        write: Saves a batch of samples in the folder.
        features: Features (B, d) of samples (B, ...), by name, that are saved for scores of the whole set.
        share: The rank's share of the batches.
        ledger: The ledger of a pipeline whose calls are counted; the cost of each batch is saved.
        progress: Display of all samples of the share.
    """
    ledger = ledger or Ledger()
    numbers, size = [n for n in share.indices(len(source)) if not folder.is_done(n)], source.batch_size
    sizes = {number: len(range(len(source.specs))[number * size : (number + 1) * size]) for number in numbers}
    with progress.phase("sampling", sum(sizes.values())) as advance:
        for number in numbers:
            with folder.claims.try_claim(number) as claimed:
                if claimed and not folder.is_done(number):
                    start, before = time.perf_counter(), ledger.copy()
                    records, rows = _scored_batch(source, number, scorer, folder.path, write, features or {})
                    calls = {name: n for name, n in ledger.since(before).counts.items() if n}
                    folder.add(number, records, rows, {**calls, "seconds": time.perf_counter() - start})
            advance(sizes[number])


def _scored_batch(
    source: SampleSource,
    number: int,
    scorer: SampleScorer,
    output: Path | None,
    write: SampleWriter,
    features: Mapping[str, FeatureFunction],
) -> tuple[list[SampleRecord], dict[str, Tensor]]:
    """Make, save and score a batch; return its records, and the rows of its features (B, d) by name."""
    records, rows = list[SampleRecord](), {name: list[Tensor]() for name in features}
    for batch in source.batch(number):
        records += _scored(batch, scorer, output, write, number * source.batch_size + len(records))
        with torch.no_grad():
            for name, function in features.items():
                rows[name].append(function(batch.samples).float().cpu())
    return records, {name: torch.cat(parts) for name, parts in rows.items()}


def _scored(
    batch: SourceBatch, scorer: SampleScorer, output: Path | None, write: SampleWriter, first: int
) -> list[SampleRecord]:
    """Save samples, unless they are saved or there is no folder, and score them; they are numbered from ``first``."""
    files: list[str] | list[None] = [None] * len(batch.specs)
    if output and batch.files:
        files = [os.path.relpath(path, output) for path in batch.files]
    elif output:
        files = write(batch, output, first)
    scores = scorer(batch.samples, [spec.prompt for spec in batch.specs])
    return [
        SampleRecord(spec.prompt.text, spec.prompt.task, spec.sample, spec.seed, file, score.scores, score.details)
        for spec, file, score in zip(batch.specs, files, scores, strict=True)
    ]
