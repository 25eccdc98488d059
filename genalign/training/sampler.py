"""The samples of a round: from prompts to trajectories, decoded samples and scores.

B = P prompts x G samples, S stored steps, K rewards.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from genalign.algorithms.recipe import Recipe
from genalign.algorithms.redraws import Member
from genalign.diffusion.completion import complete
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import Rollout, RolloutInputs, kernel_per_step, rollout, rows_are_finite
from genalign.diffusion.transitions import ODE, Kernel
from genalign.diffusion.user_attention import with_user_dropout
from genalign.runtime.distributed import ALL_RANKS, RankShare, current_gpu, use_gpu
from genalign.runtime.progress import SILENT, Phase, Progress
from genalign.runtime.streams import Handover
from genalign.scoring.score import NamedReward, score
from genalign.training.out_of_memory import PartSizes
from genalign.training.settings import FittedSettings
from genalign.types import FeatureFunction, Grid, Pipeline, Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class SampledBatch:
    """A batch of a round: trajectories, scores as in ``RoundScores``, and decoded samples (B, ...) if they are kept."""

    rollout: Rollout
    samples: Tensor | None
    scores: Tensor
    stepwise: Tensor | None
    features: Tensor | None

    def with_rows(self, rows: Tensor, other: SampledBatch) -> SampledBatch:
        """Replace the samples ``rows`` (N,) by those of ``other``."""

        def merged(own: Tensor | None, drawn: Tensor | None) -> Tensor | None:
            return None if own is None or drawn is None else own.index_copy(0, rows.to(own.device), drawn)

        optional = [merged(getattr(self, name), getattr(other, name)) for name in ("samples", "stepwise", "features")]
        scores = self.scores.index_copy(0, rows, other.scores)
        return SampledBatch(self.rollout.with_rows(rows, other.rollout), optional[0], scores, *optional[1:])


@dataclass(frozen=True)
class Sampler:
    """A callable that samples and scores a group of samples of every prompt in batches.

    With ``overlap_scoring``, a batch is decoded and scored in a thread while the next one is sampled, so two
    batches are in memory; on a GPU the thread has a stream of its own. Decoded samples are part of the result only with
    ``keep_samples``. A batch is sampled and decoded in ``parts``. ``elsewhere`` is the kernel of the steps that are not
    stored.
    """

    pipeline: Pipeline
    rewards: Sequence[NamedReward]
    grid: Grid
    guidance: float
    settings: FittedSettings
    keep_samples: bool
    parts: PartSizes = field(default_factory=PartSizes)
    elsewhere: Kernel = ODE()  # noqa: RUF009  # kernels are frozen

    def __call__(
        self,
        recipe: Recipe,
        steps: Sequence[int],
        prompts: Sequence[Prompt],
        name: str,
        share: RankShare = ALL_RANKS,
        progress: Progress = SILENT,
        members: Sequence[Member | None] | None = None,
    ) -> Iterator[SampledBatch]:
        """Yield this rank's batches of a round that are not empty, in the order of ``batch_sizes`` of the settings.

        Args:
            recipe: The method: its kernel, and whether samples of a prompt share their initial noise.
            steps: The steps to store.
            prompts: The prompts of the round.
            name: The seed of all noise, different in every round.
            share: This rank's share of the batches.
            progress: Shows the samples of all ranks.
            members: The samples of the round, where None is not drawn; by default whole groups in order.
        """
        members = self.members(len(prompts)) if members is None else members
        total = len(members) - members.count(None)
        with progress.phase("sampling", total) as sampled, progress.phase("scoring", total) as scored:
            scoring = self._sample(recipe, steps, prompts, members, name, share, sampled)
            for batch in in_thread(scoring) if self.settings.overlap_scoring else (call() for call in scoring):
                scored(len(batch.scores) * share.world_size)
                yield batch

    def members(self, prompts: int) -> list[Member | None]:
        """List the samples of a round of whole groups, group by group."""
        return [(p, g) for p in range(prompts) for g in range(self.settings.group_size)]

    def inputs(
        self, recipe: Recipe, prompts: Sequence[Prompt], name: str, members: Sequence[Member | None] | None = None
    ) -> RolloutInputs:
        """Return the conditioning and noise seeds of a round's samples, in order; None may be any sample."""
        members = self.members(len(prompts)) if members is None else members
        samples = [member or (0, 0) for member in members]
        return RolloutInputs(
            self.pipeline.encode(with_user_dropout(prompts, self.settings.user_dropout, name)),
            torch.tensor([p for p, _ in samples]),
            tuple(derived_seed(name, p, "x", 0 if recipe.shared_noise else g) for p, g in samples),
            tuple(derived_seed(name, p, "w", g) for p, g in samples),
        )

    @torch.no_grad()
    def _sample(
        self,
        recipe: Recipe,
        steps: Sequence[int],
        prompts: Sequence[Prompt],
        members: Sequence[Member | None],
        name: str,
        share: RankShare,
        advance: Phase,
    ) -> Iterator[Callable[[], SampledBatch]]:
        """Run the denoiser batch by batch, and yield a call that decodes and scores the batch."""
        kernels = kernel_per_step(recipe.kernel_on(self.pipeline.path), steps, len(self.grid), self.elsewhere)
        sizes = self.settings.batch_sizes(recipe.objective.unit, share.world_size)
        batches = self.inputs(recipe, prompts, name, members).split(sizes)
        drawn = torch.split(torch.tensor([member is not None for member in members]), list(sizes))
        for number in share.indices(len(sizes)):
            if not drawn[number].any():
                continue
            batch = batches[number]
            if not drawn[number].all():
                batch = batch.select(drawn[number].nonzero()[:, 0])
            sample = partial(self._trajectories, recipe, batch, kernels, steps)
            sampled, completed = zip(*self.parts.map("sampling", len(batch), sample), strict=True)
            trajectories = Rollout.joined(batch, sampled)
            completions = () if recipe.completion is None else torch.cat(completed).unbind(1)
            repeated = [prompts[row] for row in batch.prompt.tolist()]
            advance(len(repeated) * share.world_size)
            yield partial(self._decode_and_score, recipe, trajectories, completions, repeated)

    def _trajectories(
        self, recipe: Recipe, batch: RolloutInputs, kernels: Sequence[Kernel], steps: Sequence[int], rows: slice
    ) -> tuple[Rollout, Tensor]:
        """Sample some rows of a batch; return them with the completions (B, S, ...) of their stored steps, if any."""
        sampled = rollout(self.pipeline, batch.part(rows), self.grid, kernels, self.guidance, store=steps)
        if recipe.completion is None:
            return sampled, sampled.final
        return sampled, complete(self.pipeline, sampled, self.grid, self.guidance, recipe.completion)

    def _decode(self, latents: Tensor) -> Tensor:
        decoded = self.parts.map("decoding", len(latents), lambda rows: self.pipeline.decode(latents[rows]))
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    @torch.no_grad()
    def _decode_and_score(
        self, recipe: Recipe, trajectories: Rollout, completions: Sequence[Tensor], prompts: Sequence[Prompt]
    ) -> SampledBatch:
        """Score the final samples of a batch, and the ``completions`` (B, ...) of its stored steps."""
        decoded = self._decode(trajectories.final)
        finite = rows_are_finite(trajectories.final) & rows_are_finite(decoded)
        samples, scores = blank_nonfinite(decoded), score_finite(self.rewards, decoded, prompts, finite)
        features = features_of_finite(recipe.features, samples, finite) if recipe.features else None
        columns = list[Tensor]()
        for x0 in completions:
            completed = self._decode(x0)
            columns.append(score_finite(self.rewards, completed, prompts, rows_are_finite(completed)))
        stepwise = torch.stack([*columns, scores], dim=1) if columns else None
        replayable = trajectories if finite.all() else trajectories.zero_rows(~finite)
        if self.settings.offload_rollouts:
            replayable = replayable.on_cpu()
        return SampledBatch(replayable, samples if self.keep_samples else None, scores, stepwise, features)


def score_finite(rewards: Sequence[NamedReward], decoded: Tensor, prompts: Sequence[Prompt], finite: Tensor) -> Tensor:
    """Score only the decoded samples (B, ...) of the mask ``finite`` (B,) bool; other scores (B, K) are NaN.

    No reward sees a substitute for a non-finite sample, which would compete with the others of its prompt.
    """
    if bool(finite.all()):
        return score(rewards, decoded, prompts)
    scores, rows = torch.full((len(decoded), len(rewards)), torch.nan), finite.nonzero()[:, 0]
    if len(rows):
        scores[rows.cpu()] = score(rewards, decoded[rows], [prompts[row] for row in rows.tolist()])
    return scores


def features_of_finite(features: FeatureFunction, samples: Tensor, finite: Tensor) -> Tensor:
    """Compute features (B, d), float32 on the CPU, of samples (B, ...); NaN where the mask ``finite`` (B,) is False."""
    values = features(samples).float().cpu()
    return values if bool(finite.all()) else values.index_fill(0, (~finite).nonzero()[:, 0].cpu(), torch.nan)


def blank_nonfinite(decoded: Tensor) -> Tensor:
    """Replace non-finite samples (B, ...) by zeros: one NaN must not lose the scores of a batch."""
    finite = rows_are_finite(decoded)
    return decoded if finite.all() else decoded.index_fill(0, (~finite).nonzero()[:, 0], 0)


def in_thread(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of ``calls`` in order; each runs in a thread while the next one is prepared.

    On a GPU the thread has a CUDA stream of its own. A call starts there after what was queued before it was yielded,
    and what uses its result runs after the call. The thread does not keep an interrupted process alive: a reward may
    wait for a server that never answers.
    """
    queue: SimpleQueue[tuple[Handover[Callable[[], T]], Future[Handover[T]]] | None] = SimpleQueue()

    def work(cores: int, gpu: int | None, stream: torch.cuda.Stream | None) -> None:
        torch.set_num_threads(cores)
        use_gpu(gpu)
        with torch.cuda.stream(stream):  # None leaves the current one
            while (item := queue.get()) is not None:
                call, future = item
                try:
                    future.set_result(Handover.of(call.take()()))
                except BaseException as error:
                    future.set_exception(error)

    def submit(call: Callable[[], T]) -> Future[Handover[T]]:
        future = Future[Handover[T]]()
        queue.put((Handover.of(call), future))
        return future

    gpu, cuda = current_gpu(), cast(Any, torch.cuda)  # torch does not type the making of streams
    arguments = torch.get_num_threads(), gpu, None if gpu is None else cuda.Stream()
    thread = threading.Thread(target=work, args=arguments, name="genalign-score", daemon=True)
    thread.start()
    try:
        submitted = itertools.chain(map(submit, calls), [Future[Handover[T]]()])  # the last call has none to wait for
        for running, _ in itertools.pairwise(submitted):
            yield running.result().take()
    finally:
        queue.put(None)
        thread.join(1.0)
