"""ImageReward (arXiv 2304.05977): a BLIP trained on people's rankings of images.

The published checkpoint is opened by transformers' own BLIP modules, whose layers are the same under other names. Code
and weights of ImageReward are under Apache-2.0; this file was written from its published layout.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genalign.runtime.files import without_prefix
from genalign.types import Precision, Prompt
from rewards.backbones.clip_encoder import ImagePreprocessor
from rewards.backbones.weight_files import AffineHead, read_tensors

_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_HEAD_WIDTH = 64  # of one attention head, in the image as in the text encoder
_LENGTH = 35  # tokens of a prompt, with the first and the last
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the published scores
_NORMALISATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK_NAMES = {"attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection", "norm1": "layer_norm1"}
_BLOCK_NAMES |= {"norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


@dataclass(frozen=True)
class ImageReward:
    """The published score, of mean 0 and standard deviation 1 on its authors' images: mostly -2 to 2.

    It is opened at the first call and then follows the samples' device. Prompts are cut to 35 tokens.

    Args:
        weights: The published ImageReward.pt or its tensors as .safetensors: a path, or hf://owner/repository/file.
        tokenizer: A folder or Hub id with the tokenizer of BERT.
        dtype: The precision of the encoders' weights; the head is in float32.
    """

    weights: str = "hf://THUDM/ImageReward/ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"
    dtype: Precision = "float32"

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1] as (B,), differentiable in the images; NaN where an image has NaN.

        Raises ValueError for another checkpoint than ImageReward's.
        """
        scores: Tensor = self.network().to(samples.device)(samples, prompts)
        return scores

    def network(self) -> nn.Module:
        """Return the network that scores samples, for a student of this reward."""
        return _opened(self.weights, self.tokenizer, self.dtype)


class _Scorer(nn.Module):
    """The published network: BLIP's encoders, and a head on the text's first token."""

    def __init__(self, tensors: Mapping[str, Tensor], tokenizer: Any, dtype: Precision) -> None:
        super().__init__()
        self.vision, self.text = _vision(tensors), _text(tensors)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.to(self._dtype).requires_grad_(False).eval()
        self._head, self._tokenizer = AffineHead.of(tensors, _HEAD), tokenizer
        side = int(self.vision.config.image_size)
        self._prepare = ImagePreprocessor((side, side), *_NORMALISATION)

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return (self.vision,)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of the image encoder, then those of the text encoder, which attends to the image."""
        return *self.vision.encoder.layers, *self.text.encoder.layer

    @property
    def logit_scale(self) -> float:
        """The factor from scores to the output of the head, whose differences are logits of a preference."""
        return _STD

    def forward(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"there must be one prompt per image, not {len(prompts)} for {len(images)} images")
        vision = self.vision(self._prepare(images).to(self._dtype)).last_hidden_state
        padding = {"padding": "max_length", "truncation": True, "max_length": _LENGTH}
        tokens = self._tokenizer([prompt.text for prompt in prompts], return_tensors="pt", **padding).to(
            images.device, non_blocking=True
        )
        text = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=vision).last_hidden_state
        return (self._head(text[:, 0]) - _MEAN) / _STD


@functools.cache
def _opened(weights: str, tokenizer: str, dtype: Precision) -> _Scorer:
    from transformers import BertTokenizer

    tensors = read_tensors(weights)
    missing = [part for part in (_VISION, _TEXT, _HEAD) if not any(name.startswith(part) for name in tensors)]
    if missing:
        raise ValueError(f"{weights} is not an ImageReward checkpoint: it has no tensors named {missing[0]}*")
    return _Scorer(tensors, BertTokenizer.from_pretrained(tokenizer), dtype)


def _vision(checkpoint: Mapping[str, Tensor]) -> Any:
    """Build the image encoder, of the sizes that the tensors have."""
    from transformers import BlipVisionConfig, BlipVisionModel

    tensors = {}
    for name, tensor in without_prefix(_VISION, checkpoint).items():  # under transformers' names
        names, prefix = _VISION_NAMES, ""
        if block := re.match(r"blocks\.(\d+)\.", name):
            names, prefix, name = _BLOCK_NAMES, f"encoder.layers.{block[1]}.", name[block.end() :]
        module, dot, kind = name.rpartition(".")
        tensors[prefix + (names.get(name) or names.get(module, module) + dot + kind)] = tensor
    width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
    side = math.isqrt(tensors["embeddings.position_embedding"].shape[1] - 1)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_depth(tensors, "encoder.layers."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return _loaded(BlipVisionModel(config), tensors)


def _text(checkpoint: Mapping[str, Tensor]) -> Any:
    """Build the text encoder, which attends to the image in every layer; its names are transformers' own."""
    from transformers import BlipTextConfig, BlipTextModel

    tensors = without_prefix(_TEXT, checkpoint)
    tensors.pop("embeddings.position_ids", None)
    vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_depth(tensors, "encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
    )
    return _loaded(BlipTextModel(config, add_pooling_layer=False), tensors)


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix))


def _loaded(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"these are not the tensors of ImageReward's BLIP: {error}") from error
    return module
