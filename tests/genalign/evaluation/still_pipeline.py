"""A protocol and a pipeline without a network, for tests of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genalign.diffusion.paths import FlowPath
from genalign.evaluation.evaluate import EvaluationProtocol
from genalign.types import Conditioning, Grid

SIGMAS = (1.0, 0.5, 0.0)
PROTOCOL = EvaluationProtocol("iid", "0123456789abcdef", 4.0, SIGMAS, "ODE()", "float32", 3, (4, 4), 2, 4, "test 1")


class StillPipeline:
    """A flow with zero velocity, whose sample is its initial noise; a subclass draws noises and decodes them."""

    compute_dtype = torch.float32

    def __init__(self, sigmas: tuple[float, ...] = SIGMAS) -> None:
        self.path, self.denoiser, self.sigmas = FlowPath(), nn.Identity(), sigmas
        self.encoded: list[list[str]] = []
        self.calls: list[tuple[int, float]] = []
        """Batch size and guidance of every network evaluation."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.encoded.append(list(prompts))
        return Conditioning({"length": torch.tensor([len(text) for text in prompts])})

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        sigma = torch.tensor(self.sigmas, dtype=torch.float64)
        return Grid(sigma[:-1] * 1000, 1 - sigma, sigma)

    def level(self, u: Tensor) -> Any:
        raise NotImplementedError  # evaluations sample on the grid alone

    def guidance_scale(self, guidance: float | None) -> float:
        return 1.0 if guidance is None else guidance

    def predict(self, x: Tensor, level: Any, conditioning: Conditioning, guidance: float) -> Tensor:
        self.calls.append((len(x), guidance))
        return torch.zeros_like(x)
