"""Decoding, scores and costs of the calls of a diffusers pipeline of the user's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AudioLDM2Pipeline,
    DiffusionPipeline,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImage21Pipeline,
    QwenImagePipeline,
    StableAudioPipeline,
)
from torch import Tensor, nn

from genalign.scoring.budget import DECODE, NFE, Ledger, metered_reward, metered_rewards
from genalign.scoring.score import NamedReward, named, score
from genalign.search.lineage import Lineage
from genalign.search.reward_failures import RewardFailures
from genalign.search.strategy import Previews, StandaloneScorer
from genalign.types import Prompt, RewardFunction
from pipelines.ace_step import normalize_peak
from pipelines.audio_ldm2 import decode_spectrogram
from pipelines.family import unscale
from pipelines.flux2 import decode_tokens
from pipelines.qwen_image21 import on_white
from pipelines.steering.batches import denoiser_of
from pipelines.steering.scheduler_hooks import grid_of, replaced

Rewards = RewardFunction | Mapping[str, RewardFunction] | Sequence[NamedReward]
"""One reward, or several by name."""

Decode = Callable[[Tensor], Tensor]
"""From latents in the scheduler's scale (N, ...) to images (N, 3, H, W) in [0, 1] or waveforms (N, C, L) in [-1, 1]."""


class PipelineScorer:
    """Decodes and scores the latents of a diffusers pipeline, and counts its calls in ``ledger``."""

    def __init__(self, pipe: DiffusionPipeline, reward: Rewards, decode: Decode | None, batch_size: int | None) -> None:
        self.pipe, self.decode, self.batch_size = pipe, decode, batch_size
        self.ledger, self.lineage, self.failures = Ledger(), Lineage(), RewardFailures()
        self.given = tuple(named(reward))
        self.rewards = self.failures.watched(metered_rewards(self.given, self.ledger))
        self._size: tuple[int, int] | None = None

    @property
    def sample_rate(self) -> int | None:
        """The rate of the pipeline's sound in Hz; None for images."""
        source = getattr(self.pipe, "vocoder", None) or self.pipe.vae
        rate = getattr(getattr(source, "config", None), "sampling_rate", None)
        return None if rate is None else int(rate)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Count the NFE of the denoiser, and note the size of the images, within the context.

        Raises ValueError for a pipeline without a transformer or a unet.
        """

        def count_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
            self.ledger.record(NFE, len(x))

        def note_size(arguments: Mapping[str, Any]) -> None:
            if "height" in arguments and "width" in arguments:
                self._size = int(arguments["height"]), int(arguments["width"])

        handle = denoiser_of(self.pipe).register_forward_pre_hook(count_call, with_kwargs=True)
        try:
            with observed(self.pipe, "prepare_latents", note_size):
                yield
        finally:
            handle.remove()

    @torch.no_grad()
    def decode_and_score(self, latents: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Decode and score latents, at most ``batch_size`` at a time.

        Args:
            latents: Latents (N, ...) as the scheduler has them.
            prompts: The prompt of each.

        Returns:
            The scores (N, K rewards), NaN where one failed, and the samples (N, ...) on the CPU.

        Raises:
            RewardError: A reward raised on all samples.
        """
        scores, samples = [], []
        size = self.batch_size or len(latents)
        for first in range(0, len(latents), size):
            part = latents[first : first + size]
            decoded = self._decode(part)
            scores.append(score(self.rewards, decoded, prompts[first : first + len(part)]))
            samples.append(decoded.cpu())
        column = torch.cat(scores)
        raised = [i for i, r in enumerate(self.rewards) if self.failures.last.get(r.name, "").startswith("raised")]
        whole = f"{len(latents)} samples of the call"
        self.failures.require_scores([self.rewards[i] for i in raised], column[:, raised], whole)
        return column, torch.cat(samples)

    @torch.no_grad()
    def score_previews(
        self, scorer: StandaloneScorer | None, latents: Tensor, prompts: Sequence[Prompt], step: int
    ) -> Tensor:
        """Score the previews of a step of the scheduler as (N, K), by ``scorer`` or else by the decoded rewards.

        Args:
            scorer: A scorer of previews; None decodes them and takes the rewards.
            latents: The clean latents (N, ...) that the network predicts there.
            prompts: The prompt of each.
            step: The step, counted from 0.

        Raises:
            ValueError: The scorer refuses the noise level, the reward or the latents, or the scheduler has levels that
                cannot be derived.
        """
        if scorer is None:
            return self.decode_and_score(latents, prompts)[0]
        share = float(grid_of(self.pipe.scheduler).noise_share[step])
        metered = functools.partial(metered_reward, ledger=self.ledger)
        return scorer.score(
            Previews(latents, prompts, share, self.given, self._decode, metered, self.batch_size, latents.device)
        )

    def _decode(self, latents: Tensor) -> Tensor:
        self.ledger.record(DECODE, len(latents))
        return self.decode(latents) if self.decode else decode_latents(self.pipe, latents, self._size)


@contextmanager
def observed(instance: object, name: str, note: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Show ``note`` the arguments, by name, of every call of a method within the context."""
    method = getattr(instance, name)
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        note(signature.bind(*args, **kwargs).arguments)
        return method(*args, **kwargs)

    with replaced(instance, name, wrapper):
        yield


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Decode latents (N, ...) to images (N, 3, H, W) in [0, 1] or waveforms (N, C, L) in [-1, 1], float32.

    ``size`` (height, width) in pixels is needed for latents that are packed into tokens. Raises ValueError for a
    pipeline without an autoencoder, or packed latents without a size.
    """
    if getattr(pipe, "vae", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no component named vae: give steer your own decode=")
    if isinstance(pipe, StableAudioPipeline):
        return _upcast_decode(pipe.vae, latents)
    if isinstance(pipe, AudioLDM2Pipeline):
        return decode_spectrogram(pipe, latents).float().clamp(-1, 1)
    if isinstance(pipe, AceStepPipeline):
        return normalize_peak(_upcast_decode(pipe.vae, latents.transpose(1, 2)))
    if isinstance(pipe, FluxPipeline | Flux2KleinPipeline | QwenImagePipeline | QwenImage21Pipeline):
        if size is None:
            raise ValueError(f"{type(pipe).__name__} packs its latents into tokens: give the size of the image")
        if isinstance(pipe, Flux2KleinPipeline):
            height, width = (side // int(pipe.vae_scale_factor) for side in size)
            return (decode_tokens(pipe.vae, latents, height, width).float() / 2 + 0.5).clamp(0, 1)
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    if latents.ndim == 3:
        raise ValueError(f"{type(pipe).__name__} packs its latents, (N, tokens, C): give steer your own decode=")
    if isinstance(pipe, QwenImagePipeline | QwenImage21Pipeline):  # frames of a video (N, C, 1, h, w)
        frames = _upcast_decode(pipe.vae, unscale(latents, pipe.vae.config))
        return on_white((frames[:, :, 0] / 2 + 0.5).clamp(0, 1))
    return (_upcast_decode(pipe.vae, unscale(latents, pipe.vae.config)) / 2 + 0.5).clamp(0, 1)


def _upcast_decode(vae: Any, latents: Tensor) -> Tensor:
    """Decode unscaled latents, in float32 with an autoencoder that overflows in half precision."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        decoded: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
    finally:
        if upcast:
            vae.to(dtype)
    return decoded
