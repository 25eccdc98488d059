"""Stable Diffusion 3 and 3.5, and every folder of the same layout, such as the embedded shapes model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from torch import Tensor, nn

from genalign.checkpoints import write_json
from genalign.paths import FlowPath
from genalign.types import Conditioning, Grid, NoiseLevel
from pipelines.folders import check_folder, fingerprint

_DIFFUSERS_T5_LENGTH = 256
_BASE_FILE = "base.json"
_TRAIN_TIMESTEPS = 1000


class SD3:
    """A ``StableDiffusion3Pipeline`` seen as encode / predict / decode.

    ``max_sequence_length`` is the number of T5 tokens: the tokenizer's own maximum, at most diffusers' 256, unless
    given. ``autocast`` runs the transformer and the VAE under mixed precision of that dtype. With ``offload`` the
    text encoders and the VAE are on ``device`` only while they are used.
    """

    path = FlowPath()

    def __init__(
        self,
        pipe: StableDiffusion3Pipeline,
        *,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        offload: bool = False,
    ) -> None:
        self.pipe = pipe
        self.device = torch.device(device)
        self.autocast = autocast
        self.offload = offload
        native = pipe.transformer.config.sample_size
        self.height = self._latent_size(height, native)
        self.width = self._latent_size(width, native)
        self.max_sequence_length = max_sequence_length or _t5_length(pipe)
        self.fingerprint = fingerprint(pipe.transformer)
        self._cache: dict[str, dict[str, Tensor]] = {}
        for module in (pipe.transformer, pipe.vae, *self._text_encoders):
            module.requires_grad_(False).eval()
        pipe.transformer.to(self.device)
        if not offload:
            pipe.to(self.device)

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        offload: bool = False,
    ) -> SD3:
        """Open a folder or a Hub id. Raises ``FileNotFoundError`` or ``ValueError`` saying what is there instead."""
        check_folder(path_or_id, "StableDiffusion3Pipeline")
        pipe = StableDiffusion3Pipeline.from_pretrained(path_or_id, dtype=dtype)
        return cls(
            pipe,
            device=device,
            autocast=autocast,
            height=height,
            width=width,
            max_sequence_length=max_sequence_length,
            offload=offload,
        )

    @property
    def denoiser(self) -> SD3Transformer2DModel:
        """The transformer, which is what is trained."""
        return self.pipe.transformer

    @property
    def _text_encoders(self) -> list[nn.Module]:
        encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3)
        return [encoder for encoder in encoders if encoder is not None]

    def _latent_size(self, pixels: int | None, native: int) -> int:
        factor, patch = self.pipe.vae_scale_factor, self.pipe.transformer.config.patch_size
        if pixels is None:
            return int(native)
        if pixels % (factor * patch):
            raise ValueError(f"height and width must be multiples of {factor * patch} for this model, not {pixels}")
        return pixels // int(factor)

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        factor = int(self.pipe.vae_scale_factor)
        return self.height * factor, self.width * factor

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Tensors ``context`` (P, L, D) and ``pooled`` (P, D'), on the CPU; every distinct text is encoded once."""
        missing = sorted({text for text in (*prompts, "") if text not in self._cache})
        for start in range(0, len(missing), 64):
            self._encode_batch(missing[start : start + 64])
        rows = [self._cache[text] for text in prompts]
        return Conditioning({name: torch.stack([row[name] for row in rows]) for name in ("context", "pooled")})

    @torch.no_grad()
    def _encode_batch(self, texts: list[str]) -> None:
        with _lent(self._text_encoders, self.device, self.offload):
            context, _, pooled, _ = self.pipe.encode_prompt(
                texts,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        for text, words, summary in zip(texts, context.cpu(), pooled.cpu(), strict=True):
            self._cache[text] = {"context": words, "pooled": summary}

    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """The checkpoint's scheduler's grid for ``num_steps``, or exactly the given T ``sigmas`` and a final 0."""
        if sigmas is not None:
            sigma = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
            return Grid(timestep=sigma[:-1] * _TRAIN_TIMESTEPS, alpha=1 - sigma, sigma=sigma)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        mu = self._dynamic_shift() if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(num_steps, mu=mu)
        sigma = scheduler.sigmas.double()
        return Grid(timestep=scheduler.timesteps.double(), alpha=1 - sigma, sigma=sigma)

    def _dynamic_shift(self) -> float:
        """diffusers' ``calculate_shift``: linear in the number of image tokens."""
        config = self.pipe.scheduler.config
        tokens = (self.height // self.denoiser.config.patch_size) * (self.width // self.denoiser.config.patch_size)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (tokens - config.base_image_seq_len))

    def level(self, u: Tensor) -> NoiseLevel:
        """Noise levels for training at u in [0, 1] (B,), by the scheduler's static shift."""
        shift = self.pipe.scheduler.config.shift
        u = u.double()
        sigma = shift * u / (1 + (shift - 1) * u)
        return NoiseLevel(timestep=sigma * _TRAIN_TIMESTEPS, alpha=1 - sigma, sigma=sigma)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents (B, C, h, w) on the pipeline's device, one CPU generator per seed."""
        shape = (self.denoiser.config.in_channels, self.height, self.width)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """Velocity in float32 for x (B, C, h, w); with guidance > 1 one batch of 2 B, unconditional rows first."""
        context, pooled = conditioning.tensors["context"], conditioning.tensors["pooled"]
        timestep = level.timestep.float().expand(len(x))
        if guidance > 1:
            empty = self._cache[""]
            context = torch.cat([empty["context"].expand_as(context), context])
            pooled = torch.cat([empty["pooled"].expand_as(pooled), pooled])
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
        dtype = self.denoiser.dtype
        with self._mixed_precision():
            output: Tensor = self.denoiser(
                hidden_states=x.to(self.device, dtype),
                timestep=timestep.to(self.device),
                encoder_hidden_states=context.to(self.device, dtype),
                pooled_projections=pooled.to(self.device, dtype),
                return_dict=False,
            )[0]
        if guidance <= 1:
            return output.float()
        unconditional, conditional = output.float().chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] in float32; differentiable."""
        vae = self.pipe.vae
        latents = latents.to(self.device) / vae.config.scaling_factor + vae.config.shift_factor
        with _lent([vae], self.device, self.offload), self._mixed_precision():
            decoded: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def save_lora(self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
        """Write an adapter as ``StableDiffusion3Pipeline.load_lora_weights`` expects it, rank and alpha included."""
        metadata = {
            name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
        }
        StableDiffusion3Pipeline.save_lora_weights(
            directory, transformer_lora_layers=dict(state), transformer_lora_adapter_metadata=metadata
        )
        write_json(directory / _BASE_FILE, {"fingerprint": self.fingerprint})

    def save_denoiser(self, directory: Path) -> None:
        """Write the transformer as ``SD3Transformer2DModel.from_pretrained`` opens it."""
        self.denoiser.save_pretrained(directory)

    def load_lora(self, directory: Path) -> None:
        """Put on an adapter that ``save_lora``, or diffusers, wrote. Raises ValueError for one of another base."""
        if not directory.is_dir():
            raise FileNotFoundError(f"no LoRA folder {directory}: give the lora/ folder of a run")
        base = directory / _BASE_FILE
        if base.is_file() and json.loads(base.read_text())["fingerprint"] != self.fingerprint:
            raise ValueError(f"the adapter in {directory} was trained on another base checkpoint than this one")
        self.pipe.load_lora_weights(directory)

    def _mixed_precision(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


def _t5_length(pipe: StableDiffusion3Pipeline) -> int:
    if pipe.tokenizer_3 is None:
        return _DIFFUSERS_T5_LENGTH
    return min(_DIFFUSERS_T5_LENGTH, int(pipe.tokenizer_3.model_max_length))


@contextlib.contextmanager
def _lent(modules: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
    """Modules moved to ``device`` for a while, and back to the CPU, where ``offload``."""
    if not offload:
        yield
        return
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")
