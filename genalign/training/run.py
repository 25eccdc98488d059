"""A training run: its rounds, what is observed, logged and saved between them, and a clean end on a signal."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from genalign.metrics.intervals import Estimate
from genalign.runtime.progress import SILENT, Progress
from genalign.scoring.score import RewardError
from genalign.training.best_weights import BestWeights, HeldOutScores
from genalign.training.checkpointing import CheckpointWriter
from genalign.training.errors import TrainingStoppedError
from genalign.training.nonfinite import DivergedError
from genalign.training.reward_hacking import HackingGuard, HackingReport, due
from genalign.training.round_log import RoundDisplay, SampleGridWriter, log_round
from genalign.training.round_result import RoundResult
from genalign.training.run_folder import RunFolder, WeightStore
from genalign.training.time_budget import RoundFitter
from genalign.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, by which Slurm and Kubernetes end a job, as KeyboardInterrupt is for Ctrl-C."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM raise Terminated inside the context."""

    def handle(number: int, frame: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def end_after_round() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal that asks the run to end, SIGINT or SIGTERM, or 0 for none.

    A second Ctrl-C interrupts at once. A second SIGTERM does not: launchers pass on what a scheduler sends to all.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            logger.warning("%s: the run ends after this round and is saved; press Ctrl-C to stop at once", name)
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Observations:
    """What was observed after a round: held-out scores, the reward-hacking report, the files of the sample grid."""

    held_out: HeldOutScores | None
    report: HackingReport | None
    samples: Sequence[str]

    @property
    def scores(self) -> Mapping[str, Estimate]:
        """The held-out estimate of each score; empty if they were not due."""
        return self.held_out.overall if self.held_out else {}

    def as_dict(self) -> dict[str, Any]:
        """Return the observations as JSON, null for those that were not due."""
        return {
            "held_out": {name: estimate.as_dict() for name, estimate in self.scores.items()} or None,
            "reward_hacking": self.report.as_list() if self.report else None,
            "sample_grid": list(self.samples) or None,
        }


@dataclass(frozen=True)
class Moment:
    """A moment of a run between two rounds.

    Args:
        rounds: The number of rounds so far.
        seconds: The seconds of training so far, the same on every rank.
        round_seconds: Those of the last round.
        last: Whether the run ends here.
    """

    rounds: int
    seconds: float
    round_seconds: float
    last: bool

    @classmethod
    def after(cls, trainer: Trainer, nfe: int, before: float, max_seconds: float | None) -> Self:
        """Describe the moment after a round.

        Args:
            trainer: The loop.
            nfe: The NFE so far.
            before: The seconds of training before the round.
            max_seconds: The run ends after the round in which training reaches this many seconds; None for no limit.
        """
        seconds = trainer.processes.all_gather_object(trainer.seconds)[0]
        last = trainer.settings.progress(trainer.rounds_done, nfe) >= 1
        is_late = max_seconds is not None and seconds >= max_seconds
        return cls(trainer.rounds_done, seconds, seconds - before, last or is_late)

    def passed(self, interval: float) -> bool:
        """Whether the last round passed a multiple of ``interval`` seconds, or was the first or the last of the run."""
        before = self.seconds - self.round_seconds
        return self.rounds == 1 or self.last or self.seconds // interval > before // interval


@dataclass(frozen=True)
class RoundMonitors:
    """Observers of the model between rounds; none of them affects the randomness or the NFE of training.

    Args:
        evaluate_held_out: Evaluate the held-out prompts.
        held_out_every: Rounds between two of these evaluations; 0 schedules none by rounds.
        held_out_seconds: Seconds of training between two of them; None schedules none by time.
        guard: The monitor of reward hacking.
        sample_grid: The writer of sample grids.
    """

    evaluate_held_out: Callable[[], HeldOutScores] | None = None
    held_out_every: int = 0
    held_out_seconds: float | None = None
    guard: HackingGuard | None = None
    sample_grid: SampleGridWriter | None = None

    @property
    def stopped(self) -> bool:
        """Whether a red report of the guard has ended the run."""
        return self.guard is not None and self.guard.stopped

    def observe(self, result: RoundResult, now: Moment, run: Path) -> Observations:
        """Make the observations that are due after a round.

        Args:
            result: The result of the last round.
            now: The rounds and seconds so far.
            run: The folder of the run.
        """
        by_rounds = self.held_out_every and due(now.rounds, self.held_out_every, now.last)
        by_time = self.held_out_seconds and now.passed(self.held_out_seconds)
        held_out = self.evaluate_held_out() if self.evaluate_held_out and (by_rounds or by_time) else None
        report = self.guard.report(now.rounds, now.last, result.kl) if self.guard else None
        samples = self.sample_grid.after(now.rounds, now.last, run) if self.sample_grid else []
        return Observations(held_out, report, samples)

    def react(self, report: HackingReport | None, trainer: Trainer, weights: WeightFiles) -> None:
        """React to a report of the guard, which may save the current weights in best/."""
        if self.guard and report:
            best = replace(weights.folder, path=weights.folder.path / "best")
            self.guard.react(report, trainer, lambda: best.save(trainer.policy, weights.pipeline))


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a run in its folder: the best by the held-out rewards, and the newest.

    Args:
        folder: The folder of the run.
        pipeline: The pipeline that writes them.
        best: The best weights so far.
    """

    folder: RunFolder
    pipeline: WeightStore
    best: BestWeights

    def see(self, rounds: int, scores: HeldOutScores | None) -> None:
        """Keep the weights of an evaluated round if they are the best so far, and write an adapter at once.

        A whole network is written at the end of the run; until then checkpoints hold it.
        """
        if scores is None:
            return
        improved = self.best.see(rounds, scores)
        if improved:
            logger.info("The best weights so far are those after %s", self.best.round)
        if improved and self.best.policy.config is not None:
            self.folder.save_best(self.best, self.pipeline)
        elif self.best.round:
            self.folder.update_best_round(self.best.round)

    def restore(self) -> None:
        """Write the best adapter again if a killed process left that of a later round, or none."""
        if self.best.round and self.best.policy.config is not None:
            written = self.folder.best_round()
            is_current = written is not None and written.same_weights(self.best.round)
            if not self.folder.processes.all_gather_object(is_current)[0]:
                self.folder.save_best(self.best, self.pipeline)

    def describe(self, rounds: int) -> str:
        """Say in one line which weights the folders hold at the end of a run of so many rounds."""
        name = "denoiser" if self.best.policy.config is None else "lora"
        if self.best.round:
            return f"{name}/: the weights after {self.best.round}; {name}-last/: those after round {rounds}"
        return (
            f"{name}/ and {name}-last/: the newest weights, after round {rounds}, as no held-out rewards"
            " (held_out.every, held_out.every_seconds) select the best"
        )

    def save(self) -> None:
        """Write the newest weights, and the best ones; without held-out rewards these are the newest, too."""
        self.folder.save(self.best.policy, self.pipeline, last=True)
        if self.best.round:
            self.folder.save_best(self.best, self.pipeline)
        else:
            self.folder.save(self.best.policy, self.pipeline)


@contextlib.contextmanager
def weights_saved(trainer: Trainer, weights: WeightFiles) -> Iterator[None]:
    """Write the weights at the end of the context, and say how to resume where a reward or the training failed.

    After an error the weights are written too, unless FSDP shards them, which would need every rank.
    """
    try:
        yield
    except BaseException as error:
        if not trainer.policy.sharded:
            weights.save()
        if isinstance(error, RewardError | DivergedError):
            stop = f"Training stopped at round {trainer.rounds_done + 1}: {error}"
            resume = f"Resume with: genalign train --resume {weights.folder.path}"
            raise TrainingStoppedError(f"{stop}. {resume}") from error
        raise
    weights.save()


def train(
    trainer: Trainer,
    weights: WeightFiles,
    checkpoints: CheckpointWriter,
    monitors: RoundMonitors,
    trackers: Sequence[Any] = (),
    progress: Progress = SILENT,
    max_seconds: float | None = None,
    fitter: RoundFitter | None = None,
) -> int:
    """Run the remaining rounds, and write the weights at the end or after an error (see ``weights_saved``).

    Args:
        trainer: The loop.
        weights: The files of the weights, in the run's folder.
        checkpoints: The writer of checkpoints to resume from.
        monitors: Observers between rounds.
        trackers: Experiment trackers, from accelerate.
        progress: Shows the rounds, and the phases within them.
        max_seconds: Stop after the round in which training reaches this many seconds; None for no limit.
        fitter: Fits the number of rounds to a time budget after the first; None if the number is given.

    Returns:
        The signal, SIGINT or SIGTERM, that ended the run early on any rank; 0 for none.

    Raises:
        TrainingStoppedError: A reward failed too often, no sample had credit for too long, or too many updates in a row
            were not finite.
    """
    folder, ended_by = weights.folder, 0
    total, done, before = None if fitter else trainer.settings.rounds, trainer.rounds_done, trainer.seconds
    is_over = monitors.stopped or (max_seconds is not None and before >= max_seconds)
    with (
        weights_saved(trainer, weights),
        end_after_round() as signaled,
        progress.phase("training", total, "rounds", done) as phase,
    ):
        weights.restore()
        display = RoundDisplay(trainer.settings, phase, max_seconds)
        for result in () if is_over else trainer.rounds(progress):
            now = Moment.after(trainer, result.nfe, before, max_seconds)
            before = now.seconds

            # Observe and log
            observations = monitors.observe(result, now, folder.path)
            if fitter and now.rounds == 1:
                phase.total = fitter.fit(trainer)
                display.settings = trainer.settings
            row = result.as_dict() | observations.as_dict()
            folder.append(row)
            log_round(trackers, result.round, row, folder.path, observations.samples)
            display.show(result, observations.scores)

            # Take the best weights, react to reward hacking, save, and end early after a red report or a signal
            weights.see(now.rounds, observations.held_out)
            monitors.react(observations.report, trainer, weights)
            ended_by = max(trainer.processes.all_gather_object(signaled()))
            ends = now.last or bool(ended_by) or monitors.stopped
            checkpoints.after(now.rounds, ends)
            if ends:
                break
    return 0 if monitors.stopped else ended_by
