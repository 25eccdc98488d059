"""A tiny random CLAP with the processor of published checkpoints in small: 16 kHz, windows of one second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, ClapTextConfig

from scripts.pretrain.tones_models import tokenizer

RATE, WINDOW = 16000, 16000


def write_clap(folder: Path, **extractor: Any) -> Path:
    """Write the folder; ``extractor`` are settings of its feature extractor. Batch norm has statistics of its own."""
    torch.manual_seed(0)
    words = tokenizer()
    layers = {"num_attention_heads": 2, "hidden_dropout_prob": 0.0}
    text = ClapTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        max_position_embeddings=16,
        attention_probs_dropout_prob=0.0,
        pad_token_id=words.pad_token_id,
        **layers,
    )
    audio = ClapAudioConfig(
        num_mel_bins=32,
        spec_size=64,
        window_size=4,
        patch_size=4,
        patch_stride=[4, 4],
        patch_embeds_hidden_size=8,
        hidden_size=16,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        hidden_dropout_prob=0.0,
        enable_fusion=extractor.get("truncation") == "fusion",
    )
    model = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=12))
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(-30.0)
    norm.running_var.fill_(400.0)
    model.half().save_pretrained(folder)
    settings = {"truncation": "rand_trunc", "padding": "repeatpad"} | extractor
    features = ClapFeatureExtractor(
        feature_size=32,
        sampling_rate=RATE,
        hop_length=160,
        max_length_s=1,
        fft_window_size=512,
        frequency_min=50,
        frequency_max=8000,
        **settings,
    )
    ClapProcessor(features, words).save_pretrained(folder)
    return folder
