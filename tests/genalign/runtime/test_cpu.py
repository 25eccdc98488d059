"""What is freed is kept, and used again without being asked of the system; and how attention is computed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from genalign.runtime import cpu

FAULTS = """
import resource, sys, torch
from genalign.runtime.cpu import retain_freed_memory
assert retain_freed_memory() is (sys.argv[1] == "kept")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _faults(environment: dict[str, str], name: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again() -> None:
    kept, given_back = _faults({}, "kept"), _faults({"MALLOC_TOP_PAD_": "131072"}, "as it was")
    assert kept < 100 < given_back


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    assert not cpu.retain_freed_memory()


def test_attention_is_plain_on_a_cpu_alone() -> None:
    for device, flash in (("cpu", False), ("cuda", True)):
        with cpu.plain_attention(torch.device(device)):
            assert torch.backends.cuda.flash_sdp_enabled() is flash
    assert torch.backends.cuda.flash_sdp_enabled()
