"""Rewards of whole sets of samples, from their features (n, d) in one embedding; higher is better.

Compare their values at equal n only: all but KID and KAD depend on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genalign.metrics.frechet import Gaussian, as_features, gaussian_distance
from genalign.metrics.mmd import GaussianKernel, MMDToReference, median_distance, polynomial_kernel
from genalign.metrics.vendi import vendi_score
from genalign.types import AnyCallable, Prompt
from rewards.backbones.encoders import require_patches

_CMMD_BANDWIDTH, _CMMD_SCALE = 10.0, 1000.0
_KAD_SCALE = 100.0


class FrechetReward:
    """Minus the Frechet distance (FID, FAD) to a reference set of features (m, d).

    Raises ValueError for a set or m below 2: one sample has no covariance.
    """

    def __init__(self, reference: Tensor) -> None:
        self.gaussian = Gaussian.fit(reference)

    def __call__(self, features: Tensor) -> float:
        """Score a set (n, d), 0 at best."""
        return -gaussian_distance(Gaussian.fit(features), self.gaussian)


class FrameFrechetReward(FrechetReward):
    """Minus the Frechet distance of all frames of a set of clips to a reference set of frames (m, d).

    This is FAD as its tools compute it. Features are (n, f d), the f frames of a clip in one row:
    ``rewards.backbones.audio_features.FrameFeatures``. A frame counts as a sample, so one clip has a distance,
    too; frames of one clip are alike, so many clips tell more than many frames. Raises ValueError for m or n f
    below 2.
    """

    def __call__(self, features: Tensor) -> float:
        """Score a set of clips (n, f d), 0 at best."""
        rows, width = as_features(features, at_least=1), len(self.gaussian.mean)
        if rows.shape[1] % width:
            raise ValueError(f"rows of {rows.shape[1]} values are no whole number of frames of width {width}")
        frames = rows.view(-1, width)
        if len(frames) < 2:
            raise ValueError("one clip of one frame has no covariance: score more clips, or longer ones")
        return super().__call__(frames)


class KIDReward:
    """Minus the kernel inception distance (arXiv 1801.01401) to a reference set of features (m, d).

    The unbiased estimate of the whole sets, without subsets, so a score may be above 0: memory for (m, m). Raises
    ValueError for a set or m below 2.
    """

    def __init__(self, reference: Tensor) -> None:
        self._mmd = MMDToReference(reference, polynomial_kernel)

    def __call__(self, features: Tensor) -> float:
        return -self._mmd.unbiased(features)


class KADReward:
    """Minus the kernel audio distance (arXiv 2502.15602) to a reference set of features (m, d): memory for (m, m).

    100 times the unbiased estimate of the squared maximum mean discrepancy, so a score may be above 0, with a
    Gaussian kernel whose bandwidth is the median distance of two members of the reference set, as the paper says; the
    code of the authors' tool takes that of the evaluated set, so its figures differ. Raises ValueError for a set
    or m below 2.
    """

    def __init__(self, reference: Tensor) -> None:
        self._mmd = MMDToReference(reference, GaussianKernel(median_distance(reference)))

    def __call__(self, features: Tensor) -> float:
        return -_KAD_SCALE * self._mmd.unbiased(features)


class CMMDReward:
    """Minus CMMD (arXiv 2401.09603) to a reference set of features (m, d), all of it at once: memory for (m, m).

    1000 times the biased estimate of the squared maximum mean discrepancy, with a Gaussian kernel of bandwidth 10.
    Meant for unit CLIP embeddings, ``rewards.backbones.image_features.ClipFeatures(model, unit=True)`` with
    openai/clip-vit-large-patch14-336; published figures squash images to 336 x 336 and do not crop them. The bias is
    about 5 d^2 (1 / n + 1 / m) for d^2 the mean squared distance of two members. Raises ValueError for a set or m
    below 2.
    """

    def __init__(self, reference: Tensor) -> None:
        self._mmd = MMDToReference(reference, GaussianKernel(_CMMD_BANDWIDTH))

    def __call__(self, features: Tensor) -> float:
        """Score a set (n, d), 0 at best."""
        return -_CMMD_SCALE * self._mmd.biased(features)


class VendiReward:
    """The Vendi score: the number of different samples in a set, by the directions of their features alone.

    It has no notion of quality: combine it with a reward that does, by ``quality`` of ``genalign.dragon_set``.
    """

    def __call__(self, features: Tensor) -> float:
        """Score a set (n, d), in [1, n]."""
        return vendi_score(features)


@dataclass(frozen=True, eq=False)
class PerSampleFrechetReward:
    """Minus the Frechet distance of each sample's own patches or frames to a reference set of them (m, d).

    This is per-clip FAD, a reward of single samples, see ``per_sample_frechet``.

    Args:
        encoder: The features of a sample's parts, any ``rewards.backbones.encoders.PatchFeatures``.
        reference: The features (m, d) of the reference set by the same encoder; those of clips are from
            ``rewards.backbones.audio_features.extract_frame_features``.
    """

    encoder: AnyCallable
    reference: Tensor

    def __post_init__(self) -> None:
        require_patches(self.encoder)

    @functools.cached_property
    def gaussian(self) -> Gaussian:
        """The Gaussian of the reference set."""
        return Gaussian.fit(self.reference)

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,), NaN for one that is not finite. Raises ValueError where one has one part."""
        return per_sample_frechet(require_patches(self.encoder).features(samples).patches, self.gaussian)


def per_sample_frechet(tokens: Tensor, reference: Gaussian) -> Tensor:
    """Compute minus the Frechet distance of each sample's own tokens to a reference: (B,) float32 for tokens (B, n, d).

    DRAGON's instance-to-distribution reward (arXiv 2504.15217), there of a song's frames and here also of an image's
    patches. The distance has a bias of about 1 / n: give each sample many tokens. A sample with a token that is not
    finite gets NaN. Raises ValueError for n < 2.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, n, d), not {tuple(tokens.shape)}")
    if tokens.shape[1] < 2:
        raise ValueError(
            f"a Frechet distance needs at least 2 frames of each sample, got {tokens.shape[1]}: one frame has no"
            " covariance. Give longer clips, or an encoder with more frames"
        )
    finite = tokens.isfinite().flatten(1).all(1).tolist()
    rewards = [
        -gaussian_distance(Gaussian.fit(sample), reference) if whole else math.nan
        for sample, whole in zip(tokens, finite, strict=True)
    ]
    return torch.tensor(rewards, dtype=torch.float32, device=tokens.device)
