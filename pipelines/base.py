"""Every family of diffusers as encode / predict / decode: loading, guidance, memory options and adapters."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, Unpack

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from genalign.diffusion.hypernetwork import gated
from genalign.diffusion.lora import STUDENT_GUIDANCE
from genalign.diffusion.rollout import rows_are_finite
from genalign.diffusion.user_attention import (
    USER,
    USERS_FILE,
    Users,
    attach_users,
    load_projections,
    projection_state,
    seeing,
)
from genalign.runtime.cpu import use_faster_attention_backward
from genalign.runtime.distributed import ALL_RANKS, RankShare, own_device
from genalign.runtime.files import apply_umask
from genalign.runtime.fsdp import compute_dtype, unsharded_class
from genalign.runtime.hub import HubAccess
from genalign.runtime.memory_options import Memory
from genalign.runtime.progress import SILENT, Progress
from genalign.types import Conditioning, NoiseLevel
from pipelines.adapters import Adapters
from pipelines.checkpoint_files import fingerprint
from pipelines.checkpoint_settings import check_settings
from pipelines.compilation import CompiledBlocks
from pipelines.family import Family
from pipelines.loading import load_diffusers
from pipelines.low_memory import multiply_in_float8, on_device, pin_weights
from pipelines.options import Options, hub_access
from pipelines.text_cache import TextCache, cache_folder
from pipelines.text_embeddings import Encode, TextEmbeddings

logger = logging.getLogger(__name__)


class DiffusersPipeline(Family):
    """A pipeline of diffusers as encode / predict / decode (``genalign.types.Pipeline``), the base of every family.

    Samples are images with latents (B, C, h, w), also if the network takes them in patches; for audio see
    ``pipelines.audio_base``.
    """

    def __init__(self, pipe: DiffusionPipeline, **options: Unpack[Options]) -> None:
        check_settings(pipe.components, self.kind.__name__)
        self.pipe = pipe
        self.device = own_device(options.get("device", "cpu"))
        self.autocast = options.get("autocast")
        self.memory = options.get("memory", Memory())
        self._set_size(options)
        self._set_texts_and_guidance(options)
        self.fingerprint = fingerprint(self.denoiser)
        own = self.fingerprint if self.memory.quantization is None else None
        access = HubAccess(token=options.get("token"))  # model.revision is that of the checkpoint
        self._adapters = Adapters(pipe, self.denoiser_name, self.encoders, self.lora_in_diffusers, own, access)
        self._embeddings = TextEmbeddings()
        self._text_encoders = [encoder for name in self.encoders if (encoder := pipe.components.get(name)) is not None]
        self._decoders = [pipe.components[name] for name in self.decoders]
        self._place_networks()
        if self.device.type == "cpu":
            use_faster_attention_backward()
        self._compile = options.get("compile", False)
        self._blocks: CompiledBlocks | None = None
        self.users: Users | None = None
        if path := options.get("users"):
            self._attach_users(Path(path))

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

    def _attach_users(self, path: Path) -> None:
        """Let the denoiser attend to the users of a file. Raises ValueError for a family or an option without it."""
        if not self.takes_users:
            raise ValueError(
                f"{type(self).__name__} runs texts of each length apart, which users cannot follow: leave"
                " model.users out"
            )
        if self._compile or self.memory.checkpointing or self.memory.quantization is not None:
            raise ValueError(
                "the attention to users goes without model.compile, model.memory.checkpointing and quantization: leave"
                " them out, or model.users"
            )
        self.users = Users.load(path)
        attach_users(self.denoiser, self.users)

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
        text_only = {*cls.encoders}.difference(cls.sampling_encoders)
        pipe, dropped = load_diffusers(path_or_id, cls.kind, cls.denoiser_name, text_only, dtype, options)
        opened, shipped = cls(pipe, **options), pipe.scheduler
        if cache := options.get("text_cache"):
            skipped = {cls.denoiser_name, *cls.decoders, "scheduler", "safety_checker", "feature_extractor"}
            files = [dropped.arguments["variant"], cls.__qualname__]
            settings = opened.encoding_settings() | {"dtype": str(dtype), "files": files}
            folder = cache_folder(Path(cache), path_or_id, skipped, hub_access(options), settings)
            opened._embeddings = TextCache(folder, dropped)
        if not isinstance(shipped, opened.first_order) or shipped.config.get("solver_order", 1) > 1:
            message = "%s comes with %s. Genalign samples by first-order steps instead, at the noise levels of %s."
            logger.warning(message, path_or_id, type(shipped).__name__, opened.first_order.__name__)
        return opened

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the denoiser computes in: that of mixed precision, or of its weights."""
        return compute_dtype(self.denoiser) if self.autocast is None else self.autocast

    @property
    def guidance(self) -> float:
        """The default of the guidance scale: what the denoiser's configuration says, or the default of the family."""
        if self.student_guidance is not None:
            return 1.0
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
        if self.student_guidance is not None and scale > 1:
            raise ValueError(
                f"these weights are a few-step student's, into which guidance {self.student_guidance:g} is distilled:"
                f" set sampling.guidance to 1 or null, not {scale:g}"
            )
        if self.negative_prompt and scale <= 1 and self.student_guidance is None:
            raise ValueError(
                f"the negative prompt {self.negative_prompt!r} has no effect at guidance {scale:g}: set"
                " sampling.guidance above 1, or leave model.negative_prompt out"
            )
        return scale

    @property
    def student_guidance(self) -> float | None:
        """The CFG scale that is distilled into a few-step student; None for any other network."""
        scale = self.denoiser.config.get("_student_guidance")
        return None if scale is None else float(scale)

    def record_student(self, guidance: float) -> None:
        """Record that the network is, or is trained to be, a few-step student of a teacher with this guidance scale.

        It is then sampled at guidance 1, and adapters and networks that are saved say so.
        """
        self.denoiser.register_to_config(_student_guidance=guidance)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts to named tensors (P, ...) on the CPU, padded with zeros at the end of shorter texts.

        With users, their embeddings are among them, zeros for a prompt without one. Embeddings of texts are cached up
        to 4 GiB, and those used longest ago are dropped first.
        """
        texts = [str(prompt) for prompt in prompts]
        needed = {*texts} if self.unconditional is None else {*texts, self.unconditional}
        encoded = self._embeddings.conditioning(texts, needed, self._run_text_encoders)
        if self.users is None:
            return encoded
        return Conditioning({**encoded.tensors, USER: self.users.rows(prompts)})

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
        """Encode texts, and the text that guidance leads away from, into the text cache; without one, do nothing.

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

    def separate_encoding(self) -> contextlib.AbstractContextManager[None]:
        """Encode texts, within the context, without an effect on the batches in which texts are encoded later."""
        return self._embeddings.separate()

    @property
    def encoded(self) -> list[list[str]]:
        """The batches in which texts were encoded so far; the last bits of an embedding depend on its batch."""
        return self._embeddings.encoded

    def encode_together(self, batches: Sequence[Sequence[str]]) -> None:
        """Encode the texts of each batch (``encoded`` of an earlier process) together, as soon as one is needed."""
        self._embeddings.encode_together(batches)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """Draw standard normal latents (B, C, ...) on the pipeline's device, with one CPU generator per seed."""
        drawn = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device, non_blocking=True)

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
        if self.autocast is not None:
            self._adapters.multiply_in_input_dtype()
        timestep = level.timestep.float().expand(len(x)).to(self.device, non_blocking=True)
        x, tensors = x.to(self.device), conditioning.to(self.device).tensors  # already there while training
        if self._blocks is None:
            return self._run_guided(x, timestep, level, tensors, guidance)
        repeated = torch.arange(self._blocks.padded(len(x))) % len(x)
        rows = repeated.to(self.device, non_blocking=True)
        tensors = {name: tensor[rows] for name, tensor in tensors.items()}
        with self._blocks.running():
            output = self._run_guided(x[rows], timestep[rows], level.rows(repeated), tensors, guidance)[: len(x)]
        return output if torch.is_grad_enabled() else output.detach()

    def _run_guided(
        self, x: Tensor, timestep: Tensor, level: NoiseLevel, tensors: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """Run the denoiser, on one batch of 2 B rows with guidance above 1; all tensors (B, ...) are on the device."""
        user = tensors.get(USER)
        tensors = {name: tensor for name, tensor in tensors.items() if name != USER}
        if guidance > 1:
            user = None if user is None else torch.cat([torch.zeros_like(user), user])
            away = self.unconditional_tensors(tensors)
            tensors = {name: _stacked(away[name], rows) for name, rows in tensors.items()}
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
        dtype, texts = compute_dtype(self.denoiser), tensors
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in texts.items()}
        users = seeing(self.denoiser, user) if self.users else contextlib.nullcontext()
        with gated(self.denoiser, x, level, texts), self._mixed_precision(), users:
            output = self.run_denoiser(x.to(dtype), timestep, tensors).float()
        if guidance <= 1:
            return output
        unconditional, conditional = output.chunk(2)
        return self.apply_guidance(unconditional, conditional, guidance)

    def unconditional_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the unconditional rows (B, ...) that guidance leads away from, one for each row of ``tensors``."""
        assert self.unconditional is not None, "a family without a negative prompt overrides this method"
        row = self._embeddings.on_device(self.unconditional, self.device)
        return {name: row[name].expand(len(tensor), *row[name].shape) for name, tensor in tensors.items()}

    def _mixed_precision(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

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

    @property
    def autoencoder(self) -> str:
        """The fingerprint of the autoencoder."""
        return fingerprint(self.pipe.vae)

    @torch.no_grad()
    def encode_samples(self, samples: Tensor) -> Tensor:
        """Encode samples (B, ...) in their range to clean latents (B, C, ...), float32: the mode of the encoder.

        Raises ValueError for samples of another size, or a family whose samples are not encoded.
        """
        if samples.shape[1:] != self.sample_shape:
            own, other = ("x".join(map(str, shape)) for shape in (self.sample_shape, samples.shape[1:]))
            raise ValueError(f"the model's samples are {own}, not {other}: bring them to its size first")
        size = len(samples) if self.memory.decode_batch is None else self.memory.decode_batch
        precision = contextlib.nullcontext() if self._float32_vae else self._mixed_precision()
        with on_device(self._decoders, self.device, self.memory.offload == "all"), precision:
            return torch.cat([self.run_encoder(part).float() for part in torch.split(samples.to(self.device), size)])

    def compile_blocks(self, batch_sizes: Sequence[int] = ()) -> None:
        """Compile the blocks of the denoiser, if ``compile`` is on.

        ``genalign.train`` and the commands call this, after the adapter is on. Batches are padded to the next larger of
        ``batch_sizes``, or of the batches so far, since each batch size compiles graphs of its own.
        """
        if self._compile:
            self._blocks = CompiledBlocks(self.denoiser) if self._blocks is None else self._blocks
            self._blocks.add_batch_sizes(batch_sizes)

    def load_lora(self, source: str | Path) -> None:
        """Put on an adapter: a run's folder, a folder or file of diffusers, PEFT, kohya or ComfyUI, or a Hub id.

        Every entry of the file is used, in the denoiser and in the text encoders, or the file is refused. Raises
        ValueError for an adapter of another base, FileNotFoundError for none; pickled weights are not opened.
        """
        hint = ", or leave model.text_cache out if it has layers on text encoders"
        student = self._adapters.load(source, hint if isinstance(self._embeddings, TextCache) else "")
        if STUDENT_GUIDANCE in student:
            self.record_student(float(student[STUDENT_GUIDANCE]))
        for path in (Path(source) / USERS_FILE, Path(source) / "lora" / USERS_FILE):
            if path.is_file():
                if self.users is None:
                    raise ValueError(f"the adapter in {source} was trained with users: set model.users to {path}")
                load_projections(self.denoiser, Users.load(path).projections)

    def save_lora(self, directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> None:
        """Write the denoiser's adapter, those of the text encoders, as ``Adapters.save`` does, and the users."""
        student = {} if self.student_guidance is None else {STUDENT_GUIDANCE: f"{self.student_guidance:g}"}
        self._adapters.save(directory, state, config, student)
        if self.users is not None:
            Users(self.users.embeddings, projection_state(self.denoiser)).save(directory / USERS_FILE)

    def load_denoiser(self, directory: Path) -> None:
        """Load the weights that ``save_denoiser`` wrote."""
        trained = type(self.denoiser).from_pretrained(directory)
        self.denoiser.load_state_dict(trained.state_dict())
        if (student := trained.config.get("_student_guidance")) is not None:
            self.record_student(student)

    def save_denoiser(self, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the network's configuration and weights, or ``state`` where these are sharded, in diffusers' format."""
        network = self.denoiser
        if state is not None:
            with torch.device("meta"):
                network = unsharded_class(network).from_config(network.config)
            network.load_state_dict(state, assign=True)
        network.save_pretrained(directory)
        apply_umask(directory)

    def save_merged(self, directory: Path, whole: bool) -> None:
        """Merge the adapter, if any, into the network, and write the network, or the ``whole`` pipeline."""
        if isinstance(self._embeddings, TextCache) and whole:
            raise ValueError("the pipeline was opened without its text encoders: leave model.text_cache out to save it")
        if self._adapters.are_on_encoders and not whole:
            raise ValueError("the adapter has layers on the text encoders: export the whole pipeline")
        if self.users is not None:
            raise ValueError("no other program knows the attention to users: export without model.users")
        self._adapters.merge()
        (self.pipe if whole else self.denoiser).save_pretrained(directory)
        apply_umask(directory)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Stack conditioning (B, ...) of two batches to (2 B, ...), padded with zeros at the end of the shorter texts."""
    if first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    return pad_sequence([*first, *second], batch_first=True)
