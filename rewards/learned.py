"""Rewards that ``genalign reward train`` learned from preferences."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genalign.reward_learning.network import Pool, RewardEncoder, RewardNetwork
from genalign.reward_learning.preferences import OVERALL
from genalign.reward_learning.reward_file import RewardFile
from genalign.runtime.waveforms import warn_once
from genalign.types import Prompt
from rewards.learned_encoders import ClapTokens, ClipTokens, DinoTokens, SiglipTokens, YesTokenLogits

_ENCODERS = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (ClipTokens, SiglipTokens, DinoTokens, ClapTokens, YesTokenLogits)
}


@dataclass(frozen=True)
class LearnedReward:
    """A reward that was trained on preferences: RUN/reward.safetensors, or the folder RUN.

    It is opened at the first call, and the network then follows the samples' device. A file names classes of
    only ``rewards.learned_encoders`` and ``genalign.reward_learning.heads``: no other code runs.

    Args:
        path: The file or its folder.
        dimension: The dimension that is the score; None takes "overall", or else the first.
        pool: How an ensemble's scores become one: their mean, the least, or their mean less their deviation. The last
            two compare members, whose scores for a prompt are known up to a constant by Bradley and Terry's loss: train
            with ``Centering``, as an ensemble is by default. Of a single member that was trained with ``uncertainty``,
            "mean_minus_std" is the score less its deviation by the posterior.
        encoder: The encoder, for one of your own class; None builds that of the file.
    """

    path: str | Path
    dimension: str | None = None
    pool: Pool = "mean"
    encoder: RewardEncoder | None = None

    @property
    def sample_rate(self) -> int | None:
        """The sample rate of the sound that it takes, in Hz; None for images."""
        return self._file.description.sample_rate

    def network(self) -> RewardNetwork:
        """Return the network that scores samples, shared by all that ask for it."""
        return self._network

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,) in float32, differentiable where the encoder is; NaN where one has NaN.

        Raises ValueError for samples of the other modality, and for a pool that compares members where there is one.
        """
        complete, missing = self._complete(samples)
        scores: Tensor = self._network.to(samples.device)(complete, prompts)
        return scores.masked_fill(missing, torch.nan)

    @torch.no_grad()
    def uncertainty(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return the standard deviation (B,) of each score; NaN where a sample has NaN.

        It is that over the members of an ensemble, which compares them as ``pool`` does, or that of the last layer's
        Laplace approximation, counted from the mean training item. Raises ValueError for a reward that was trained with
        neither.
        """
        network, file = self._network.to(samples.device), self._file
        if file.description.members < 2 and not file.posteriors:
            raise ValueError(
                f"{self.path} has one member and no posterior: train it with fit.members above 1, or with"
                " genalign.reward_learning.uncertainty.LastLayerLaplace"
            )
        self._warn_without_centering("the uncertainty")
        complete, missing = self._complete(samples)
        deviation = network.deviation(network.encoder(complete, prompts))
        return deviation.masked_fill(missing, torch.nan)

    def _complete(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples with those that have NaN blanked, and which they are (B,)."""
        if samples.ndim != (4 if self.sample_rate is None else 3):
            sound = self.sample_rate is not None
            takes = f"waveforms (B, C, L) at {self.sample_rate} Hz" if sound else "images (B, 3, H, W)"
            raise ValueError(f"{self.path} is a reward of {takes}, not of samples of shape {tuple(samples.shape)}")
        missing = samples.flatten(1).isnan().any(1)
        return samples.masked_fill(missing.view(-1, *[1] * (samples.ndim - 1)), 0.0), missing

    @functools.cached_property
    def _file(self) -> RewardFile:
        return RewardFile.read(Path(self.path))

    @functools.cached_property
    def _network(self) -> RewardNetwork:
        description = self._file.description
        if self.dimension is not None and self.dimension not in description.dimensions:
            names = ", ".join(description.dimensions)
            raise ValueError(f"{self.path} has no dimension {self.dimension!r}: give one of {names}")
        if self.encoder is None and description.encoder not in _ENCODERS:
            raise ValueError(
                f"{self.path} was trained on {description.encoder}, which is no encoder of rewards.learned_encoders:"
                " give it as encoder"
            )
        if self.pool != "mean":
            self._warn_without_centering(f"pool={self.pool!r}")
        encoder = self.encoder or _ENCODERS[description.encoder](**description.encoder_arguments)
        default = OVERALL if OVERALL in description.dimensions else description.dimensions[0]
        output = description.dimensions.index(self.dimension or default)
        posteriors = self._file.posteriors
        network = description.build(encoder, output, self.pool, posteriors[output] if posteriors else None)
        self._file.load_into(network)
        return network.requires_grad_(False).eval()

    def _warn_without_centering(self, what: str) -> None:
        """Warn once where ``what`` compares members of an ensemble whose scores have no common origin."""
        description = self._file.description
        if description.members > 1 and not description.centered:
            warn_once(
                f"{self.path} was trained without Centering: its members differ by a constant for each prompt that no"
                f" preference determines, and {what} mostly follows these constants; train with"
                " genalign.reward_learning.regularizers.Centering, or take the mean"
            )
