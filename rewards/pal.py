"""A reward that differs by person: PAL's mixtures of ideal points (arXiv 2406.08469) on a frozen encoder.

``genalign learn-users`` learns the file of ``PALReward`` from people's comparisons. A prompt says whose taste counts
by its metadata, ``Prompt("a dog", {"user": "ada"})``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from genalign.reward_learning.ideal_points import (
    IdealPointModel,
    IdealPointSettings,
    PreferenceFit,
    Score,
    accuracies,
    fit,
    new_model,
    with_new_users,
)
from genalign.reward_learning.users import AnnotatedPair, UserAccuracy
from genalign.runtime.files import load_state, save_state
from genalign.types import Prompt, users_of
from rewards.backbones.encoders import DualEncoder
from rewards.user_embeddings import HELD_OUT, dual_encoder, embedded_comparisons, rate_arguments


@dataclass(frozen=True)
class PALReward:
    """The taste of each prompt's user, as a reward of single samples, from the file of ``genalign learn-users``.

    A prompt without a user is scored for the mean of all users; a user who is not in the file is refused with the name.

    Args:
        weights: The file, opened at the first call.
    """

    weights: str

    @property
    def sample_rate(self) -> int | None:
        """The rate of the sound that it takes, in Hz; None for images."""
        rate = _opened(self.weights)[1]
        return rate

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiable in them; NaN where one has NaN."""
        model, rate, encoder = _opened(self.weights)
        network, model = encoder.to(samples.device), model.to(samples.device)
        features = F.normalize(network(samples, *rate_arguments(rate)).float(), dim=-1)
        texts = network.text([prompt.text for prompt in prompts])
        scores: Tensor = model(features, texts, model.weights_of([users_of(prompt) for prompt in prompts]))
        return scores


@functools.cache
def _opened(path: str) -> tuple[IdealPointModel, int | None, DualEncoder]:
    model, encoder, rate = _read(path)
    return model.requires_grad_(False).eval(), rate, dual_encoder(encoder, rate)


def _read(path: str) -> tuple[IdealPointModel, str, int | None]:
    """Read a file: the model, and the encoder's name and rate. Raises FileNotFoundError or ValueError for another."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: learn one with genalign learn-users")
    tensors, meta = load_state(Path(path))
    if set(meta) != {"settings", "users", "encoder", "sample_rate"}:
        raise ValueError(f"{path} holds no users' tastes: learn them with genalign learn-users")
    return IdealPointModel.restore(tensors, meta), meta["encoder"], meta["sample_rate"]


@dataclass(frozen=True)
class PALLearner:
    """What ``genalign learn-users`` learns by: the encoder, the shape of the model, and its fit.

    Args:
        model: The CLIP whose embeddings are read, or with a ``sample_rate`` the CLAP.
        prototypes: Number of prototypical ideal points; more than there are tastes does little harm.
        score: "angle" is a cosine with ideal points that depend on the prompt (PAL-B), "distance" a squared distance to
            ones that do not (PAL-A).
        dimensions: Number of dimensions of the space of preferences.
        hidden: Width of the perceptrons.
        sample_rate: Sample rate of the sound in Hz; null for images.
        fit: Optimizer settings.
    """

    model: str
    prototypes: int = 4
    score: Score = "angle"
    dimensions: int = 32
    hidden: int = 128
    sample_rate: int | None = None
    fit: PreferenceFit = field(default_factory=PreferenceFit)

    def learn(self, comparisons: Iterable[AnnotatedPair], path: Path, known: Path | None = None) -> UserAccuracy:
        """Learn the users' tastes from comparisons and write them to a file.

        A fifth of each user's comparisons is held out, and the result is the accuracy on it.

        Args:
            comparisons: The comparisons; their samples are read once, in order.
            path: The safetensors file for ``PALReward``.
            known: A file of other users, to which these are added with everything else frozen; None starts from
                scratch.

        Raises:
            ValueError: There is no comparison, or the known file is of another encoder.
        """
        train, held_out = embedded_comparisons(comparisons, self.model, self.sample_rate).split(HELD_OUT, self.fit.seed)
        if known is None:
            shape = IdealPointSettings(
                train.preferred.shape[1],
                train.prompts.shape[1],
                self.prototypes,
                self.dimensions,
                self.hidden,
                self.score,
            )
            model = new_model(shape, list(dict.fromkeys(train.annotators)), self.fit.seed)
            for _ in fit(model, train, self.fit):
                pass
        else:
            earlier, encoder, rate = _read(str(known))
            if (encoder, rate) != (self.model, self.sample_rate):
                raise ValueError(f"{known} is of the encoder {encoder} (sample rate {rate}): set the learner's alike")
            model = with_new_users(earlier, train, self.fit)
        tensors, meta = model.state()
        save_state(path, tensors, {**meta, "encoder": self.model, "sample_rate": self.sample_rate})
        _opened.cache_clear()
        return UserAccuracy(accuracies(model, train), accuracies(model, held_out))
