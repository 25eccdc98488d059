"""What the wrappers of all diffusers families share: opening, caching of prompts, guidance, decoding, adapters."""

from __future__ import annotations

import contextlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, Unpack

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from genalign.diffusion.lora import ADAPTER, PEFT_CONFIG, load_lora, merge_lora, sort_metadata
from genalign.diffusion.paths import GaussianPath
from genalign.runtime.files import write_json
from genalign.runtime.memory_options import Memory
from genalign.types import Conditioning, Grid, NoiseLevel
from pipelines.checkpoint_files import check_folder, fingerprint, is_hub_id
from pipelines.quantization import quantized

logger = logging.getLogger(__name__)

_BASE_FILE = "base.json"
_ENCODE_BATCH = 64
_CACHED_BYTES = 4 << 30  # of encoded texts; one of FLUX takes 4 MiB


class Options(TypedDict, total=False):
    """How a checkpoint is opened, all optional.

    ``height`` and ``width`` of images are in pixels, and ``seconds`` are how long audio lasts, the checkpoint's own by
    default; ``max_sequence_length`` is the number of text tokens where the family lets one choose; ``autocast`` runs
    the denoiser and the VAE under mixed precision of that dtype; ``distilled_guidance`` is the guidance scale given
    to a guidance-distilled network; ``compiled`` runs the denoiser with ``torch.compile``; see
    ``genalign.runtime.memory_options.Memory`` for the rest.
    """

    device: str
    autocast: torch.dtype | None
    height: int | None
    width: int | None
    seconds: float | None
    max_sequence_length: int | None
    distilled_guidance: float | None
    compiled: bool
    memory: Memory


class DiffusersPipeline(ABC):
    """A diffusers pipeline seen as encode / predict / decode (``genalign.types.Pipeline``).

    A family says how its prompts are encoded, how its network is called, and what its noise levels are. Samples are
    images and latents (B, C, h, w), also where the network takes them in patches, unless ``sample_rate`` says that they
    are audio (``pipelines.audio_base``).
    """

    kind: ClassVar[type[DiffusionPipeline]]
    first_order: ClassVar[type[SchedulerMixin]]  # whose noise levels are taken, whatever solver a checkpoint ships
    denoiser_name: ClassVar[str] = "transformer"  # the component that is
    patch: ClassVar[int] = 2  # latent pixels side by side that the network takes as one
    unconditional: ClassVar[str | None] = ""  # the prompt that guidance leads away from, where it is one
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def __init__(self, pipe: DiffusionPipeline, **options: Unpack[Options]) -> None:
        self.pipe: Any = pipe  # its components differ by family
        self.device = torch.device(options.get("device", "cpu"))
        self.autocast = options.get("autocast")
        self.memory = options.get("memory", Memory())
        self._take_size(options)
        self.max_sequence_length = options.get("max_sequence_length") or self._default_max_tokens()
        self.distilled_guidance = options.get("distilled_guidance")
        if self.distilled_guidance is not None and not self.is_distilled:
            raise ValueError("this model has no guidance distilled into it: leave distilled_guidance out")
        self.fingerprint = fingerprint(self.denoiser)
        self._has_adapter = False
        self._cache: dict[str, dict[str, Tensor]] = {}
        self._batches: dict[str, list[str]] = {}
        self._prepare()
        if options.get("compiled"):
            self.denoiser.compile()

    def _prepare(self) -> None:
        for module in (self.denoiser, self.pipe.vae, *self._text_encoders):
            module.requires_grad_(False).eval()
        self.denoiser.to(self.device)
        if not self.memory.offload:
            self.pipe.to(self.device)
        if self.memory.checkpointing:
            self.pipe.components[self.denoiser_name].enable_gradient_checkpointing()
        if self.memory.tiling:
            self.pipe.vae.enable_tiling()

    @classmethod
    def load(cls, path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, **options: Unpack[Options]) -> Self:
        """Open a folder or a Hub id. Raises ``FileNotFoundError`` or ``ValueError`` saying what is there instead."""
        check_folder(path_or_id, cls.kind.__name__)
        extra = quantized(options.get("memory", Memory()), cls.denoiser_name, dtype)
        pipe = cls.kind.from_pretrained(path_or_id, dtype=dtype, **extra)
        if not isinstance(pipe.scheduler, cls.first_order) or pipe.scheduler.config.get("solver_order", 1) > 1:
            told = "%s ships %s; here it is sampled by first-order steps on the grid of %s"
            logger.warning(told, path_or_id, type(pipe.scheduler).__name__, cls.first_order.__name__)
        return cls(pipe, **options)

    # what a family says

    @property
    @abstractmethod
    def path(self) -> GaussianPath:
        """The interpolation that the network was trained on."""

    @abstractmethod
    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """The first-order sampling grid of the checkpoint's scheduler."""

    @abstractmethod
    def level(self, u: Tensor) -> NoiseLevel:
        """Noise levels for training at u in [0, 1] (B,)."""

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Named tensors (P, ...) that the network is conditioned on; the text encoders are on the device."""

    @abstractmethod
    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Call the denoiser once, without guidance or casts: latents x (B, C, ...), timesteps (B,) and conditioning
        (B, ...) on the device to the network's output (B, C, ...).
        """

    def _guide(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598)."""
        return unconditional + guidance * (conditional - unconditional)

    def run_vae(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, ...) with the VAE, without casts or postprocessing: images (B, 3, H, W) in [-1, 1]."""
        config = self.pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0  # not every autoencoder's config has one
        images: Tensor = self.pipe.vae.decode(
            (latents / config.scaling_factor + shift).to(self._vae_dtype), return_dict=False
        )[0]
        return images

    def _postprocess(self, decoded: Tensor) -> Tensor:
        """Samples in their range, such as images in [0, 1]."""
        return (decoded / 2 + 0.5).clamp(0, 1)

    def _default_size(self) -> int:
        """The side in latent pixels that the checkpoint was made for."""
        return int(self.pipe.components[self.denoiser_name].config.sample_size)

    def _default_max_tokens(self) -> int:
        """The number of text tokens unless the user chooses."""
        return int(self.pipe.tokenizer.model_max_length)

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return False

    def require_guidance(self, guidance: float) -> None:  # noqa: B027  # most networks take any
        """Raise ValueError for classifier-free guidance that the network was not made for."""

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Conditioning of ``count`` prompts of the greatest length, with shapes as ``encode`` returns and zero values:
        inputs of memory estimates.
        """
        return {"context": self.zeros(count, self.max_sequence_length, self._config.cross_attention_dim)}

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of ``shape`` on the pipeline's device, in the denoiser's dtype."""
        return torch.zeros(shape, device=self.device, dtype=self.pipe.components[self.denoiser_name].dtype)

    @property
    def _config(self) -> Any:
        return self.pipe.components[self.denoiser_name].config

    # what all share

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained."""
        network: nn.Module = self.pipe.components[self.denoiser_name]
        return network

    @property
    def latent_channels(self) -> int:
        """C of its latents."""
        return int(self.pipe.components[self.denoiser_name].config.in_channels)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of one sample."""
        return self.latent_channels, self.height, self.width

    @property
    def sample_rate(self) -> int | None:
        """Audio samples a second; None for images."""
        return None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(3, H, W) of one image in pixels."""
        factor = int(self.pipe.vae_scale_factor)
        return 3, self.height * factor, self.width * factor

    @property
    def resolution(self) -> tuple[int, ...]:
        """Height and width of the images in pixels; of audio, its length."""
        return self.sample_shape[1:]

    @property
    def _text_encoders(self) -> list[nn.Module]:
        found = [self.pipe.components.get(name) for name in self.encoders]
        return [encoder for encoder in found if encoder is not None]

    @property
    def _vae_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.pipe.vae.dtype
        return dtype

    def _take_size(self, options: Options) -> None:
        if options.get("seconds") is not None:
            raise ValueError("this model makes images: leave seconds out, and give height and width")
        self.height = self._latent_size(options.get("height"))
        self.width = self._latent_size(options.get("width"))

    def _latent_size(self, pixels: int | None) -> int:
        factor = int(self.pipe.vae_scale_factor)
        if pixels is None:
            return self._default_size()
        if pixels < 1 or pixels % (factor * self.patch):
            raise ValueError(
                f"height and width must be multiples of {factor * self.patch} for this model, not {pixels}"
            )
        return pixels // factor

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Named tensors (P, ...) on the CPU; shorter texts end in zeros. A text is encoded once, and again only where
        4 GiB of others were asked for since.
        """
        wanted = {*prompts} if self.unconditional is None else {*prompts, self.unconditional}
        missing = sorted(text for text in wanted if text not in self._cache)
        new = [text for text in missing if text not in self._batches]
        self.encode_together([new[start : start + _ENCODE_BATCH] for start in range(0, len(new), _ENCODE_BATCH)])
        for text in missing:
            if text not in self._cache:
                self._encode_batch(self._batches[text])
        self._forget_all_but(wanted)
        return Conditioning(_stacked([self._cache[text] for text in prompts]))

    def _forget_all_but(self, wanted: Iterable[str]) -> None:
        """And but the latest others, as far as there is room."""
        latest = {text: self._cache.pop(text) for text in sorted(wanted)}
        room = _CACHED_BYTES - sum(map(_bytes, latest.values()))
        for text, row in reversed([*self._cache.items()]):
            room -= _bytes(row)
            if room < 0:
                del self._cache[text]
        self._cache |= latest

    @contextlib.contextmanager
    def separate_encoding(self) -> Iterator[None]:
        """Encode texts without a trace: the batches in which texts are encoded later stay as without it."""
        batches, cache = dict(self._batches), dict(self._cache)
        try:
            yield
        finally:
            self._batches, self._cache = batches, cache

    @torch.no_grad()
    def _encode_batch(self, texts: list[str]) -> None:
        with lent(self._text_encoders, self.device, self.memory.offload):
            tensors = {name: tensor.cpu() for name, tensor in self._encode_texts(texts).items()}
        for row, text in enumerate(texts):
            self._cache[text] = {name: tensor[row].clone() for name, tensor in tensors.items()}  # freed one by one

    @property
    def encoded(self) -> list[list[str]]:
        """The batches in which texts were encoded so far: the last bits of a result depend on what is beside it."""
        return list({id(batch): batch for batch in self._batches.values()}.values())

    def encode_together(self, batches: Sequence[Sequence[str]]) -> None:
        """Once one of these texts is needed, encode it in its batch, such as ``encoded`` told of an earlier process.
        What is encoded already stays.
        """
        for batch in map(list, batches):
            self._batches |= dict.fromkeys(batch, batch)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents (B, C, ...) on the pipeline's device, one CPU generator per seed."""
        drawn = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """The network's output in float32 for x (B, C, ...); with guidance > 1 one batch of 2 B, unconditional rows
        first. ValueError for guidance that the network was not made for.
        """
        self.require_guidance(guidance)
        timestep, tensors = level.timestep.float().expand(len(x)), conditioning.tensors
        if guidance <= 1:
            return self._output(x, timestep, tensors)
        both = _beside(self._away(tensors), tensors)
        unconditional, conditional = self._output(torch.cat([x, x]), torch.cat([timestep, timestep]), both).chunk(2)
        return self._guide(unconditional, conditional, guidance)

    def _away(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What guidance leads away from, a row for each row of ``tensors`` (B, ...)."""
        assert self.unconditional is not None, "a family without such a prompt has its own way"
        row = self._cache[self.unconditional]
        return {name: row[name].expand(len(tensor), *row[name].shape) for name, tensor in tensors.items()}

    def _output(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        dtype = self.pipe.components[self.denoiser_name].dtype
        moved = {
            name: tensor.to(self.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }
        with self._mixed_precision():
            return self.run_denoiser(x.to(self.device, dtype), timestep.to(self.device), moved).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Samples (B, ...) in their range, in float32; differentiable. Raises ValueError where a float16 VAE
        overflows.
        """
        parts = torch.split(latents.to(self.device), self.memory.decode_batch or len(latents))
        with lent([self.pipe.vae], self.device, self.memory.offload), self._mixed_precision():
            decoded = torch.cat([self.run_vae(part).float() for part in parts])
        if self._vae_dtype == torch.float16 and not bool(decoded.isfinite().all()):
            raise ValueError("the VAE overflowed in float16: open the model in bfloat16, or in float32 with autocast")
        return self._postprocess(decoded)

    def save_lora(self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
        """Write an adapter as the pipeline's ``load_lora_weights`` expects it, rank and alpha included."""
        metadata = {
            name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
        }
        layers = {
            f"{self.denoiser_name}_lora_layers": dict(state),
            f"{self.denoiser_name}_lora_adapter_metadata": metadata,
        }
        type(self.pipe).save_lora_weights(directory, **layers)
        sort_metadata(directory / "pytorch_lora_weights.safetensors")
        self._save_base(directory)

    def _save_base(self, directory: Path) -> None:
        if self.memory.quantization is None:  # a quantised base has no fingerprint of the original's
            write_json(directory / _BASE_FILE, {"fingerprint": self.fingerprint})

    def save_denoiser(self, directory: Path) -> None:
        """Write the network as diffusers opens it."""
        self.pipe.components[self.denoiser_name].save_pretrained(directory)

    def load_denoiser(self, directory: Path) -> None:
        """Take the weights that ``save_denoiser`` wrote."""
        network = self.pipe.components[self.denoiser_name]
        network.load_state_dict(type(network).from_pretrained(directory).state_dict())

    def save_merged(self, directory: Path, whole: bool) -> None:
        """Write the network with its adapter, where it wears one, in its weights, or the ``whole`` pipeline so.
        It has no adapter afterwards.
        """
        if self._has_adapter:
            merge_lora(self.denoiser)
            self._has_adapter = False
        (self.pipe if whole else self.pipe.components[self.denoiser_name]).save_pretrained(directory)

    def load_lora(self, source: str | Path) -> None:
        """Put on an adapter that ``save_lora``, diffusers or PEFT wrote: a folder, a .safetensors file, or a Hub id.

        Raises ValueError for one of another base, FileNotFoundError for none; pickled weights are not opened.
        """
        folder = Path(source)
        if not folder.exists() and not is_hub_id(source):
            raise FileNotFoundError(
                f"no LoRA {source}: give the lora/ folder of a run, a .safetensors file or a Hub id"
            )
        base = folder / _BASE_FILE
        known = self.memory.quantization is None and base.is_file()
        if known and json.loads(base.read_text())["fingerprint"] != self.fingerprint:
            raise ValueError(f"the adapter in {source} was trained on another base checkpoint than this one")
        if (folder / PEFT_CONFIG).is_file():
            load_lora(self.denoiser, folder)
        else:
            self._load_published(source)
        self._has_adapter = True

    def _load_published(self, source: str | Path) -> None:
        self.pipe.load_lora_weights(source, adapter_name=ADAPTER, use_safetensors=True)

    def _mixed_precision(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)


def _bytes(row: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in row.values())


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors (P, ...) of rows whose first dimensions may differ, filled up with zeros."""
    return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}


def _beside(unconditional: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(2 B, ...): the unconditional rows, then those of ``tensors``."""
    return {name: pad_sequence([*unconditional[name], *tensor], batch_first=True) for name, tensor in tensors.items()}


@contextlib.contextmanager
def lent(modules: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
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
