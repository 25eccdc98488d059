"""A reward that predicts how people would rate a sample, from samples that they have rated: your own aesthetics."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from genalign.types import AnyCallable, Prompt
from rewards.backbones.reference_audio import AudioFolder
from rewards.backbones.reference_images import ImageFolder, ReferenceSamples

_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # in median distances of two examples
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_BATCH = 64


class RatedSamples:
    """Images or clips, and one rating for each, such as 1 to 5.

    Args:
        samples: The images or clips.
        ratings: Their ratings; a sample that several people rated has the mean.

    Raises:
        ValueError: There are fewer than 2 samples, not one rating for each, or one that is not finite.
    """

    def __init__(self, samples: ReferenceSamples, ratings: Sequence[float]) -> None:
        if len(samples) != len(ratings) or len(ratings) < 2:
            raise ValueError(
                f"{len(samples)} samples have {len(ratings)} ratings: give one for each of 2 samples or more"
            )
        if not all(map(math.isfinite, ratings)):
            raise ValueError("ratings must be finite numbers: leave out samples that nobody rated")
        self.samples, self.ratings = samples, ratings


def read_ratings(samples: ImageFolder | AudioFolder, file: str) -> RatedSamples:
    """Read the ratings of a folder's images or clips from a JSON-lines file, which must not lie in the folder.

    Args:
        samples: The folder, such as ``rewards.backbones.reference_audio.AudioFolder``.
        file: Has a line {"file_name": "a/1.wav", "rating": 4} for each rating; of several for a file the mean is taken.

    Raises:
        ValueError: A line is not of this form, names no file of the folder, or a file has no rating.
    """
    ratings: dict[str, list[float]] = {name: [] for name in samples.names}
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            ratings[row["file_name"]].append(float(row["rating"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{file}, line {number}: expected {{"file_name": ..., "rating": ...}} with a file of {samples.folder}'
            ) from None
    if without := [name for name, values in ratings.items() if not values]:
        raise ValueError(f"{len(without)} files of {samples.folder} have no rating in {file}, such as {without[0]}")
    return RatedSamples(samples, [sum(values) / len(values) for values in ratings.values()])


@dataclass(frozen=True, eq=False)
class RatingReward:
    """The rating that people would give, by kernel ridge regression on features.

    DRAGON's model of musical aesthetics (arXiv 2504.15217) likewise is a regression on CLAP's embedding, of a kernel
    that the available text of the paper does not name; here it is Gaussian, so a sample unlike all examples gets their
    mean. Prompts are ignored.

    Attributes:
        features: The ``FeatureFunction`` that tells samples apart, such as
            ``rewards.backbones.image_features.ClipFeatures`` or ``rewards.backbones.audio_features.ClapFeatures``.
        rated: The examples, by which the regression is fitted at the first call: memory for (N, N) of them.
    """

    features: AnyCallable
    rated: RatedSamples

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) as (B,), differentiable in them; NaN where one has NaN."""
        return self.regression.to(samples.device)(self.features(samples).float())

    @functools.cached_property
    def regression(self) -> KernelRegression:
        """The regression of the examples' ratings on their features."""
        rows = range(len(self.rated.samples))
        with torch.no_grad():
            parts = [self.features(self.rated.samples.load(rows[i : i + _BATCH])) for i in rows[::_BATCH]]
        return KernelRegression.fit(torch.cat(parts).float().cpu(), torch.tensor(self.rated.ratings))


@dataclass(frozen=True)
class KernelRegression:
    """Kernel ridge regression: ``mean`` plus a sum of Gaussians of ``width`` around the examples.

    Attributes:
        examples: The features (N, d) of the examples.
        weights: The weights (N,) of their Gaussians.
        mean: The mean of the targets.
        width: The standard deviation of the Gaussians.
        error: The root mean square error of predicting each example from all others.
    """

    examples: Tensor
    weights: Tensor
    mean: float
    width: float
    error: float

    @classmethod
    def fit(cls, examples: Tensor, targets: Tensor) -> KernelRegression:
        """Fit targets (N,), with the width and the ridge that predict each best from all others.

        The width is a multiple of the median distance of two examples. Raises ValueError where that is 0.
        """
        median = float(torch.pdist(examples).median())
        if not median > 0:
            raise ValueError("most rated samples have the same features: rate others, or take other features")
        squares, mean = torch.cdist(examples.double(), examples.double()).square(), float(targets.mean())
        best: KernelRegression | None = None
        for width, ridge in itertools.product([multiple * median for multiple in _WIDTHS], _RIDGES):
            kernel = torch.exp(-squares / (2 * width**2))
            inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype))
            weights = inverse @ (targets - mean).double()
            error = float((weights / inverse.diagonal()).square().mean().sqrt())  # leaving one out, in closed form
            if best is None or error < best.error:
                best = cls(examples, weights.float(), mean, width, error)
        assert best is not None
        return best

    def to(self, device: torch.device) -> KernelRegression:
        """Move the examples to ``device``."""
        return replace(self, examples=self.examples.to(device), weights=self.weights.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        """Predict the targets (B,) of features (B, d)."""
        norms = features.square().sum(1, keepdim=True) + self.examples.square().sum(1)
        squares = norms - 2 * features @ self.examples.T  # differentiable at 0, where cdist is not
        return self.mean + torch.exp(-squares / (2 * self.width**2)) @ self.weights
