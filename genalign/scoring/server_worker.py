"""The thread of a reward server that calls the reward: it batches requests, and isolates samples that fail."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from genalign.runtime.distributed import own_device, use_gpu
from genalign.scoring.protocol import Outcome, SampleError
from genalign.scoring.score import described
from genalign.types import Prompt, RewardFunction

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 30


@dataclass(eq=False)
class ScoringJob:
    """A queued request of decoded ``samples``, or the reasons why they could not be decoded.

    ``deadline`` is on the monotonic clock; the answer is None if it passed before the job's turn.
    """

    request_id: str
    samples: Sequence[Tensor | SampleError]
    prompts: Sequence[Prompt]
    deadline: float
    answer: Future[list[Outcome] | None] = field(default_factory=Future)


def score_each(reward: RewardFunction, samples: Tensor, prompts: Sequence[Prompt], name: str) -> list[Outcome]:
    """Score samples (B, ...); if the reward raises, score the halves, so one bad sample loses only its own score.

    Exceptions are logged under ``name`` on the server; the client sees only their type.
    """
    try:
        with torch.no_grad():
            scores = reward(samples, prompts)
        if not isinstance(scores, Tensor) or scores.shape != (len(samples),):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"the reward returned {shape} for {len(samples)} samples")
        return [
            float(score) if math.isfinite(score) else SampleError("unscorable", f"the reward gave {score}")
            for score in scores.tolist()
        ]
    except Exception as error:  # a user's reward may raise anything
        if len(samples) == 1:
            logger.warning("request %s: the reward raised %s", name, described(error))
            return [SampleError("reward_failed", f"the reward raised {type(error).__name__}: see the server's log")]
    half = len(samples) // 2
    left = score_each(reward, samples[:half], prompts[:half], name)
    return left + score_each(reward, samples[half:], prompts[half:], name)


class Worker:
    """The one thread that calls the reward, on ``device``, which "cuda" means in it.

    Requests queued at the same time are scored together, one shape and at most ``max_batch`` samples at a time; no
    request waits for others to come. ``first`` is a sample (C, ...) that is scored before any other, so the reward
    loads its weights.
    """

    def __init__(
        self, reward: RewardFunction, max_batch: int, device: str = "cpu", first: Tensor | None = None
    ) -> None:
        self._reward, self._max_batch, self._device, self._first = reward, max_batch, own_device(device), first
        self._loaded = first is None
        self._queue: queue.SimpleQueue[ScoringJob | None] = queue.SimpleQueue()
        gpu = self._device.index if self._device.type == "cuda" else None
        self._thread = threading.Thread(target=self._run, args=(gpu,), name="genalign-reward", daemon=True)
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

    def _run(self, gpu: int | None) -> None:
        use_gpu(gpu)
        if self._first is not None:
            name = "at the start, of a sample without meaning or metadata"
            score_each(self._reward, self._first[None].to(self._device), [Prompt("a photo")], name)
        self._loaded = True
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
                    failure = SampleError("server_failed", "the server failed: see its log")
                    job.answer.set_result([failure] * len(job.prompts))

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
        """Score the samples of ``jobs``, those of one shape together, and set the answers."""
        outcomes: dict[tuple[int, int], Outcome] = {}  # by the places of the job and the sample in it
        shapes: dict[torch.Size, list[tuple[int, int, Tensor]]] = {}
        for j, job in enumerate(jobs):
            for i, sample in enumerate(job.samples):
                if isinstance(sample, SampleError):
                    outcomes[j, i] = sample
                else:
                    shapes.setdefault(sample.shape, []).append((j, i, sample))
        for rows in shapes.values():
            for first in range(0, len(rows), self._max_batch):
                j_part, i_part, tensors = zip(*rows[first : first + self._max_batch], strict=True)
                samples = torch.stack(tensors).to(self._device)
                prompts = [jobs[j].prompts[i] for j, i in zip(j_part, i_part, strict=True)]
                names = " ".join(dict.fromkeys(jobs[j].request_id for j in j_part))
                scored = score_each(self._reward, samples, prompts, names)
                outcomes |= zip(zip(j_part, i_part, strict=True), scored, strict=True)
        for j, job in enumerate(jobs):
            job.samples = ()  # the server remembers a job for its answer alone
            job.answer.set_result([outcomes[j, i] for i in range(len(job.prompts))])
