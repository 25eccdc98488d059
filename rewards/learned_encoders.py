"""Encoders of rewards that are learned from preferences: what a head reads of a sample and its prompt.

Checkpoints are opened when an encoder is built. Their weights are shared with other rewards in the process and stay as
they are: ``blocks`` trains copies of the last blocks of the tower of samples, and ``lora_rank`` adds LoRA to its linear
layers, both in float32 with all else frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.reward_learning.network import RewardEncoder
from genalign.types import Precision, Prompt
from rewards.backbones.clap_encoder import load_clap
from rewards.backbones.clip_encoder import ImagePreprocessor, load_clip
from rewards.backbones.encoders import Features
from rewards.backbones.image_features import load_dinov2, load_dinov3, of_size
from rewards.backbones.siglip_encoder import load_siglip
from rewards.vqa import VQASCORE, load_model, yes_no_tokens

Tokens = Literal["pooled", "parts"]
"""One token of the whole sample, or after it one of each part: an image's patches, a clip's frames."""


def _require_tokens(tokens: str) -> None:
    if tokens not in ("pooled", "parts"):
        raise ValueError(f'tokens must be "pooled" or "parts", not {tokens!r}')


def mixed(features: Features, texts: Tensor, tokens: Tokens) -> Tensor:
    """Compute tokens [u, t, u t, (u - t)^2] (B, n, 4 d) of unit features u of samples and unit features t of texts.

    All of it is smooth, unlike |u - t|, whose kinks leave gradients that finite differences do not confirm.

    Args:
        features: Features of samples.
        texts: Unit features (B, d) of texts.
        tokens: Whether n is 1, or 1 and the number of parts.
    """
    units = F.normalize(features.global_, dim=-1)[:, None]
    if tokens == "parts":
        units = torch.cat([units, F.normalize(features.patches, dim=-1)], dim=1)
    t = texts[:, None].expand_as(units)
    return torch.cat([units, t, units * t, (units - t).square()], dim=-1)


def trainable_copy(
    network: nn.Module,
    tower: Callable[[Any], Iterable[nn.Module]],
    last_blocks: Callable[[Any], Sequence[nn.Module]],
    blocks: int,
    lora_rank: int,
) -> Any:
    """Copy a network that shares its frozen weights with the original, and add what is to be trained.

    Args:
        network: A frozen network.
        tower: Returns, of a copy, the modules that LoRA is added to the linear layers of. Attention that is one layer
            (nn.MultiheadAttention, as in open_clip) stays without.
        last_blocks: Returns, of a copy, the blocks of which the last are trained.
        blocks: Number of blocks to train; 0 trains none.
        lora_rank: Rank of LoRA; 0 adds none.

    Raises:
        ValueError: Both are given, or there are fewer blocks.
    """
    if min(blocks, lora_rank) < 0 or (blocks and lora_rank):
        raise ValueError(f"give blocks or lora_rank, at least 0 and not both, not {blocks} and {lora_rank}")
    shared: dict[int, Any] = {id(weight): weight for weight in [*network.parameters(), *network.buffers()]}
    shared |= {id(value): value for value in [getattr(network, "tokenizer", None)]}
    own: nn.Module = copy.deepcopy(network, shared)
    if lora_rank:
        _add_lora(own, tower(own), lora_rank)
    if blocks:
        available = last_blocks(own)
        if blocks > len(available):
            raise ValueError(f"blocks must be at most {len(available)}, the blocks of the encoder, not {blocks}")
        for layer in (layer for block in available[-blocks:] for layer in block.modules()):
            for name, weight in layer.named_parameters(recurse=False):  # frozen, and shared with the original
                setattr(layer, name, nn.Parameter(weight.detach().clone().float()))
    return own.eval()


def _add_lora(network: nn.Module, tower: Iterable[nn.Module], rank: int) -> None:
    """Add LoRA to the linear layers of a part of a network, with the same first weights each time."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = {id(layer) for part in tower for layer in part.modules() if type(layer) is nn.Linear}
    names = [name for name, layer in network.named_modules() if id(layer) in linear]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), network)


class _OfSamplesAndTexts(RewardEncoder):
    """An encoder of samples and texts into one space, whose tokens are ``mixed``."""

    encoder: Any
    token_kind: Tokens
    _arguments: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self._arguments)

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        tower: tuple[nn.Module, ...] = self.encoder.sample_tower
        return tower

    @property
    def width(self) -> int:
        return 4 * int(self.encoder.text(["a"]).shape[1])

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = self.encoder.text([prompt.text for prompt in prompts])
        return mixed(self._features(samples), texts, self.token_kind)

    def _features(self, samples: Tensor) -> Features:
        features: Features = self.encoder.features(samples)
        return features


class ClipTokens(_OfSamplesAndTexts):
    """CLIP's features of images and prompts, as ``mixed``.

    Args:
        model: As in ``rewards.clip.ClipReward``: an embedded name, such as shapes-clip, an open_clip or transformers
            folder, or a Hub id.
        processor: Folder or Hub id of the processor of a checkpoint that has none beside it.
        tokens: "pooled", or "parts" for attention over patches.
        blocks: Number of the last visual blocks to train.
        lora_rank: Rank of LoRA on the linear layers of the visual tower; 0 trains none.
    """

    def __init__(
        self, model: str, processor: str | None = None, tokens: Tokens = "pooled", blocks: int = 0, lora_rank: int = 0
    ) -> None:
        super().__init__()
        _require_tokens(tokens)
        self._arguments = {
            "model": model,
            "processor": processor,
            "tokens": tokens,
            "blocks": blocks,
            "lora_rank": lora_rank,
        }
        self.token_kind = tokens
        self.encoder = trainable_copy(load_clip(model, processor), _tower, _blocks, blocks, lora_rank)

    def _features(self, samples: Tensor) -> Features:
        if self.token_kind == "parts":
            return super()._features(samples)
        embedding: Tensor = self.encoder(samples)
        return Features(embedding, embedding[:, None])


class SiglipTokens(_OfSamplesAndTexts):
    """SigLIP's features of images and prompts, as ``mixed``.

    Args:
        model: A transformers folder or Hub id, such as google/siglip-base-patch16-224.
        tokens: "pooled", or "parts" for attention over patches.
        blocks: Number of the last visual blocks to train.
        lora_rank: Rank of LoRA on the linear layers of the visual tower; 0 trains none.
    """

    def __init__(self, model: str, tokens: Tokens = "pooled", blocks: int = 0, lora_rank: int = 0) -> None:
        super().__init__()
        _require_tokens(tokens)
        self._arguments = {"model": model, "tokens": tokens, "blocks": blocks, "lora_rank": lora_rank}
        self.token_kind = tokens
        self.encoder = trainable_copy(load_siglip(model), _tower, _blocks, blocks, lora_rank)


class ClapTokens(_OfSamplesAndTexts):
    """CLAP's features of sound and prompts, as ``mixed``.

    Args:
        model: As in ``rewards.clap.ClapReward``: an embedded name, such as tones-clap, a transformers folder or Hub id.
        sample_rate: Rate of the sound in Hz.
        tokens: "pooled", or "parts" for attention over frames, of clips of one length.
        lora_rank: Rank of LoRA on the linear layers of the tower of sound; 0 trains none.
    """

    def __init__(self, model: str, sample_rate: int, tokens: Tokens = "pooled", lora_rank: int = 0) -> None:
        super().__init__()
        _require_tokens(tokens)
        self._arguments = {"model": model, "sample_rate": sample_rate, "tokens": tokens, "lora_rank": lora_rank}
        self.token_kind, self._sample_rate = tokens, sample_rate
        self.encoder = trainable_copy(load_clap(model), _tower, lambda own: (), 0, lora_rank)

    @property
    def sample_rate(self) -> int:
        return self._sample_rate

    def _features(self, samples: Tensor) -> Features:
        features: Features = self.encoder.features(samples, self._sample_rate)
        return features


def _tower(encoder: Any) -> tuple[nn.Module, ...]:
    tower: tuple[nn.Module, ...] = encoder.sample_tower
    return tower


def _blocks(encoder: Any) -> list[nn.Module]:
    return list(encoder.blocks)


class DinoTokens(RewardEncoder):
    """DINOv2's or DINOv3's class token, or it and the patch tokens, of images; DINO has no text.

    With ``text``, a CLIP, its unit features of the prompt stand beside every token; without, the prompt is not read.

    Args:
        model: A transformers folder or Hub id, such as facebook/dinov2-base.
        text: A CLIP as in ``ClipTokens``, for prompts; None ignores them.
        size: Side in pixels to which images are resized; None takes the checkpoint's.
        tokens: "pooled", or "parts" for attention over patches.
        blocks: Number of the last blocks to train.
        lora_rank: Rank of LoRA on the linear layers; 0 trains none.
    """

    def __init__(
        self,
        model: str,
        text: str | None = None,
        size: int | None = None,
        tokens: Tokens = "pooled",
        blocks: int = 0,
        lora_rank: int = 0,
    ) -> None:
        super().__init__()
        _require_tokens(tokens)
        self._arguments = {
            "model": model,
            "text": text,
            "size": size,
            "tokens": tokens,
            "blocks": blocks,
            "lora_rank": lora_rank,
        }
        self.token_kind = tokens
        frozen, prepare = _load_dino(model)
        self.network = trainable_copy(frozen, lambda own: (own,), _dino_blocks, blocks, lora_rank)
        config = self.network.config
        self.skipped = 1 + int(getattr(config, "num_register_tokens", 0))
        self.prepare = of_size(prepare, size, int(config.patch_size))
        self.text = None if text is None else load_clip(text)

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self._arguments)

    @property
    def width(self) -> int:
        return int(self.network.config.hidden_size) + (0 if self.text is None else int(self.text.text(["a"]).shape[1]))

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return (self.network,)

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        tokens: Tensor = self.network(self.prepare(samples)).last_hidden_state
        whole = tokens[:, :1]
        selected = whole if self.token_kind == "pooled" else torch.cat([whole, tokens[:, self.skipped :]], dim=1)
        if self.text is None:
            return selected
        texts = self.text.text([prompt.text for prompt in prompts])
        return torch.cat([selected, texts[:, None].expand(-1, selected.shape[1], -1)], dim=-1)


def _load_dino(model: str) -> tuple[Any, ImagePreprocessor]:
    from transformers import AutoConfig

    loaders = {"dinov2": load_dinov2, "dinov3_vit": load_dinov3}
    kind = AutoConfig.from_pretrained(model).model_type
    if kind not in loaders:
        raise ValueError(f"{model} is a {kind} checkpoint: give a DINOv2 or DINOv3 vision transformer")
    return loaders[kind](model)


def _dino_blocks(network: Any) -> Sequence[nn.Module]:
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


class YesTokenLogits(RewardEncoder):
    """The log-odds of yes that a vision-language model gives to questions about an image: one token (B, 1, questions).

    They are log P(yes) - log P(no) of the first word of the answer, over the spellings of both. LoRA is added to the
    linear layers of the language model. Pixels have a gradient where the image processor of the checkpoint computes
    with torchvision, as most do; the others take pixels as numbers.

    Args:
        model: A folder or Hub id, as in ``rewards.vqa.YesNoModel``.
        questions: The questions, in each of which {prompt} is replaced; one for each dimension.
        lora_rank: Rank of LoRA; 0 trains none.
        dtype: Precision of the frozen weights.
    """

    yes: Tensor
    no: Tensor

    def __init__(
        self, model: str, questions: Sequence[str] = (VQASCORE,), lora_rank: int = 8, dtype: Precision = "float32"
    ) -> None:
        super().__init__()
        if not questions:
            raise ValueError("give one question or more")
        self._arguments = {"model": model, "questions": list(questions), "lora_rank": lora_rank, "dtype": dtype}
        self.questions = tuple(questions)
        frozen, self.processor = load_model(model, dtype)
        self.network = trainable_copy(frozen, _language_layers, lambda own: (), 0, lora_rank)
        tokens = yes_no_tokens(model, self.processor.tokenizer)
        self.register_buffer("yes", torch.tensor(tokens["yes"]), persistent=False)
        self.register_buffer("no", torch.tensor(tokens["no"]), persistent=False)

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self._arguments)

    @property
    def width(self) -> int:
        return len(self.questions)

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return (self.network,)

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        columns = [
            self._log_odds(samples, [question.replace("{prompt}", p.text.replace('"', "'")) for p in prompts])
            for question in self.questions
        ]
        return torch.stack(columns, dim=1)[:, None]

    def _log_odds(self, samples: Tensor, questions: Sequence[str]) -> Tensor:
        """Compute log-odds (B,) of yes; questions of one length form a batch, so nothing is padded."""
        texts, options = list[str](), {"add_generation_prompt": True, "tokenize": False}
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            texts.append(self.processor.apply_chat_template([{"role": "user", "content": content}], **options))
        by_length: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            by_length.setdefault(len(self.processor.tokenizer(text).input_ids), []).append(row)
        order, parts = list[int](), list[Tensor]()
        for rows in by_length.values():
            logits = self._logits(samples, rows, [texts[row] for row in rows])
            order += rows
            parts.append(logits[:, self.yes].logsumexp(1) - logits[:, self.no].logsumexp(1))
        places = torch.tensor(order).argsort().to(samples.device, non_blocking=True)
        return torch.cat(parts)[places]

    def _logits(self, samples: Tensor, rows: Sequence[int], texts: Sequence[str]) -> Tensor:
        """Compute the logits (b, vocabulary) in float32 of the first word about the samples ``rows``."""
        from transformers.image_processing_backends import TorchvisionBackend

        images = [samples[row].float() for row in rows]
        if not isinstance(self.processor.image_processor, TorchvisionBackend):
            images = [image.detach().cpu() for image in images]
        inputs = self.processor(images=images, text=list(texts), return_tensors="pt", do_rescale=False)
        device, dtype = samples.device, self.network.dtype
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for name, value in inputs.items()
        }
        logits: Tensor = self.network(**moved, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits.float()


def _language_layers(network: Any) -> list[nn.Module]:
    """Return the linear layers of a vision-language model that belong to neither its vision tower nor its output."""
    apart = ("visual", "vision", "project", "merger", "lm_head")
    named = network.named_modules()
    return [layer for name, layer in named if type(layer) is nn.Linear and not any(word in name for word in apart)]
