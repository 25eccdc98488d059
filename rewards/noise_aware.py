"""Students for noise-aware rewards: small networks that score previews at any noise level, and their files."""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.runtime.files import load_state, save_state
from genalign.search.noise_aware import NoiseAware, Quality
from genalign.types import Prompt
from rewards.backbones.clap_encoder import ClapEncoder, load_clap
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.encoders import DualEncoder

_LEVEL_WIDTH = 32
_MIDDLE_DB = 50.0  # a spectrogram's values are around -50


class TowerScorer(nn.Module, ABC):
    """A regressor on a sample's embedding u and its text's embedding t, by [u, t, u t, |u - t|] and the level; the
    copied tower of samples is trained along. ``start``: the file of a scorer of this kind to go on from, such as the
    reward that is to be distilled.
    """

    on: Literal["latents", "samples"] = "samples"

    def __init__(self, hidden: int, start: str | None, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = {**arguments, "hidden": hidden}
        self.tower = _copied(self.shared())
        width = self.shared().text(["a"]).shape[1]
        self.read = nn.Sequential(nn.Linear(4 * width + _LEVEL_WIDTH, hidden), nn.GELU(), nn.Linear(hidden, 1))
        if start is not None:
            self.load_state_dict(load_scorer(start).student.state_dict())

    @abstractmethod
    def shared(self) -> DualEncoder:
        """The encoder that the tower is a copy of; its texts are embedded by it."""

    def embed(self, samples: Tensor) -> Tensor:
        """Embeddings (B, d) by the tower."""
        embeddings: Tensor = self.tower(samples)
        return embeddings

    def forward(self, previews: Tensor, sigma: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) of samples (B, ...) at noise levels (B,)."""
        seen = F.normalize(self.embed(previews), dim=-1)
        text = self.shared().text([prompt.text for prompt in prompts]).to(seen)
        pair = torch.cat([seen, text, seen * text, (seen - text).abs(), level_features(sigma)], dim=1)
        scores: Tensor = self.read(pair).squeeze(-1)
        return scores


class ClipScorer(TowerScorer):
    """Of images (B, 3, H, W) in [0, 1], by the CLIP ``model`` of ``load_clip``."""

    def __init__(self, model: str, hidden: int = 256, start: str | None = None) -> None:
        self._model = model
        super().__init__(hidden, start, {"model": model})

    def shared(self) -> DualEncoder:
        return load_clip(self._model)


class ClapScorer(TowerScorer):
    """Of waveforms (B, C, L) in [-1, 1] at ``sample_rate`` Hz, by the CLAP ``model`` of ``load_clap``."""

    def __init__(self, model: str, sample_rate: int, hidden: int = 256, start: str | None = None) -> None:
        self._model, self.sample_rate = model, sample_rate
        super().__init__(hidden, start, {"model": model, "sample_rate": sample_rate})

    def shared(self) -> DualEncoder:
        return load_clap(self._model)

    def embed(self, samples: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(samples, self.sample_rate)
        return embeddings


class LatentScorer(ClipScorer):
    """The same of latent previews, through a small decoder of its own (as TAESD is one) to images of ``scale`` times
    their size: the pipeline's decoder is not called. ``start``: the file of a ``ClipScorer``.
    """

    on = "latents"

    def __init__(
        self,
        model: str,
        channels: int,
        scale: int,
        width: int = 64,
        depth: int = 3,
        hidden: int = 256,
        start: str | None = None,
    ) -> None:
        super().__init__(model, hidden, start)
        self.arguments |= {"channels": channels, "scale": scale, "width": width, "depth": depth}
        widths = [channels] + depth * [width]
        last = nn.Conv2d(width, 3 * scale**2, 3, padding=1)
        self.decoder = nn.Sequential(*_convolutions(nn.Conv2d, widths), last, nn.PixelShuffle(scale), nn.Sigmoid())

    def seen(self, samples: Tensor) -> Tensor:
        """What the decoder is to make: the images."""
        return samples

    def embed(self, samples: Tensor) -> Tensor:
        return super().embed(self.decoder(samples))


class ClapLatentScorer(ClapScorer):
    """Of latent previews (B, channels, n) of clips, through a small decoder of its own to the spectrogram that CLAP
    hears: neither the pipeline's decoder nor a waveform is made. ``start``: the file of a ``ClapScorer``.

    For clips that are as long as CLAP's window.
    """

    on = "latents"

    def __init__(
        self,
        model: str,
        sample_rate: int,
        channels: int,
        width: int = 128,
        depth: int = 3,
        hidden: int = 256,
        start: str | None = None,
    ) -> None:
        super().__init__(model, sample_rate, hidden, start)
        self.arguments |= {"channels": channels, "width": width, "depth": depth}
        windows = load_clap(model).windows
        self.decoder = SpectraDecoder(
            channels, width, depth, windows.length // windows.hop + 1, windows.filters.shape[1]
        )

    def seen(self, samples: Tensor) -> Tensor:
        """What the decoder is to make: the clips' spectrograms. Raises ValueError for clips of another length."""
        windows = self.encoder.windows
        seconds, heard = samples.shape[-1] / self.sample_rate, windows.length / windows.rate
        if abs(seconds - heard) > windows.hop / windows.rate:
            raise ValueError(
                f"a ClapLatentScorer hears one window of {heard:g} s, and the model makes clips of {seconds:g} s: use a"
                " ClapScorer, which hears decoded previews of any length"
            )
        return self.encoder.spectra(samples, self.sample_rate)

    def embed(self, samples: Tensor) -> Tensor:
        return self.encoder.embed_spectra(self.decoder(samples))[0]

    @property
    def encoder(self) -> ClapEncoder:
        """The trained tower."""
        return cast(ClapEncoder, self.tower)


class SpectraDecoder(nn.Module):
    """From latents (B, channels, n) to one window's log-mel spectrogram (B, 1, 1, frames, mels) in dB."""

    def __init__(self, channels: int, width: int, depth: int, frames: int, mels: int) -> None:
        super().__init__()
        self.frames = frames
        self.read = nn.Sequential(*_convolutions(nn.Conv1d, [channels] + depth * [width]))
        self.write = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=1), nn.SiLU(), nn.Conv1d(width, mels, 3, padding=1)
        )

    def forward(self, latents: Tensor) -> Tensor:
        spread = F.interpolate(self.read(latents), size=self.frames, mode="linear", align_corners=True)
        spectra: Tensor = _MIDDLE_DB * (self.write(spread) - 1)
        return spectra.transpose(1, 2)[:, None, None]


def _convolutions(kind: type[nn.Module], widths: Sequence[int]) -> list[nn.Module]:
    """Convolutions of three, each with its activation."""
    return [layer for pair in itertools.pairwise(widths) for layer in (kind(*pair, 3, padding=1), nn.SiLU())]


def level_features(sigma: Tensor) -> Tensor:
    """Sines and cosines (B, 32) of noise levels (B,), at frequencies from 1 to 64 per unit."""
    rates = torch.exp(torch.linspace(0, math.log(64), _LEVEL_WIDTH // 2, device=sigma.device))
    angles = 2 * math.pi * sigma.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def save_scorer(path: Path, scorer: NoiseAware) -> None:
    """Write a scorer whose student is one of this file's."""
    student = scorer.student
    meta = {
        "student": type(student).__name__,
        "arguments": student.arguments,
        "qualities": [asdict(quality) for quality in scorer.qualities],
        "mean": scorer.mean,
        "std": scorer.std,
    }
    save_state(path, student.state_dict(), meta)


def load_scorer(path: str | Path, least_tau: float = 0.1) -> NoiseAware:
    """What ``save_scorer`` wrote. Raises ValueError for another file."""
    tensors, meta = load_state(Path(path))
    kinds = {kind.__name__: kind for kind in (ClipScorer, ClapScorer, LatentScorer, ClapLatentScorer)}
    if meta.get("student") not in kinds:
        raise ValueError(f"{path} is not a noise-aware reward: make one by genalign train-noise-aware")
    student = kinds[meta["student"]](**meta["arguments"])
    student.load_state_dict(tensors)
    qualities = tuple(Quality(**found) for found in meta["qualities"])
    return NoiseAware(student.eval(), qualities, meta["mean"], meta["std"], least_tau)


class ScorerReward:
    """A scorer of samples as a reward of clean ones: at the lowest level that it was validated at."""

    def __init__(self, path: str | Path) -> None:
        self.scorer = load_scorer(path)
        if self.scorer.on != "samples":
            raise ValueError(
                f"{path} scores latents, and a reward is given samples: use one that was trained on samples"
            )
        self.level = min(found.sigma for found in self.scorer.qualities)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), differentiable; NaN where a sample has NaN."""
        level = torch.full((len(samples),), self.level, device=samples.device)
        scores: Tensor = self.scorer.student.to(samples.device)(samples, level, prompts)
        return self.scorer.mean + self.scorer.std * scores


def _copied(shared: nn.Module) -> nn.Module:
    """A trainable copy of an encoder, in float32; dropout stays off, and statistics of batches (CLAP's) as they are."""
    tower = copy.deepcopy(shared)
    return tower.float().requires_grad_(True).eval()
