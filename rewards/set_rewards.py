"""Rewards of whole sets of samples, from their features (n, d) in one embedding; higher is better.

They are ``genalign.types.SetReward``s that also know their change when one member is replaced
(``genalign.metrics.set_metric.IncrementalReward``). Compare their values at equal n only: all but KID and KAD depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genalign.metrics.blocks import BlockFrechetStatistic, as_blocks
from genalign.metrics.frechet import Gaussian, gaussian_distance, vendi
from genalign.metrics.incremental import FrechetStatistic, VendiStatistic
from genalign.metrics.mmd import GaussianKernel, MMDReference, MMDStatistic, polynomial_kernel
from genalign.metrics.set_metric import Rescored, SetStatistic
from genalign.types import Prompt
from rewards.backbones.image_features import with_parts

_CMMD_BANDWIDTH, _CMMD_SCALE = 10.0, 1000.0
_KAD_SCALE = 100.0


@dataclass(frozen=True, eq=False)
class FrechetTo:
    """-Frechet distance (FID, FAD) to a reference set of features (m, d). ValueError for a set or m below 2: one sample
    has no covariance."""

    reference: Tensor
    gaussian: Gaussian = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gaussian", Gaussian.of(self.reference))

    def __call__(self, features: Tensor) -> float:
        return -gaussian_distance(Gaussian.of(features), self.gaussian)

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return FrechetStatistic(features, self.gaussian)


@dataclass(frozen=True, eq=False)
class FrameFrechetTo:
    """-Frechet distance of all frames of a set of clips to those of a reference set (m, d): FAD as its tools have it.

    Features are (n, f d), the frames of a clip in one row: ``rewards.backbones.audio_features.FrameFeatures``. A frame counts as
    a sample, so one clip has a distance, too; and frames of one clip are alike, so that many clips tell more than many
    frames. ValueError for m or n f below 2.
    """

    reference: Tensor
    gaussian: Gaussian = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gaussian", Gaussian.of(self.reference))

    def __call__(self, features: Tensor) -> float:
        frames = as_blocks(features, len(self.gaussian.mean)).flatten(0, 1)
        return -gaussian_distance(Gaussian.of(frames), self.gaussian)

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one clip."""
        return BlockFrechetStatistic(features, self.gaussian)


@dataclass(frozen=True, eq=False)
class KADTo:
    """-KAD (arXiv 2502.15602) to a reference set of features (m, d), all of it at once: memory for (m, m).

    100 times the unbiased estimate of the squared maximum mean discrepancy, so that it may be above 0, with a Gaussian
    kernel whose bandwidth is the median distance of two members of the reference set, as the paper says; the code of
    the authors' tool takes that of the evaluated set, so that its figures differ. ValueError for a set or m below 2.
    """

    reference: Tensor
    prepared: MMDReference = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kernel = GaussianKernel.at_median(self.reference)
        object.__setattr__(self, "prepared", MMDReference.of(self.reference, kernel))

    def __call__(self, features: Tensor) -> float:
        return _KADStatistic(features, self.prepared).value

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return _KADStatistic(features, self.prepared)


class _KADStatistic(MMDStatistic):
    @property
    def resolution(self) -> float:
        return _KAD_SCALE * super().resolution

    def _distance(self, within: float, across: float) -> float:
        return _KAD_SCALE * super()._distance(within, across)


@dataclass(frozen=True, eq=False)
class KIDTo:
    """-KID to a reference set of features (m, d), all of it at once: memory for (m, m). ValueError for a set or m below
    2."""

    reference: Tensor
    prepared: MMDReference = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prepared", MMDReference.of(self.reference, polynomial_kernel))

    def __call__(self, features: Tensor) -> float:
        return MMDStatistic(features, self.prepared).value

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return MMDStatistic(features, self.prepared)


@dataclass(frozen=True, eq=False)
class CMMDTo:
    """-CMMD (arXiv 2401.09603) to a reference set of features (m, d), all of it at once: memory for (m, m).

    1000 times the biased estimate of the squared maximum mean discrepancy, with a Gaussian kernel of bandwidth 10.
    Meant for unit CLIP embeddings, ``rewards.backbones.image_features.ClipFeatures(model, unit=True)`` with
    openai/clip-vit-large-patch14-336; published figures squash images to 336 x 336 and do not crop them. The bias is
    about 5 d^2 (1 / n + 1 / m) for d^2 the mean squared distance of two members. ValueError for a set or m below 2.
    """

    reference: Tensor
    prepared: MMDReference = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prepared", MMDReference.of(self.reference, GaussianKernel(_CMMD_BANDWIDTH)))

    def __call__(self, features: Tensor) -> float:
        return _CMMDStatistic(features, self.prepared).value

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return _CMMDStatistic(features, self.prepared)


class _CMMDStatistic(MMDStatistic):
    """The unbiased statistic with k(x, x) = 1 counted in again."""

    @property
    def resolution(self) -> float:
        return _CMMD_SCALE * super().resolution

    def _distance(self, within: float, across: float) -> float:
        n, m = len(self._rows), len(self._reference.features)
        own, other = (within + n) / n**2, (self._reference.within * (m - 1) + 1) / m
        return _CMMD_SCALE * (own + other - 2 * across / (n * m))


@dataclass(frozen=True)
class Vendi:
    """The Vendi score of ``order``: how many different samples there are, by their directions alone.

    It has no notion of quality: mix it with a reward that does. For an order other than 1, every change of a member
    costs a whole score.
    """

    order: float = 1.0

    def __post_init__(self) -> None:
        if not self.order >= 0:
            raise ValueError(f"order must be 0 or more, not {self.order}")

    def __call__(self, features: Tensor) -> float:
        return vendi(features, self.order)

    def statistic(self, features: Tensor) -> SetStatistic:
        """For changes of one member."""
        return VendiStatistic(features) if self.order == 1 else Rescored(self, features)


@dataclass(frozen=True, eq=False)
class PerSampleFrechet:
    """-Frechet distance of each sample's own parts to a reference set of such parts (m, d): per-clip FAD, a reward of
    single samples. ``encoder`` is any ``rewards.backbones.image_features.PatchFeatures``, ``reference`` for clips that of
    ``rewards.backbones.audio_features.described_frames`` with the same encoder. See ``per_sample_frechet``."""

    encoder: Callable  # type: ignore[type-arg]  # bare: configurations name any PatchFeatures
    reference: Tensor
    gaussian: Gaussian = field(init=False, repr=False)

    def __post_init__(self) -> None:
        with_parts(self.encoder)
        object.__setattr__(self, "gaussian", Gaussian.of(self.reference))

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,); NaN for a sample that is not finite. Raises ValueError where a sample has one part alone."""
        return per_sample_frechet(with_parts(self.encoder).features(samples).patches, self.gaussian)


def per_sample_frechet(tokens: Tensor, reference: Gaussian) -> Tensor:
    """-Frechet distance of each sample's own tokens to a reference: (B,) float32 for tokens (B, n, d).

    DRAGON's instance-to-distribution reward (arXiv 2504.15217), there of a song's frames and here as well of an image's
    patches: ``tokens`` are n of them per sample, ``reference`` the statistics of tokens of many samples. NaN for a
    sample with a token that is not finite; ValueError for n < 2. Many tokens are needed: the distance has a bias of
    about 1 / n.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, n, d), not {tuple(tokens.shape)}")
    if tokens.shape[1] < 2:
        raise ValueError(
            f"needs at least 2 samples, got {tokens.shape[1]}: one frame has no covariance. Give longer clips, or an"
            " encoder with more frames"
        )
    rewards = [
        -gaussian_distance(Gaussian.of(sample), reference) if bool(sample.isfinite().all()) else math.nan
        for sample in tokens
    ]
    return torch.tensor(rewards, dtype=torch.float32, device=tokens.device)
