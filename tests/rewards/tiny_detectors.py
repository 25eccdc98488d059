"""Tiny random detectors of transformers, and a CLIP, on disk, for tests that need real ones but no good ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertTokenizerFast,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

from scripts.pretrain.shapes_tokenizers import clip_tokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "dog", "cat", "wine", "glass")
_SIZE = {"shortest_edge": 64, "longest_edge": 128}


def _swin(**outputs: object) -> SwinConfig:
    return SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, **outputs)


def mask2former(folder: Path, labels: int = 80, likely: tuple[int, ...] = (16, 15)) -> str:
    """Ten queries that are mostly of the ``likely`` classes: dog and cat."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_swin(out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        num_queries=10,
        num_labels=labels,
    )
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for place, label in enumerate(likely):
            network.class_predictor.bias[label] = 6.0 - place / 2
        network.class_predictor.weight.mul_(3)
    network.save_pretrained(folder)
    Mask2FormerImageProcessor(size=_SIZE).save_pretrained(folder)
    return str(folder)


def _towers(tokenizer: CLIPTokenizer, context: int) -> dict[str, Any]:
    """The configuration of a text and an image tower of width 16."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = tower | special | {"vocab_size": len(tokenizer), "max_position_embeddings": context}
    return {"text_config": text, "vision_config": tower | {"image_size": 32, "patch_size": 8}}


def owlv2(folder: Path) -> str:
    torch.manual_seed(1)
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 24
    config = Owlv2Config(**_towers(tokenizer, 24), projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


def grounding_dino(folder: Path) -> str:
    torch.manual_seed(2)
    text = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = GroundingDinoConfig(
        backbone_config=_swin(out_indices=[2, 3, 4]),
        text_config=text,
        num_queries=12,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        d_model=32,
        max_text_len=32,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})
    GroundingDinoProcessor(GroundingDinoImageProcessor(size=_SIZE), tokenizer).save_pretrained(folder)
    return str(folder)


def clip(folder: Path, **processor: Any) -> str:
    """A CLIP with its tokenizer and image processor, which has these settings."""
    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**_towers(tokenizer, 12), projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**(sizes | processor)).save_pretrained(folder)
    return str(folder)
