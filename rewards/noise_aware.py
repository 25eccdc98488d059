"""Noise-aware rewards: small networks that score previews at any noise level, and their files."""

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
from genalign.search.noise_aware import LevelQuality, NoiseAware
from genalign.types import Prompt
from rewards.backbones.clap_encoder import ClapEncoder, load_clap
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.encoders import DualEncoder

_LEVEL_WIDTH = 32
_MIDDLE_DB = 50.0  # a spectrogram's values are around -50


class TowerScorer(nn.Module, ABC):
    """A regressor on [u, t, u t, |u - t|] of a sample's embedding u and its prompt's embedding t, and the noise level.

    The tower that embeds samples is a copy of the encoder's and is trained along. ``start`` is the file of a scorer of
    this kind to initialize from, such as the reward to distill.
    """

    input_kind: Literal["latents", "samples"] = "samples"

    def __init__(self, hidden: int, start: str | None, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = {**arguments, "hidden": hidden}
        with torch.random.fork_rng(devices=[]):  # the first opening of an encoder draws random numbers, later ones none
            self.shared()
        # A trainable copy in float32, in evaluation mode: no dropout, and CLAP's batch statistics stay as they are.
        self.tower = copy.deepcopy(self.shared()).float().requires_grad_(True).eval()
        width = self.shared().text(["a"]).shape[1]
        self.read = nn.Sequential(nn.Linear(4 * width + _LEVEL_WIDTH, hidden), nn.GELU(), nn.Linear(hidden, 1))
        if start is not None:
            self.load_state_dict(load_scorer(start).student.state_dict())

    @abstractmethod
    def shared(self) -> DualEncoder:
        """Return the pretrained encoder that embeds the prompts; the tower is a copy of it."""

    def embed(self, samples: Tensor) -> Tensor:
        """Embed samples (B, ...) with the tower, as (B, d)."""
        embeddings: Tensor = self.tower(samples)
        return embeddings

    def forward(self, previews: Tensor, sigma: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) at noise levels (B,), as (B,)."""
        u = F.normalize(self.embed(previews), dim=-1)
        t = self.shared().text([prompt.text for prompt in prompts]).to(u)
        scores: Tensor = self.read(torch.cat([u, t, u * t, (u - t).abs(), level_features(sigma)], dim=1)).squeeze(-1)
        return scores


class ClipScorer(TowerScorer):
    """A scorer of images (B, 3, H, W) in [0, 1], with the CLIP ``model`` of ``load_clip``."""

    def __init__(self, model: str, hidden: int = 256, start: str | None = None) -> None:
        self._model = model
        super().__init__(hidden, start, {"model": model})

    def shared(self) -> DualEncoder:
        return load_clip(self._model)


class ClapScorer(TowerScorer):
    """A scorer of waveforms (B, C, L) in [-1, 1] at ``sample_rate`` Hz, with the CLAP ``model`` of ``load_clap``."""

    def __init__(self, model: str, sample_rate: int, hidden: int = 256, start: str | None = None) -> None:
        self._model, self.sample_rate = model, sample_rate
        super().__init__(hidden, start, {"model": model, "sample_rate": sample_rate})

    def shared(self) -> DualEncoder:
        return load_clap(self._model)

    def embed(self, samples: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(samples, self.sample_rate)
        return embeddings


class LatentScorer(ClipScorer):
    """A scorer of image latents, which it decodes with a small decoder of its own, similar to TAESD.

    The pipeline's decoder is not called. The decoded images have ``scale`` times the latents' size. ``start`` is the
    file of a ``ClipScorer``.
    """

    input_kind = "latents"

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

    def decoder_target(self, samples: Tensor) -> Tensor:
        """Return the target of the decoder for decoded ``samples``: the images themselves."""
        return samples

    def embed(self, samples: Tensor) -> Tensor:
        return super().embed(self.decoder(samples))


class ClapLatentScorer(ClapScorer):
    """A scorer of audio latents (B, channels, n), which it decodes to CLAP's spectrogram with its own small decoder.

    Neither the pipeline's decoder nor a waveform is computed. The clips must be as long as CLAP's window, and ``start``
    is the file of a ``ClapScorer``.
    """

    input_kind = "latents"

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
        clap = load_clap(model)
        self.decoder = SpectraDecoder(channels, width, depth, clap.length // clap.hop + 1, clap.filters.shape[1])

    def decoder_target(self, samples: Tensor) -> Tensor:
        """Return the target of the decoder: the clips' spectrograms. Raises ValueError for clips of another length."""
        clap = self.encoder
        seconds, window = samples.shape[-1] / self.sample_rate, clap.length / clap.rate
        if abs(seconds - window) > clap.hop / clap.rate:
            raise ValueError(
                f"a ClapLatentScorer takes clips of {window:g} s, and the model generates {seconds:g} s: use a"
                " ClapScorer, which takes decoded previews of any length"
            )
        return self.encoder.spectra(samples, self.sample_rate)

    def embed(self, samples: Tensor) -> Tensor:
        return self.encoder.embed_spectra(self.decoder(samples))[0]

    @property
    def encoder(self) -> ClapEncoder:
        """The tower of samples, which is trained."""
        return cast(ClapEncoder, self.tower)


class SpectraDecoder(nn.Module):
    """A decoder from latents (B, channels, n) to one log-mel spectrogram (B, 1, 1, frames, mels) in dB."""

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
    """Stack convolutions with kernels of 3, each followed by its activation."""
    return [layer for pair in itertools.pairwise(widths) for layer in (kind(*pair, 3, padding=1), nn.SiLU())]


def level_features(sigma: Tensor) -> Tensor:
    """Compute sines and cosines (B, 32) of noise levels (B,), at frequencies from 1 to 64 per unit."""
    rates = torch.exp(torch.linspace(0, math.log(64), _LEVEL_WIDTH // 2, device=sigma.device))
    angles = 2 * math.pi * sigma.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def save_scorer(path: Path, scorer: NoiseAware) -> None:
    """Write a scorer whose student is a class of this module to a safetensors file."""
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
    """Read a file of ``save_scorer``. Raises ValueError for another file."""
    tensors, meta = load_state(Path(path))
    kinds = {kind.__name__: kind for kind in (ClipScorer, ClapScorer, LatentScorer, ClapLatentScorer)}
    if meta.get("student") not in kinds:
        raise ValueError(f"{path} is not a noise-aware reward: train one with genalign train-noise-aware")
    student = kinds[meta["student"]](**meta["arguments"])
    student.load_state_dict(tensors)
    qualities = tuple(LevelQuality(**quality) for quality in meta["qualities"])
    return NoiseAware(student.eval(), qualities, meta["mean"], meta["std"], least_tau)


class ScorerReward:
    """A noise-aware scorer as a reward of clean samples, at the lowest noise level that it was validated at."""

    def __init__(self, path: str | Path) -> None:
        self.scorer = load_scorer(path)
        if self.scorer.student.input_kind != "samples":
            raise ValueError(
                f"{path} scores latents, but rewards take samples: use a scorer that was trained on samples"
            )
        self.level = min(quality.sigma for quality in self.scorer.qualities)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), differentiably; NaN where a sample has NaN."""
        level = torch.full((len(samples),), self.level, device=samples.device)
        scores: Tensor = self.scorer.student.to(samples.device)(samples, level, prompts)
        return self.scorer.mean + self.scorer.std * scores
