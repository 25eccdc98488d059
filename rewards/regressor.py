"""Rewards that were trained on top of an encoder: a regressor on the embeddings of a sample and its prompt."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.runtime.files import load_state, save_state
from genalign.types import Prompt
from rewards.backbones.clap_encoder import load_clap
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.encoders import DualEncoder


class Regressor(nn.Module):
    """A perceptron on [u, t, u t, |u - t|] of a sample's embedding u and its prompt's embedding t.

    The encoder is that of its loader, frozen and shared; only the perceptron ``head`` is trained and saved.

    Args:
        model: The CLIP of ``load_clip`` for images; with a ``sample_rate``, the CLAP of ``load_clap``.
        hidden: Width of the perceptron.
        sample_rate: Rate of the sound in Hz; None for images.
    """

    def __init__(self, model: str, hidden: int = 256, sample_rate: int | None = None) -> None:
        super().__init__()
        self.settings = {"model": model, "hidden": hidden, "sample_rate": sample_rate}
        self.sample_rate = sample_rate
        self.arguments = () if sample_rate is None else (sample_rate,)
        self.encoder: DualEncoder = load_clip(model) if sample_rate is None else load_clap(model)
        width = self.encoder.text(["a"]).shape[1]
        self.head = nn.Sequential(nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        """The networks that samples pass through on the way to a score: the encoder's own, and the head."""
        return *self.encoder.sample_tower, self.head

    def features(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compute what the head reads, (B, 4 d)."""
        u = F.normalize(self.encoder(samples, *self.arguments), dim=-1)
        t = self.encoder.text([prompt.text for prompt in prompts])
        return torch.cat([u, t, u * t, (u - t).abs()], dim=1)

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiably."""
        scores: Tensor = self.head(self.features(samples, prompts)).squeeze(-1)
        return scores

    def save(self, path: Path) -> None:
        """Write the head, and what is needed to open it."""
        save_state(path, self.head.state_dict(), self.settings)


@dataclass(frozen=True)
class RegressorReward:
    """The score by a trained ``Regressor``, a perceptron on the embeddings of a sample and its prompt.

    ``scripts/pretrain/selection_reward.py`` trains those of the embedded worlds. The file is opened at the first call,
    and the network then follows the samples' device.

    Args:
        weights: The safetensors file that ``Regressor.save`` wrote.
    """

    weights: str | Path

    @property
    def sample_rate(self) -> int | None:
        """The rate of the sound that it takes, in Hz; None for images."""
        return self.network().sample_rate

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiable in them; NaN where one has NaN."""
        scores: Tensor = self.network().to(samples.device)(samples, prompts)
        return scores

    def network(self) -> Regressor:
        """Return the network that scores samples, for a student of this reward."""
        return _opened(str(self.weights))


@functools.cache
def _opened(path: str) -> Regressor:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: train the reward with scripts/pretrain/selection_reward.py")
    tensors, settings = load_state(Path(path))
    if set(settings) != {"model", "hidden", "sample_rate"}:
        raise ValueError(f"{path} is not a regressor: train one with scripts/pretrain/selection_reward.py")
    network = Regressor(**settings)
    network.head.load_state_dict(tensors)
    return network.requires_grad_(False).eval()
