"""The base of all diffusers families: loading, prompt encoding, guidance, decoding and adapters."""

from __future__ import annotations

import contextlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, Unpack

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from genalign.diffusion.lora import (
    ADAPTER,
    DIFFUSERS_WEIGHTS,
    adapter_file,
    inject_lora,
    merge_lora,
    multiply_in_input_dtype,
    save_peft,
    sort_metadata,
)
from genalign.diffusion.paths import GaussianPath
from genalign.diffusion.rollout import rows_are_finite
from genalign.runtime.cpu import use_faster_attention_backward
from genalign.runtime.distributed import ALL_RANKS, RankShare, own_device
from genalign.runtime.files import apply_umask, write_json
from genalign.runtime.fsdp import compute_dtype, unsharded_class
from genalign.runtime.hub import HubAccess, hub_answers, is_hub_id
from genalign.runtime.memory_options import Memory
from genalign.runtime.progress import SILENT, Progress
from genalign.types import Conditioning, Grid, NoiseLevel
from pipelines.adapter_files import read_adapter
from pipelines.checkpoint_files import (
    WeightFormat,
    absent_components,
    check_folder,
    fingerprint,
    hub_adapter,
    model_index,
    one_line_errors,
    require_weights,
    weight_variant,
)
from pipelines.checkpoint_settings import check_index, check_settings
from pipelines.compilation import CompiledBlocks, require_compiler
from pipelines.low_memory import (
    multiply_in_float8,
    on_device,
    pin_weights,
    quantization_arguments,
    require_quantization,
)
from pipelines.text_cache import DroppedEncoders, TextCache, cache_folder
from pipelines.text_embeddings import Encode, TextEmbeddings

logger = logging.getLogger(__name__)

_BASE_FILE = "base.json"


class Options(TypedDict, total=False):
    """Options of opening a checkpoint, all of them optional.

    ``height`` and ``width`` of images are in pixels, and ``seconds`` is the duration of audio; by default they are the
    checkpoint's own. ``negative_prompt`` is the text that guidance leads away from; "" is the family's default.
    ``max_sequence_length`` is the number of text tokens where the family leaves a choice; ``autocast`` runs the
    denoiser and the VAE under mixed precision of that dtype; ``distilled_guidance`` is the guidance scale that a
    guidance-distilled network takes as an input; ``compiled`` runs the denoiser's blocks under ``torch.compile`` after
    ``compile_blocks``; for ``memory`` see ``genalign.runtime.memory_options.Memory``. ``revision`` is a branch, tag or
    commit of a Hub id, and ``token`` the name of the environment variable that holds its token; ``variant`` names the
    weights, such as "fp16", and ``weights`` "bin" reads pickled ones in place of safetensors. ``text_cache`` is the
    folder of embeddings of ``encode_ahead``, with which the text encoders are not loaded.
    """

    device: str
    autocast: torch.dtype | None
    height: int | None
    width: int | None
    seconds: float | None
    negative_prompt: str
    max_sequence_length: int | None
    distilled_guidance: float | None
    compiled: bool
    memory: Memory
    revision: str | None
    variant: str | None
    token: str | None
    weights: WeightFormat
    text_cache: str | None


def hub_access(options: Options) -> HubAccess:
    """The access to the Hub that the options of opening a checkpoint describe."""
    return HubAccess(options.get("revision"), options.get("token"))


class DiffusersPipeline(ABC):
    """A diffusers pipeline as encode / predict / decode (``genalign.types.Pipeline``).

    A family defines how its prompts are encoded, how its network is called, and its noise levels. Samples are images
    with latents (B, C, h, w), also if the network takes them in patches; for audio see ``pipelines.audio_base``.
    """

    kind: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str] = "transformer"  # the component that is trained
    patch: ClassVar[int] = 2  # the side of the network's patches in latent pixels
    default_negative: ClassVar[str | None] = ""  # the negative prompt of guidance; None for one that is no text
    distilled_default: ClassVar[float] = 3.5  # the guidance scale that a guidance-distilled network takes as an input
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    sampling_encoders: ClassVar[tuple[str, ...]] = ()  # those of ``encoders`` that sampling needs, too
    decoders: ClassVar[tuple[str, ...]] = ("vae",)  # the components from latents to samples
    lora_in_diffusers: ClassVar[bool] = True  # whether diffusers saves and loads adapters of this family

    def __init__(self, pipe: DiffusionPipeline, **options: Unpack[Options]) -> None:
        check_settings(pipe.components, self.kind.__name__)
        self.pipe: Any = pipe  # its components differ by family
        self.device = own_device(options.get("device", "cpu"))
        self.autocast = options.get("autocast")
        self.memory = options.get("memory", Memory())
        self._adapter_access = HubAccess(token=options.get("token"))  # a revision is the base's
        self._set_size(options)
        self._set_texts_and_guidance(options)
        self.fingerprint = fingerprint(self.denoiser)
        self._has_adapter = False
        self._text_adapters: dict[str, LoraConfig] = {}  # of text encoders, by component
        self._embeddings = TextEmbeddings()
        self._text_encoders = [encoder for name in self.encoders if (encoder := pipe.components.get(name)) is not None]
        self._decoders = [pipe.components[name] for name in self.decoders]
        self._place_networks()
        if self.device.type == "cpu":
            use_faster_attention_backward()
        self.compiled = options.get("compiled", False)
        self._blocks: CompiledBlocks | None = None
        self._adapters: tuple[Any, int] = None, 0  # those that multiply in the dtype of autocast

    def _set_texts_and_guidance(self, options: Options) -> None:
        """Set the number of text tokens, the negative prompt and the guidance of a distilled network."""
        tokens = options.get("max_sequence_length")
        if tokens is not None and tokens < 1:
            raise ValueError(f"max_sequence_length must be at least 1 text token, not {tokens}")
        self.max_sequence_length = self.text_tokens if tokens is None else tokens
        self.negative_prompt = options.get("negative_prompt", "")
        if self.negative_prompt and not self.takes_negative:
            raise ValueError("this model takes no negative prompt: leave model.negative_prompt out")
        self.distilled_guidance = options.get("distilled_guidance")
        if self.distilled_guidance is not None and not self.is_distilled:
            raise ValueError("this model has no guidance distilled into it: leave distilled_guidance out")

    def _place_networks(self) -> None:
        """Freeze all networks, and move them according to the memory options."""
        for module in (self.denoiser, *self._decoders, *self._text_encoders):
            module.requires_grad_(False).eval()
        self.denoiser.to(self.device)
        if self.memory.quantization == "fp8":
            if self.compute_dtype != torch.bfloat16:
                raise ValueError("quantization 'fp8' returns bfloat16: set model.autocast or model.dtype to bfloat16")
            multiply_in_float8(self.denoiser)
        offload, waiting = self.memory.offload, list[nn.Module]()  # networks that wait on the CPU
        if offload == "none":
            self.pipe.to(self.device)
        else:
            waiting = [*self._text_encoders, *(self._decoders if offload == "all" else ())]
            for decoder in self._decoders if offload == "text" else ():
                decoder.to(self.device)
        if self.memory.checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        if self.memory.tiling:
            self.pipe.vae.enable_tiling()
        self._float32_vae = self.upcasts_vae and torch.float16 in (self.pipe.vae.dtype, self.autocast)
        if self._float32_vae:
            self.pipe.vae.float()
        if self.device.type == "cuda":
            pin_weights(waiting)

    @classmethod
    def load(cls, path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, **options: Unpack[Options]) -> Self:
        """Open a diffusers folder or a Hub id. Raises FileNotFoundError or ValueError for anything else."""
        access = hub_access(options)
        check_folder(path_or_id, cls.kind, access)
        check_index(model_index(path_or_id, access))
        files = _file_arguments(path_or_id, options)
        absent = dict.fromkeys(absent_components(path_or_id, cls.kind, access))
        memory = options.get("memory", Memory())
        require_quantization(memory, options.get("device", "cpu"))
        if options.get("compiled"):
            require_compiler(options.get("device", "cpu"), memory)
        extra = quantization_arguments(memory, cls.denoiser_name, dtype)
        text_only = {*cls.encoders}.difference(cls.sampling_encoders, absent) & {*model_index(path_or_id, access)}
        dropped = sorted(text_only) if options.get("text_cache") else []
        with one_line_errors(path_or_id):
            without = absent | dict.fromkeys(dropped)
            pipe = cls.kind.from_pretrained(path_or_id, dtype=dtype, **files, **without, **extra)
        for name, network in pipe.components.items():
            missing = [key for key, weight in getattr(network, "named_parameters", dict)() if weight.is_meta]
            if missing:
                raise ValueError(f"{path_or_id}/{name} has no weights for {missing[0]}: copy the whole folder")
        opened, shipped = cls(pipe, **options), pipe.scheduler
        if cache := options.get("text_cache"):
            skipped = {cls.denoiser_name, *cls.decoders, "scheduler", "safety_checker", "feature_extractor"}
            settings = opened.encoding_settings() | {"dtype": str(dtype), "files": [files["variant"], cls.__qualname__]}
            encoders = DroppedEncoders(path_or_id, dropped, {"dtype": dtype, **files})
            opened._embeddings = TextCache(cache_folder(Path(cache), path_or_id, skipped, access, settings), encoders)
        if not isinstance(shipped, opened.first_order) or shipped.config.get("solver_order", 1) > 1:
            message = "%s comes with %s. Genalign samples by first-order steps instead, at the noise levels of %s."
            logger.warning(message, path_or_id, type(shipped).__name__, opened.first_order.__name__)
        return opened

    @property
    @abstractmethod
    def first_order(self) -> type[SchedulerMixin]:
        """The scheduler of diffusers that supplies the noise levels, whatever solver a checkpoint ships."""

    @property
    @abstractmethod
    def path(self) -> GaussianPath:
        """The interpolation that the network was trained on."""

    @abstractmethod
    def grid(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Grid:
        """Return the first-order sampling grid of the checkpoint's scheduler, or of explicit ``sigmas``."""

    @abstractmethod
    def level(self, u: Tensor) -> NoiseLevel:
        """Return noise levels for training at u in [0, 1] (B,)."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode P texts to named tensors (P, ...), with the text encoders on the device."""

    @abstractmethod
    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Call the denoiser once, without guidance or casts, and return its output (B, C, ...).

        Latents ``x`` (B, C, ...), timesteps (B,) and conditioning (B, ...) are on the device.
        """

    @abstractmethod
    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return conditioning of ``count`` prompts of the greatest length with zero values, for memory estimates."""

    def call_denoiser(self, *inputs: Any, **named: Any) -> Tensor:
        """Call the denoiser by its own arguments, and return its output (B, ...)."""
        output: Tensor = self.denoiser(*inputs, **named, return_dict=False)[0]
        return output

    def apply_guidance(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Combine two predictions (B, C, ...) by classifier-free guidance (arXiv 2207.12598)."""
        return unconditional + guidance * (conditional - unconditional)

    def run_vae(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, ...) with the VAE, without casts or postprocessing: images (B, 3, H, W) in [-1, 1]."""
        unscaled = unscale(latents, self.pipe.vae.config).to(self.pipe.vae.dtype)
        images: Tensor = self.pipe.vae.decode(unscaled, return_dict=False)[0]
        return images

    def postprocess(self, decoded: Tensor) -> Tensor:
        """Bring decoded samples (B, ...) into their range: images in [0, 1]."""
        return (decoded / 2 + 0.5).clamp(0, 1)

    def unconditional_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the conditioning that guidance leads away from, with a row for each row of ``tensors`` (B, ...)."""
        assert self.unconditional is not None, "a family without a negative prompt overrides this method"
        row = self._embeddings.on_device(self.unconditional, self.device)
        return {name: row[name].expand(len(tensor), *row[name].shape) for name, tensor in tensors.items()}

    @property
    def guidance_default(self) -> float:
        """The guidance scale of the family: that of its diffusers pipeline, or of the model card."""
        return 1.0

    @property
    def is_distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return False

    @property
    def upcasts_vae(self) -> bool:
        """Whether the VAE runs in float32 where it would run in float16."""
        return False

    @property
    def network_guidance(self) -> float:
        """The guidance scale that a guidance-distilled network takes as an input."""
        return self.distilled_default if self.distilled_guidance is None else self.distilled_guidance

    @property
    def takes_negative(self) -> bool:
        """Whether guidance can lead away from a text."""
        return not self.is_distilled

    @property
    def unconditional(self) -> str | None:
        """The text that guidance leads away from; None for conditioning that is no text's."""
        return self.negative_prompt if self.negative_prompt else self.default_negative

    @property
    def guidance(self) -> float:
        """The default of the guidance scale: what the denoiser's configuration says, or the default of the family."""
        own = self.denoiser.config.get("_guidance_scale")
        if own is not None:
            return float(own)
        return 1.0 if self.is_distilled else self.guidance_default

    def guidance_scale(self, guidance: float | None) -> float:
        """Return the guidance scale to sample with; None is the default.

        Raises ValueError for one that the network was not trained for, or that leaves a negative prompt without effect.
        """
        scale = self.guidance if guidance is None else guidance
        self.require_guidance(scale)
        if self.negative_prompt and scale <= 1:
            raise ValueError(
                f"the negative prompt {self.negative_prompt!r} has no effect at guidance {scale:g}: set"
                " sampling.guidance above 1, or leave model.negative_prompt out"
            )
        return scale

    def require_guidance(self, guidance: float) -> None:
        """Raise ValueError for classifier-free guidance of a guidance-distilled network."""
        if guidance > 1 and self.is_distilled:
            raise ValueError(
                f"this model has guidance distilled into it: set sampling.guidance to 1, not {guidance}, and the"
                " network's own guidance by model.distilled_guidance"
            )

    @property
    def text_tokens(self) -> int:
        """The default of ``max_sequence_length``."""
        return int(self.pipe.tokenizer.model_max_length)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the checkpoint's images in latent pixels."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    def _set_size(self, options: Options) -> None:
        """Set ``height`` and ``width`` of the latents from the size of images in pixels."""
        if options.get("seconds") is not None:
            raise ValueError("this model makes images: leave seconds out, and give height and width")
        factor = int(self.pipe.vae_scale_factor)
        multiple, height, width = factor * self.patch, options.get("height"), options.get("width")
        for pixels in (height, width):
            if pixels is not None and (pixels < 1 or pixels % multiple):
                raise ValueError(f"height and width must be multiples of {multiple} for this model, not {pixels}")
        own_height, own_width = self.latent_size
        self.height = own_height if height is None else height // factor
        self.width = own_width if width is None else width // factor

    @property
    def denoiser(self) -> Any:
        """The network of diffusers that predicts noise, velocity or clean latents, and is trained."""
        return self.pipe.components[self.denoiser_name]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the denoiser computes in: that of mixed precision, or of its weights."""
        return compute_dtype(self.denoiser) if self.autocast is None else self.autocast

    @property
    def latent_channels(self) -> int:
        """The number C of channels of the latents."""
        return int(self.denoiser.config.in_channels)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape (C, h, w) of one sample's latents."""
        return self.latent_channels, self.height, self.width

    @property
    def sample_rate(self) -> int | None:
        """The sample rate of audio in Hz; None for images."""
        return None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape (3, H, W) of one image in pixels."""
        factor = int(self.pipe.vae_scale_factor)
        return 3, self.height * factor, self.width * factor

    @property
    def resolution(self) -> tuple[int, ...]:
        """Height and width of images in pixels, or the length of audio in audio samples."""
        return self.sample_shape[1:]

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros of ``shape`` on the pipeline's device, in the denoiser's dtype."""
        return torch.zeros(shape, device=self.device, dtype=compute_dtype(self.denoiser))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts to named tensors (P, ...) on the CPU, padded with zeros at the end of shorter texts.

        Embeddings are cached up to 4 GiB, and those used longest ago are dropped first.
        """
        needed = {*prompts} if self.unconditional is None else {*prompts, self.unconditional}
        return self._embeddings.conditioning(prompts, needed, self._run_text_encoders)

    def _run_text_encoders(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode P texts to named tensors (P, ...) on the CPU."""
        with on_device(self._text_encoders, self.device, self.memory.offload != "none"):
            return {name: tensor.cpu() for name, tensor in self.encode_texts(texts).items()}

    def encode_ahead(
        self,
        texts: Iterable[str],
        share: RankShare = ALL_RANKS,
        wait: Callable[[], None] = lambda: None,
        progress: Progress = SILENT,
    ) -> None:
        """Encode texts, and what guidance leads away from, into the text cache; without one, do nothing.

        The text encoders are loaded only for texts that the cache lacks, and dropped afterwards: other texts are then
        refused by ``encode``.

        Args:
            texts: All texts that will be needed.
            share: This rank's share of the work.
            wait: Waits until all ranks have arrived, as ``ProcessGroup.barrier``.
            progress: Shows the texts.
        """
        cache = self._embeddings
        if not isinstance(cache, TextCache):
            return

        @contextlib.contextmanager
        def encoders() -> Iterator[Encode]:
            with cache.encoders.loaded(self.pipe, self.device):
                yield torch.no_grad()(self._run_text_encoders)

        needed = {*texts} if self.unconditional is None else {*texts, self.unconditional}
        cache.encode_ahead(needed, encoders, share, wait, progress)

    def encoding_settings(self) -> dict[str, Any]:
        """Return what embeddings depend on beside the text and the weights, as JSON types."""
        return {"max_sequence_length": self.max_sequence_length, "device": self.device.type}

    def separate_encoding(self) -> contextlib.AbstractContextManager[None]:
        """Encode texts, within the context, without an effect on the batches in which texts are encoded later."""
        return self._embeddings.separate()

    @property
    def encoded(self) -> list[list[str]]:
        """The batches in which texts were encoded so far; the last bits of an embedding depend on its batch."""
        return self._embeddings.encoded

    def encode_together(self, batches: Sequence[Sequence[str]]) -> None:
        """Encode the texts of each batch, those of ``encoded`` of an earlier process, together when one is needed."""
        self._embeddings.encode_together(batches)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Draw standard normal latents (B, C, ...) on the pipeline's device, with one CPU generator per seed."""
        drawn = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """Predict from latents with the denoiser.

        Args:
            x: Latents (B, C, ...).
            level: Noise level of all rows, or one for each.
            conditioning: Conditioning of B rows.
            guidance: Scale of classifier-free guidance. Above 1 the network runs on one batch of 2 B, unconditional
                rows first.

        Returns:
            The network's output (B, C, ...) in float32.

        Raises:
            ValueError: Guidance that the network was not trained for.
        """
        self.require_guidance(guidance)
        self._set_dtype_of_adapters()
        timestep = level.timestep.float().expand(len(x)).to(self.device, non_blocking=True)
        x, tensors = x.to(self.device), conditioning.to(self.device).tensors  # already there while training
        if self._blocks is None:
            return self._run_guided(x, timestep, tensors, guidance)
        rows = torch.arange(self._blocks.padded(len(x)), device=self.device) % len(x)
        tensors = {name: tensor[rows] for name, tensor in tensors.items()}
        with self._blocks.running():
            output = self._run_guided(x[rows], timestep[rows], tensors, guidance)[: len(x)]
        return output if torch.is_grad_enabled() else output.detach()

    def _run_guided(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor], guidance: float) -> Tensor:
        """Run the denoiser, on one batch of 2 B rows with guidance above 1; all tensors (B, ...) are on the device."""
        if guidance > 1:
            away = self.unconditional_tensors(tensors)
            tensors = {name: _stacked(away[name], rows) for name, rows in tensors.items()}
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
        dtype = compute_dtype(self.denoiser)
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        with self._mixed_precision():
            output = self.run_denoiser(x.to(dtype), timestep, tensors).float()
        if guidance <= 1:
            return output
        unconditional, conditional = output.chunk(2)
        return self.apply_guidance(unconditional, conditional, guidance)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, ...) to samples (B, ...) in their range, in float32; differentiable.

        Raises ValueError if a float16 VAE overflows.
        """
        size = len(latents) if self.memory.decode_batch is None else self.memory.decode_batch
        parts = torch.split(latents.to(self.device), size)
        precision = contextlib.nullcontext() if self._float32_vae else self._mixed_precision()
        with on_device(self._decoders, self.device, self.memory.offload == "all"), precision:
            decoded = torch.cat([self.run_vae(part).float() for part in parts])
        if self.pipe.vae.dtype == torch.float16 and bool((rows_are_finite(latents) & ~rows_are_finite(decoded)).any()):
            raise ValueError("the VAE overflowed in float16: open the model in bfloat16, or in float32 with autocast")
        return self.postprocess(decoded)

    def compile_blocks(self, batch_sizes: Sequence[int] = ()) -> None:
        """Compile the blocks of the denoiser, if ``compiled`` is on; ``genalign.train`` and the commands do.

        Call this after the adapter is on. Calls for fewer samples are padded to the next larger of ``batch_sizes``, or
        of the batches so far, since each batch size compiles its own graphs.
        """
        if self.compiled:
            self._blocks = CompiledBlocks(self.denoiser) if self._blocks is None else self._blocks
            self._blocks.add_batch_sizes(batch_sizes)

    def _set_dtype_of_adapters(self) -> None:
        """Let adapters that were put on since the last call multiply in the dtype of autocast, if that is on."""
        if self.autocast is None:
            return
        adapters = getattr(self.denoiser, "peft_config", None)
        if adapters is not None and (adapters is not self._adapters[0] or len(adapters) != self._adapters[1]):
            multiply_in_input_dtype(self.denoiser)
            self._adapters = adapters, len(adapters)

    def _mixed_precision(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def save_lora(self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
        """Write an adapter as the pipeline's ``load_lora_weights`` expects it, with rank and alpha.

        Adapters on the text encoders, which are sampled with, are written too. PEFT's format is written for a family
        whose adapters diffusers does not load, and for biases of the network, which diffusers' format has no names for.
        """
        if self.lora_in_diffusers and config.bias == "none":
            parts: dict[str, tuple[Mapping[str, Tensor], LoraConfig]] = {self.denoiser_name: (state, config)}
            for name, own in self._text_adapters.items():
                parts[name] = get_peft_model_state_dict(self.pipe.components[name], adapter_name=ADAPTER), own
            layers: dict[str, Any] = {}
            for name, (tensors, settings) in parts.items():
                plain = settings.to_dict().items()
                layers[f"{name}_lora_layers"] = dict(tensors)
                layers[f"{name}_lora_adapter_metadata"] = {k: sorted(v) if isinstance(v, set) else v for k, v in plain}
            type(self.pipe).save_lora_weights(directory, **layers)
            sort_metadata(directory / DIFFUSERS_WEIGHTS)
            apply_umask(directory)
        elif self._text_adapters:
            raise ValueError(
                "the adapter's layers of the text encoders cannot be saved in PEFT's format: train without them"
            )
        else:
            save_peft(directory, state, config)
        if self.memory.quantization is None:  # the fingerprint of a quantized network is another than the original's
            write_json(directory / _BASE_FILE, {"fingerprint": self.fingerprint})

    def load_lora(self, source: str | Path) -> None:
        """Put on an adapter: a run's folder, a folder or file of diffusers, PEFT, kohya or ComfyUI, or a Hub id.

        Every entry of the file is used, in the denoiser and in the text encoders, or the file is refused. Raises
        ValueError for an adapter of another base, FileNotFoundError for none; pickled weights are not opened.
        """
        on_hub = is_hub_id(source) and not Path(source).exists()
        path = hub_adapter(str(source), self._adapter_access) if on_hub else adapter_file(source)
        base = path.parent / _BASE_FILE
        has_fingerprint = self.memory.quantization is None and base.is_file()
        if has_fingerprint and json.loads(base.read_text())["fingerprint"] != self.fingerprint:
            raise ValueError(f"the adapter in {source} was trained on another base checkpoint than this one")
        encoders = {name: encoder for name in self.encoders if (encoder := self.pipe.components.get(name)) is not None}
        convert = self._diffusers_names if self.lora_in_diffusers else None
        networks = {self.denoiser_name: self.denoiser, **encoders}
        try:
            adapters = read_adapter(path, networks, self.denoiser_name, convert)
        except ValueError as error:
            advice = ", or leave model.text_cache out if it has layers on text encoders"
            advice = advice if isinstance(self._embeddings, TextCache) else ""
            raise ValueError(f"{error}{advice}") from None
        for name, adapter in adapters.items():
            config = adapter.peft_config()
            inject_lora(networks[name], config, adapter.state)
            if name != self.denoiser_name:
                networks[name].requires_grad_(False)
                self._text_adapters[name] = config
            layers = sum(entry.endswith("lora_A.weight") for entry in adapter.state)
            logger.info("the adapter %s is on %d layers of %s", path, layers, name)
        self._has_adapter = True

    def _diffusers_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the names of another implementation's adapter to diffusers'."""
        kind: Any = type(self.pipe)
        unet = {"unet_config": self.pipe.unet.config} if self.denoiser_name == "unet" else {}
        converted = kind.lora_state_dict(dict(state), **unet)
        if not isinstance(converted, tuple):
            return dict(converted)
        names, alphas = converted
        return {**names, **{name: torch.tensor(value) for name, value in (alphas or {}).items()}}

    def save_denoiser(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the network's weights, or ``state`` where they are sharded, and configuration, in diffusers' format."""
        network = self.denoiser
        if state is not None:
            with torch.device("meta"):
                network = unsharded_class(network).from_config(network.config)
            network.load_state_dict(state, assign=True)
        network.save_pretrained(directory)
        apply_umask(directory)

    def load_denoiser(self, directory: Path) -> None:
        """Load the weights that ``save_denoiser`` wrote."""
        self.denoiser.load_state_dict(type(self.denoiser).from_pretrained(directory).state_dict())

    def save_merged(self, directory: Path, whole: bool) -> None:
        """Merge the adapter, if any, into the network, and write the network, or the ``whole`` pipeline."""
        if isinstance(self._embeddings, TextCache) and whole:
            raise ValueError("the pipeline was opened without its text encoders: leave model.text_cache out to save it")
        if self._text_adapters and not whole:
            raise ValueError("the adapter has layers on the text encoders: export the whole pipeline")
        if self._has_adapter:
            for network in (self.denoiser, *(self.pipe.components[name] for name in self._text_adapters)):
                merge_lora(network)
            self._has_adapter, self._text_adapters = False, {}
        (self.pipe if whole else self.denoiser).save_pretrained(directory)
        apply_umask(directory)


def _file_arguments(path_or_id: str | Path, options: Options) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say which files are read, and check those of a folder."""
    weights, variant = options.get("weights", "safetensors"), options.get("variant")
    files = {"variant": variant, "use_safetensors": weights == "safetensors"}
    if Path(path_or_id).is_dir():
        require_weights(path_or_id, weights, variant)
        return files | {"variant": variant or weight_variant(path_or_id, weights)}
    access = hub_access(options)
    return files | {"revision": access.revision, "token": access.secret(), "local_files_only": not hub_answers()}


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Stack conditioning (B, ...) of two batches to (2 B, ...), padded with zeros at the end of the shorter texts."""
    if first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    return pad_sequence([*first, *second], batch_first=True)


def unscale(latents: Tensor, vae_config: Any) -> Tensor:
    """Undo the scaling of latents (B, C, ...), by statistics of each channel or by one factor and shift."""
    mean, std = getattr(vae_config, "latents_mean", None), getattr(vae_config, "latents_std", None)
    if mean is None or std is None:
        return latents / float(vae_config.scaling_factor) + (getattr(vae_config, "shift_factor", None) or 0.0)
    shape = (-1, *[1] * (latents.ndim - 2))
    offset, spread = (torch.tensor(values).view(shape).to(latents) for values in (mean, std))
    return latents * spread / getattr(vae_config, "scaling_factor", 1.0) + offset
