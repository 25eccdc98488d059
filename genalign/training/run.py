"""A training run: rounds with all that is observed, logged and saved between them, and a clean end on a signal."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genalign.metrics.intervals import Estimate
from genalign.runtime.progress import SILENT, Progress
from genalign.scoring.score import RewardError
from genalign.training.checkpointing import CheckpointWriter
from genalign.training.nonfinite import DivergedError
from genalign.training.reward_hacking import HackingGuard, HackingReport, due
from genalign.training.round_log import RoundDisplay, SampleGridWriter, log_round
from genalign.training.round_result import RoundResult
from genalign.training.run_folder import RunFolder, WeightStore
from genalign.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which Slurm and Kubernetes end a job, where Ctrl-C would raise KeyboardInterrupt."""


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
    """What was observed after a round: held-out estimates, the reward-hacking report, the files of the sample grid."""

    held_out: Mapping[str, Estimate]
    report: HackingReport | None
    samples: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the observations as JSON, null for those that were not due."""
        return {
            "held_out": {name: estimate.as_dict() for name, estimate in self.held_out.items()} or None,
            "reward_hacking": self.report.as_list() if self.report else None,
            "sample_grid": list(self.samples) or None,
        }


@dataclass(frozen=True)
class RoundMonitors:
    """Observers of the model between rounds; none of them changes the training's randomness or its NFE.

    Args:
        evaluate_held_out: Evaluate the held-out prompts: each score's estimate by name.
        held_out_every: Rounds between two of these evaluations.
        guard: The monitor of reward hacking.
        sample_grid: The writer of sample grids.
    """

    evaluate_held_out: Callable[[], Mapping[str, Estimate]] | None = None
    held_out_every: int = 0
    guard: HackingGuard | None = None
    sample_grid: SampleGridWriter | None = None

    @property
    def stopped(self) -> bool:
        """Whether a red report of the guard has ended the run."""
        return self.guard is not None and self.guard.stopped

    def observe(self, result: RoundResult, rounds: int, last: bool, run: Path) -> Observations:
        """Make the observations that are due after a round.

        Args:
            result: The result of the last round.
            rounds: The number of rounds so far.
            last: Whether the run ends after this round.
            run: The folder of the run.
        """
        held_out: Mapping[str, Estimate] = {}
        if self.evaluate_held_out is not None and due(rounds, self.held_out_every, last):
            held_out = self.evaluate_held_out()
        report = self.guard.report(rounds, last, result.kl) if self.guard else None
        samples = self.sample_grid.after(rounds, last, run) if self.sample_grid else []
        return Observations(held_out, report, samples)


@contextlib.contextmanager
def weights_saved(trainer: Trainer, folder: RunFolder, pipeline: WeightStore) -> Iterator[None]:
    """Write the weights at the end of the context, and say how to resume where a reward or the training failed.

    After an error the weights are written too, unless FSDP shards them, which would need every rank.
    """
    try:
        yield
    except BaseException as error:
        if not trainer.policy.sharded:
            folder.save(trainer.policy, pipeline)
        if isinstance(error, RewardError | DivergedError):
            stop = f"Training stopped at round {trainer.rounds_done + 1}: {error}"
            raise type(error)(f"{stop}. Resume with: genalign train --resume {folder.path}") from error
        raise
    folder.save(trainer.policy, pipeline)


def train(
    trainer: Trainer,
    folder: RunFolder,
    pipeline: WeightStore,
    checkpoints: CheckpointWriter,
    monitors: RoundMonitors,
    trackers: Sequence[Any] = (),
    progress: Progress = SILENT,
) -> int:
    """Run the remaining rounds, and write the weights at the end or after an error (see ``weights_saved``).

    Args:
        trainer: The loop.
        folder: The run's folder.
        pipeline: The pipeline whose weights are written.
        checkpoints: The writer of checkpoints to resume from.
        monitors: Observers between rounds.
        trackers: Experiment trackers, from accelerate.
        progress: Shows the rounds, and the phases within them.

    Returns:
        The signal, SIGINT or SIGTERM, that ended the run early on any rank; 0 for none.

    Raises:
        RewardError: A reward failed too often.
        DivergedError: Too many updates in a row were not finite.
    """
    best, ended_by = replace(folder, path=folder.path / "best"), 0
    total, done = trainer.settings.rounds, trainer.rounds_done
    with (
        weights_saved(trainer, folder, pipeline),
        end_after_round() as signaled,
        progress.phase("training", total, "rounds", done) as phase,
    ):
        display = RoundDisplay(trainer.settings, phase)
        for result in () if monitors.stopped else trainer.rounds(progress):
            rounds = trainer.rounds_done
            last = trainer.settings.progress(rounds, result.nfe) >= 1

            # Observe and log
            observations = monitors.observe(result, rounds, last, folder.path)
            row = result.as_dict() | observations.as_dict()
            folder.append(row)
            log_round(trackers, result.round, row, folder.path, observations.samples)
            display.show(result, observations.held_out)

            # React to reward hacking, save, and end early after a red report or a signal on any rank
            if monitors.guard and observations.report:
                monitors.guard.react(observations.report, trainer, lambda: best.save(trainer.policy, pipeline))
            ended_by = max(trainer.processes.all_gather_object(signaled()))
            stopping = bool(ended_by) or monitors.stopped
            checkpoints.after(rounds, last or stopping)
            if stopping:
                break
    return 0 if monitors.stopped else ended_by
