"""The measurement of a GPU: without one it stops in one line, and its program runs on the CPU at a tiny size."""

from __future__ import annotations

import pytest
import torch

from scripts.benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_stops_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    message = capsys.readouterr().err
    assert message.startswith("there is no CUDA device: run this on a GPU") and message.count("\n") == 1


@pytest.mark.slow  # networks at their published width
def test_it_runs_on_the_cpu_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--size", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines}
    assert {"ours", "plain", "ours.update", "ours.over_plain", "ours.speed", "ours.estimated_memory"} <= names
    assert all(float(line.split()[-1]) > 0 for line in lines)
