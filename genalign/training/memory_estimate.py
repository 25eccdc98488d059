"""What a training run will hold in memory and how long it will take, before any weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import safe_open

from genalign.diffusion.lora import PEFT_WEIGHTS
from genalign.runtime.memory_options import Memory
from genalign.scoring.budget import DECODE, FORWARD, Ledger, backward
from genalign.types import Pipeline

_NF4 = 0.5 + 4 / 64  # four bits a number, and a float32 for every 64 of them
_QUANTIZED = {"nf4": _NF4, "int8": 1.0}
_MOMENTS = {"adamw": 8, "adamw8bit": 2}
FORMULAS = (
    "networks: numbers x bytes of the precision; quantised linear weights nf4 0.5625, int8 1 byte",
    "each trained number: float32 weight (in a LoRA) 4, gradient 4, moments 8 or in 8 bits 2, average 4;"
    " first weights 4 where the whole network is trained; sampling policy 4 where it lags",
    "kept for the backward pass: every tensor that autograd saves in one prediction for a batch, traced on the meta"
    " device with fused attention; with checkpointing the blocks' inputs and the largest block; without autocast",
    "a round: float32 of each sample's stored states, moves, predictions and latents, and of its decoded image",
    "decoding: three times the decoder's largest layer (input and output) for decode_batch samples",
    "not counted: rewards' own networks, temporary tensors, the allocator's unused share",
)


@dataclass(frozen=True)
class Part:
    """A network of a checkpoint: its numbers, how many of them are weights of linear layers (which quantisation takes),
    and whether its weight files are on this machine.
    """

    name: str
    numbers: int
    linear: int
    present: bool

    def bytes(self, width: float, quantization: str | None = None) -> float:
        """In memory, at ``width`` bytes a number."""
        linear = self.linear * (_QUANTIZED[quantization] if quantization else width)
        return (self.numbers - self.linear) * width + linear


class Blank(Pipeline, Protocol):
    """A wrapped pipeline whose networks have shapes and no values."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample: (3, H, W) of an image, (channels, L) of audio."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample."""

    @property
    def sample_rate(self) -> int | None:
        """Audio samples a second; None for images."""

    def require_guidance(self, guidance: float) -> None:
        """Raise ValueError for guidance that the network was not made for."""


class Outline(Protocol):
    """A checkpoint without its weights."""

    @property
    def pipeline(self) -> Blank: ...

    @property
    def parts(self) -> Sequence[Part]:
        """Its networks, the one that is trained first."""

    def kept(self, samples: int, guidance: float) -> int:
        """Bytes that autograd keeps of one prediction for ``samples``."""

    def decoding(self, samples: int) -> int:
        """Bytes of the input and the output of the decoder's largest layer for ``samples``."""


@dataclass(frozen=True)
class Training:
    """What of a configuration decides how much memory is held: ``width`` is bytes a number of the checkpoint, ``lora``
    whether an adapter is trained, ``lags`` whether another policy samples, ``stored`` that of ``counting.Counted``.
    """

    width: int
    memory: Memory
    optimizer: str
    lora: bool
    lags: bool
    guidance: float
    batch_size: int
    images: int
    stored: int


@dataclass(frozen=True)
class Held:
    """Bytes by what they are: held ``always``, and besides them while a phase lasts."""

    always: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    def peaks(self) -> dict[str, float]:
        """Bytes held in each phase."""
        base = sum(self.always.values())
        return {phase: base + sum(extra.values()) for phase, extra in self.phases.items()}


def held(outline: Outline, parts: Sequence[Part], trained: int, training: Training) -> Held:
    """The memory of the device that trains ``trained`` numbers; see ``FORMULAS``. ``outline`` wears its adapter, and
    ``parts`` are its networks without it.
    """
    trunk, *others = parts
    width, memory = training.width, training.memory
    lent = {part.name: part.bytes(width) for part in others}
    texts = {name: size for name, size in lent.items() if name.startswith("text_encoder")}
    vae = {name: size for name, size in lent.items() if name == "vae"}
    trunk_bytes = trunk.bytes(width, memory.quantization) if training.lora else 4.0 * trunk.numbers
    batch = {"round": _round_bytes(outline, training)}
    decoded = memory.decode_batch or training.batch_size
    always = {trunk.name: trunk_bytes, "trained": trained * _bytes_per_trained(training)}
    return Held(
        always if memory.offload else always | lent,
        {
            "encoding": texts if memory.offload else {},
            "decoding": (vae if memory.offload else {}) | batch | {"layers": 3.0 * outline.decoding(decoded)},
            "learning": batch | {"kept": float(outline.kept(training.batch_size, training.guidance))},
        },
    )


def _bytes_per_trained(training: Training) -> int:
    gradient, average, moments = 4, 4, _MOMENTS[training.optimizer]
    weight_or_first = 4  # a LoRA's own weights, or the copy of the network's that training started from
    return gradient + average + moments + weight_or_first + 4 * training.lags


def _round_bytes(outline: Outline, training: Training) -> float:
    latent, sample = (math.prod(shape) for shape in (outline.pipeline.latent_shape, outline.pipeline.sample_shape))
    return 4.0 * training.images * (training.stored * latent + sample)


def adapter_numbers(source: Path) -> int | None:
    """The numbers of a LoRA on this machine, by the head of its file; None where there is none."""
    names = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)
    file = next((path for path in (source, *(source / name for name in names)) if path.is_file()), None)
    if file is None:
        return None
    with safe_open(file, framework="pt") as opened:
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118  # no mapping
    total: int = sum(math.prod(shape) for shape in shapes)
    return total


def seconds(ledger: Ledger, prices: Mapping[str, float]) -> float:
    """How long the calls take; a backward pass without a price of its own takes two forwards. Raises ValueError for
    another call without a price.
    """
    derived = {backward(call): 2 * prices[call] for call in (FORWARD, DECODE) if call in prices}
    return ledger.cost({**derived, **prices})
