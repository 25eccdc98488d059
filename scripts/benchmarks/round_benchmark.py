"""The rate at which a round of the demo computes, and what takes its time, of this code and of an older commit's.

    python scripts/benchmarks/benchmark.py round [--against COMMIT]

The same round runs again and again in a process of each commit, in turn, on the same machine; the older one has its own
demo and embedded model. FLOPs are those of torch's counter, with the CPU's attention kernel, which torch leaves out,
counted as the GPU's is. The rate is also given without attention's products, as torch's counter alone would have it.
Commits are compared by their rates, and by the seconds of a round where both demos have the same recipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from scripts.benchmarks.published_results import Measurement, ratios
from scripts.benchmarks.round_worker import GROUPS

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("round_worker.py")


class RoundWorker:
    """A process that runs the round of the code in ``folder`` for every question."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-P", str(WORKER)]  # -P: modules beside the worker are of this commit
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)

    def ask(self, question: str) -> Any:
        """Ask for "seconds", "flops", "profile" or "recipe". Raises RuntimeError where the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(question, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the process of {self.process.args} ended: its error is above")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.communicate()  # which closes its standard input


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Write the files of a commit into a temporary folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with TemporaryDirectory() as folder, tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
        yield Path(folder)


def benchmark_round(repeats: int, against: str | None = None) -> list[Measurement]:
    """Measure rounds of this code and, if there is one, of the commit ``against``, in turn."""
    with ExitStack() as stack:
        folders = {"now": ROOT}
        if against is not None:
            folders["before"] = stack.enter_context(checked_out(against))
        workers = {name: stack.enter_context(RoundWorker(folder)) for name, folder in folders.items()}
        recipes = {name: worker.ask("recipe") for name, worker in workers.items()}
        flops = {name: worker.ask("flops") for name, worker in workers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(repeats):
            for name, worker in workers.items():
                seconds[name].append(worker.ask("seconds"))
        shares = {name: worker.ask("profile") for name, worker in workers.items()}
    return measurements(recipes, flops, seconds, shares)


def measurements(
    recipes: Mapping[str, str],
    flops: Mapping[str, Mapping[str, int]],
    seconds: Mapping[str, Sequence[float]],
    shares: Mapping[str, Mapping[str, float]],
) -> list[Measurement]:
    """The rows of the result, by the names of the commits, "now" and perhaps "before".

    Args:
        recipes: The recipe of the round.
        flops: Its FLOPs, "all" and those of "attention" among them.
        seconds: The seconds of each repeat.
        shares: The share of its time by group of operations.
    """
    rows, rates = list[Measurement](), dict[str, list[float]]()
    for name, column in seconds.items():
        whole, outside = flops[name]["all"], flops[name]["all"] - flops[name]["attention"]
        rates[name] = [whole / 1e9 / value for value in column]
        rows += [Measurement(f"{name}.seconds", f"seconds of a round of {recipes[name]}", value) for value in column]
        rows.append(Measurement(f"{name}.flops", f"GFLOP of a round of {recipes[name]}", whole / 1e9))
        rows += [Measurement(f"{name}.rate", "GFLOP/s", value) for value in rates[name]]
        metric = "GFLOP/s, without attention's products"
        rows += [Measurement(f"{name}.rate_outside_attention", metric, outside / 1e9 / value) for value in column]
        for group in GROUPS:
            share = shares[name][group]
            rows.append(Measurement(f"{name}.{group.replace(' ', '_')}", "share of a round's time", share))
    if "before" in seconds:
        rows += ratios("speedup.rate", "GFLOP/s now over before", rates["now"], rates["before"])
        if recipes["before"] == recipes["now"]:  # else the rounds have other work to do
            rows += ratios("speedup", "seconds of a round before over now", seconds["before"], seconds["now"])
    return rows
