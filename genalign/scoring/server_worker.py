"""The thread of a reward server that calls the reward: it batches requests, and isolates samples that fail."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from genalign.scoring.protocol import SampleError
from genalign.types import Prompt, RewardFunction

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 30


@dataclass(frozen=True)
class Scored:
    """One sample's score, or None and the reason."""

    score: float | None
    error: SampleError | None = None


@dataclass(eq=False)
class ScoringJob:
    """A queued request with decoded ``samples``, or the reason why one could not be decoded. ``deadline`` is on the
    monotonic clock; the answer is None if it passed before the job's turn.
    """

    request_id: str
    samples: Sequence[Tensor | SampleError]
    prompts: Sequence[Prompt]
    deadline: float
    answer: Future[list[Scored] | None] = field(default_factory=Future)


def score_each(reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt], name: str) -> list[Scored]:
    """Score samples (B, ...); if the reward raises, score the halves, so that one bad sample loses only its own score.

    Exceptions are logged under ``name`` on the server; the client sees only their type.
    """
    try:
        with torch.no_grad():
            scores = reward(samples, prompts)
        if not isinstance(scores, Tensor) or scores.shape != (len(samples),):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"the reward returned {shape} for {len(samples)} samples")
        return [_scored(score) for score in scores.tolist()]
    except Exception as error:  # a user's reward may raise anything
        if len(samples) == 1:
            logger.warning("request %s: the reward raised %s: %s", name, type(error).__name__, error)
            reason = SampleError("reward_failed", f"the reward raised {type(error).__name__}: see the server's log")
            return [Scored(None, reason)]
    half = len(samples) // 2
    left = score_each(reward, samples[:half], prompts[:half], name)
    return left + score_each(reward, samples[half:], prompts[half:], name)


def _scored(score: float) -> Scored:
    if abs(score) < float("inf"):
        return Scored(float(score))
    return Scored(None, SampleError("unscorable", f"the reward gave {score}"))


class Worker:
    """The one thread that calls the reward, on ``device``. Requests queued at the same time are scored together,
    one shape and at most ``max_batch`` samples at a time; no request waits for others to come. ``first`` is a sample
    (C, ...) that is scored before any other, so that the reward loads its weights.
    """

    def __init__(
        self, reward: RewardFunction, max_batch: int, device: str = "cpu", first: Tensor | None = None
    ) -> None:
        self._reward, self._max_batch, self._device, self._first = reward, max_batch, device, first
        self._loaded = first is None
        self._queue: queue.SimpleQueue[ScoringJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="genalign-reward", daemon=True)
        self._thread.start()

    def submit(self, job: ScoringJob) -> None:
        """Queue a request; the worker sets ``job.answer`` later."""
        self._queue.put(job)

    def state(self) -> Literal["loading", "ready", "stopping"]:
        """Return whether the reward is still loading, ready, or stopped."""
        if not self._thread.is_alive():
            return "stopping"
        return "ready" if self._loaded else "loading"

    def close(self) -> None:
        """Score all queued requests, then stop the thread."""
        self._queue.put(None)
        self._thread.join(DRAIN_SECONDS)

    def _load(self) -> None:
        if self._first is not None:
            tried, name = self._first[None].to(self._device), "at the start, of a sample without meaning or metadata"
            score_each(self._reward, tried, [Prompt("a photo")], name)
        self._loaded = True

    def _run(self) -> None:
        self._load()
        while jobs := self._next_batch():
            due = [job for job in jobs if job.deadline > time.monotonic()]
            for job in jobs:
                if job not in due:
                    job.answer.set_result(None)
            try:
                self._score(due)
            except Exception:  # the thread must outlive whatever happens to one batch
                logger.exception("requests %s", " ".join(job.request_id for job in due))
                for job in due:
                    error = SampleError("server_failed", "the server failed: see its log")
                    job.answer.set_result([Scored(None, error)] * len(job.prompts))

    def _next_batch(self) -> list[ScoringJob]:
        """Return the next request and those behind it, up to ``max_batch`` samples; empty when closed."""
        job = self._queue.get()
        jobs = [] if job is None else [job]
        while jobs and sum(len(job.samples) for job in jobs) < self._max_batch and not self._queue.empty():
            following = self._queue.get()
            if following is None:
                self._queue.put(None)
                break
            jobs.append(following)
        return jobs

    def _score(self, jobs: Sequence[ScoringJob]) -> None:
        results = [[_unread(sample) for sample in job.samples] for job in jobs]
        for rows in self._batches(jobs):
            samples = torch.stack([tensor for _, _, tensor in rows]).to(self._device)
            prompts = [jobs[j].prompts[i] for j, i, _ in rows]
            names = " ".join(dict.fromkeys(jobs[j].request_id for j, _, _ in rows))
            for (j, i, _), scored in zip(rows, score_each(self._reward, samples, prompts, names), strict=True):
                results[j][i] = scored
        for job, result in zip(jobs, results, strict=True):
            job.samples = ()  # it is remembered for its answer alone
            job.answer.set_result(result)

    def _batches(self, jobs: Sequence[ScoringJob]) -> Iterator[list[tuple[int, int, Tensor]]]:
        """Yield (job, sample, tensor) triples of one shape, at most ``max_batch`` at a time."""
        shapes: dict[torch.Size, list[tuple[int, int, Tensor]]] = {}
        for j, job in enumerate(jobs):
            for i, sample in enumerate(job.samples):
                if isinstance(sample, Tensor):
                    shapes.setdefault(sample.shape, []).append((j, i, sample))
        for rows in shapes.values():
            for first in range(0, len(rows), self._max_batch):
                yield rows[first : first + self._max_batch]


def _unread(sample: Tensor | SampleError) -> Scored:
    return Scored(None, sample if isinstance(sample, SampleError) else None)
