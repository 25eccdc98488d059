"""Algorithms that give the same bits each time, which a GPU does not take by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

_WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS is deterministic


def require_workspace(device: torch.device, variables: Mapping[str, str]) -> None:
    """Raise ValueError if the environment ``variables`` leave cuBLAS a choice on ``device``, which it makes once."""
    if device.type == "cuda" and variables.get("CUBLAS_WORKSPACE_CONFIG") not in _WORKSPACES:
        raise ValueError(
            "training.deterministic needs the environment variable CUBLAS_WORKSPACE_CONFIG before the start: set it to"
            f" {_WORKSPACES[0]}"
        )


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Make torch take deterministic algorithms within the context, or raise RuntimeError where there is none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
