"""Students of rewards: networks that predict from previews the reward of the clean sample, and their files."""

from __future__ import annotations

import copy
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from genalign.reward_learning.noise_aware import LevelQuality, NetworkReward, RewardIdentity
from genalign.runtime.files import load_state, save_state, with_prefix, without_prefix
from genalign.search.noise_aware import NoiseAware, ScorerLevel
from genalign.search.strategy import Previews
from genalign.types import Prompt, RewardFunction
from rewards.backbones.clap_encoder import ClapEncoder

_MIDDLE_DB = 50.0  # a spectrogram's values are around -50


class SelfDistilled(nn.Module):
    """A reward's own network with LoRA on the part that reads samples, to be trained on decoded previews of samples.

    Untrained, it is the reward. The frozen weights are the reward's own, not copied, and the reward stays as it is:
    LoRA is added to the matrices of linear and attention layers as they are used.

    Args:
        reward: A reward by one network with a ``sample_tower``, such as ``rewards.pickscore.PickScoreReward``.
        lora_rank: Rank of the LoRA matrices.
        alpha: LoRA is scaled by ``alpha / lora_rank``.
    """

    input_kind: ClassVar[Literal["latents", "samples"]] = "samples"
    network: nn.Module
    names: tuple[str, ...]
    down: nn.ParameterList
    up: nn.ParameterList

    def __init__(self, reward: RewardFunction, lora_rank: int = 16, alpha: float = 16.0) -> None:
        super().__init__()
        self.arguments: dict[str, object] = {"lora_rank": lora_rank, "alpha": alpha}
        network = reward.network() if isinstance(reward, NetworkReward) else None
        if network is None or not hasattr(network, "sample_tower"):
            raise ValueError(
                f"{type(reward).__name__} has no network that could be trained into a student: give a reward by one"
                " network, such as rewards.clip.ClipReward, or one of your own with a method network"
            )
        # A network of its own with the same frozen weights, so LoRA in one never shows in the other
        frozen = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
        self.network = copy.deepcopy(network, frozen).requires_grad_(False)
        self.scale: float = alpha / lora_rank
        matrices = _matrices(self.network)
        self.names = tuple(matrices)
        self.down = nn.ParameterList(torch.randn(lora_rank, w.shape[1]) / w.shape[1] ** 0.5 for w in matrices.values())
        self.up = nn.ParameterList(torch.zeros(w.shape[0], lora_rank) for w in matrices.values())

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples (B, ...) or their previews as (B,), in the units of the reward."""
        own = dict(self.network.named_parameters())
        weights = {
            name: own[name] + (self.scale * (up @ down)).to(own[name].dtype)
            for name, down, up in zip(self.names, self.down, self.up, strict=True)
        }
        scores: Tensor = functional_call(self.network, weights, (samples, prompts))
        return scores


def _matrices(network: nn.Module) -> dict[str, Tensor]:
    """Return the matrices, by name, of the linear and attention layers of a network's ``sample_tower``."""
    layers = (nn.Linear, nn.MultiheadAttention)
    parts: Sequence[nn.Module] = cast(Any, network).sample_tower
    inside = {
        id(weight)
        for part in parts
        for layer in part.modules()
        if isinstance(layer, layers)
        for weight in layer.parameters(recurse=False)
        if weight.ndim == 2
    }
    matrices: dict[str, Tensor] = {name: w for name, w in network.named_parameters() if id(w) in inside}
    if not matrices:
        raise ValueError(
            f"the sample tower of {type(network).__name__} has no linear layer that LoRA could be added to"
        )
    return matrices


class LatentDistilled(SelfDistilled, ABC):
    """A student that reads latents, which it decodes with a small decoder of its own: the pipeline's is not called.

    The decoder first learns what the pipeline's makes of previews; then it is trained along with the LoRA.
    """

    input_kind = "latents"
    decoder: nn.Module

    def __init__(self, reward: RewardFunction, channels: int, lora_rank: int, alpha: float) -> None:
        super().__init__(reward, lora_rank, alpha)
        self.channels = channels
        self.arguments |= {"channels": channels}

    @abstractmethod
    def decoder_target(self, samples: Tensor) -> Tensor:
        """Return what its decoder should output for previews that the pipeline decodes to ``samples``."""

    def forward(self, previews: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score latents (B, channels, ...) as (B,), in the units of the reward. Raises ValueError for other latents."""
        if previews.shape[1] != self.channels:
            raise ValueError(
                f"this scorer reads latents (B, {self.channels}, ...), not {tuple(previews.shape)}: use one that was"
                " trained for this pipeline, or one of decoded previews"
            )
        return super().forward(self.decoder(previews), prompts)


class LatentImageDistilled(LatentDistilled):
    """A student of image latents, with a decoder similar to TAESD to images of ``scale`` times the latents' size."""

    def __init__(
        self,
        reward: RewardFunction,
        channels: int,
        scale: int,
        width: int = 64,
        depth: int = 3,
        lora_rank: int = 16,
        alpha: float = 16.0,
    ) -> None:
        super().__init__(reward, channels, lora_rank, alpha)
        self.arguments |= {"scale": scale, "width": width, "depth": depth}
        last = nn.Conv2d(width, 3 * scale**2, 3, padding=1)
        layers = _convolutions(nn.Conv2d, [channels] + depth * [width])
        self.decoder = nn.Sequential(*layers, last, nn.PixelShuffle(scale), nn.Sigmoid())

    def decoder_target(self, samples: Tensor) -> Tensor:
        """Return the target of the decoder for decoded ``samples``: the images themselves."""
        return samples


class LatentClapDistilled(LatentDistilled):
    """A student of audio latents (B, channels, n), for a reward on CLAP: its decoder makes CLAP's spectrogram.

    Neither the pipeline's decoder nor a waveform is computed. The clips, at ``sample_rate`` Hz, must be as long as
    CLAP's window.
    """

    def __init__(
        self,
        reward: RewardFunction,
        channels: int,
        sample_rate: int,
        width: int = 128,
        depth: int = 3,
        lora_rank: int = 16,
        alpha: float = 16.0,
    ) -> None:
        super().__init__(reward, channels, lora_rank, alpha)
        self.sample_rate = sample_rate
        self.arguments |= {"sample_rate": sample_rate, "width": width, "depth": depth}
        clap = self._clap
        self.decoder = SpectraDecoder(channels, width, depth, clap.length // clap.hop + 1, clap.filters.shape[1])

    @property
    def _clap(self) -> ClapEncoder:
        encoders = [module for module in self.network.modules() if isinstance(module, ClapEncoder)]
        if not encoders:
            raise ValueError("this student is of a reward on CLAP, such as rewards.clap.ClapReward: give one")
        return encoders[0]

    def decoder_target(self, samples: Tensor) -> Tensor:
        """Return the target of the decoder: the clips' spectrograms. Raises ValueError for clips of another length."""
        clap = self._clap
        seconds, window = samples.shape[-1] / self.sample_rate, clap.length / clap.rate
        if abs(seconds - window) > clap.hop / clap.rate:
            raise ValueError(
                f"a LatentClapDistilled takes clips of {window:g} s, and the model generates {seconds:g} s: use"
                " SelfDistilled, which takes decoded previews of any length"
            )
        return clap.spectra(samples, self.sample_rate)


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


_STUDENTS = {kind.__name__: kind for kind in (SelfDistilled, LatentImageDistilled, LatentClapDistilled)}


def save_scorer(path: Path, scorer: NoiseAware, student: nn.Module) -> None:
    """Write a scorer to a safetensors file: the trained weights of each level, and which reward they are for.

    Raises ValueError for a student of another class than this module's.
    """
    if type(student).__name__ not in _STUDENTS:
        raise ValueError(f"{type(student).__name__} is not a class of rewards.noise_aware: save its weights yourself")
    tensors: dict[str, Tensor] = {}
    for place, level in enumerate(scorer.levels):
        tensors |= with_prefix(f"{place}.", dict(level.weights))
    meta = {
        "student": type(student).__name__,
        "arguments": student.arguments,
        "qualities": [asdict(level.quality) for level in scorer.levels],
        "reward": asdict(scorer.reward),
    }
    save_state(path, tensors, meta)


def load_scorer(path: str | Path, least_tau: float = 0.1) -> NoiseAware:
    """Read a file of ``save_scorer``. Raises ValueError for another file.

    The reward's own weights are not in it: they are those of the reward that a search selects by. It must be the one
    that the scorer was trained for.
    """
    tensors, meta = load_state(Path(path))
    if meta.get("student") not in _STUDENTS:
        raise ValueError(f"{path} is not a noise-aware reward: train one with genalign train-noise-aware")
    kind = _STUDENTS[meta["student"]]
    levels = tuple(
        ScorerLevel(LevelQuality(**quality), without_prefix(f"{place}.", tensors))
        for place, quality in enumerate(meta["qualities"])
    )
    make_student = functools.partial(kind, **meta["arguments"])
    return NoiseAware(make_student, kind.input_kind, levels, RewardIdentity(**meta["reward"]), least_tau)


@dataclass(frozen=True)
class ScorerFile:
    """A noise-aware reward by the path of its file, opened at its first use: the scorer of ``NoiseAwareGradient``.

    Args:
        path: A file of ``genalign train-noise-aware``.
        least_tau: Levels at which Kendall's tau with the clean reward is below this are refused.
    """

    path: str
    least_tau: float = 0.1

    @functools.cached_property
    def scorer(self) -> NoiseAware:
        """The scorer of the file. Raises ValueError for another file."""
        return load_scorer(self.path, self.least_tau)

    def covers(self, noise_share: float) -> bool:
        """Return whether the scorer was validated at this noise level."""
        return self.scorer.covers(noise_share)

    def expected(self, previews: Previews) -> Tensor:
        """Return expected rewards (N,) of the clean samples, differentiable in the previews' latents."""
        return self.scorer.expected(previews)
