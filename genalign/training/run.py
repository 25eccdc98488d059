"""A training run: rounds with everything that is observed, logged and saved between them, and a clean end on Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genalign.metrics.intervals import Estimate
from genalign.scoring.score import RewardError
from genalign.training.checkpointing import CheckpointWriter
from genalign.training.nonfinite import DivergedError
from genalign.training.reward_hacking import HackingGuard, HackingReport, due
from genalign.training.round_log import RoundDisplay, SampleGridWriter, log_round
from genalign.training.round_result import RoundResult
from genalign.training.run_folder import RunFolder, WeightStore
from genalign.training.trainer import Trainer

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed; a second Ctrl-C interrupts at once."""
    presses: list[int] = []

    def handle(number: int, frame: object) -> None:
        if presses:
            raise KeyboardInterrupt
        presses.append(number)
        logger.warning("Ctrl-C: the run ends after this round and is saved; press Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, previous)


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

    def observe(
        self, result: RoundResult, rounds: int, last: bool, run: Path
    ) -> tuple[Mapping[str, Estimate], HackingReport | None, Sequence[str]]:
        """Return held-out estimates, the reward-hacking report and the files of the sample grid, if they are due.

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
        return held_out, report, samples


def train(
    trainer: Trainer,
    folder: RunFolder,
    pipeline: WeightStore,
    checkpoints: CheckpointWriter,
    monitors: RoundMonitors,
    trackers: Sequence[Any] = (),
) -> bool:
    """Run the remaining rounds, and write the weights at the end.

    After an error the weights are written too, unless FSDP shards them, which would need every rank.

    Args:
        trainer: The loop.
        folder: The run's folder.
        pipeline: The pipeline whose weights are written.
        checkpoints: The writer of checkpoints to resume from.
        monitors: Observers between rounds.
        trackers: Experiment trackers, from accelerate.

    Returns:
        False if Ctrl-C ended the run early.

    Raises:
        RewardError: A reward failed too often.
        DivergedError: Too many updates in a row were not finite.
    """
    policy, interrupted = trainer.policy, False
    best = replace(folder, path=folder.path / "best")
    try:
        with stop_on_interrupt() as ctrl_c, RoundDisplay(trainer, folder.processes.is_main) as display:
            for result in () if monitors.stopped else trainer.rounds():
                rounds = trainer.rounds_done
                last = trainer.settings.progress(rounds, result.nfe) >= 1

                # Observe and log
                held_out, report, samples = monitors.observe(result, rounds, last, folder.path)
                row = result.as_dict() | {
                    "held_out": {name: estimate.as_dict() for name, estimate in held_out.items()} or None,
                    "reward_hacking": report.as_list() if report else None,
                    "sample_grid": list(samples) or None,
                }
                folder.append(row)
                log_round(trackers, result.round, row, folder.path, samples)
                display.show(result, held_out)

                # React to reward hacking, save, and end early after a red report or Ctrl-C
                if monitors.guard and report:
                    monitors.guard.react(report, trainer, lambda: best.save(policy, pipeline))
                interrupted = trainer.processes.any_rank(ctrl_c())
                stopping = interrupted or monitors.stopped
                checkpoints.after(rounds, last or stopping)
                if stopping:
                    break
    except BaseException as error:
        if not policy.sharded:
            folder.save(policy, pipeline)
        if isinstance(error, RewardError | DivergedError):
            stop = f"Training stopped at round {trainer.rounds_done + 1}: {error}"
            raise type(error)(f"{stop}. Resume with: genalign train --resume {folder.path}") from error
        raise
    folder.save(policy, pipeline)
    return monitors.stopped or not interrupted
