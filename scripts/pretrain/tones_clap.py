"""The embedded audio-text encoder: a small CLAP, its features, and the folder that ``transformers`` opens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, ClapTextConfig

from genalign.runtime.waveforms import mel_decibels
from genalign.worlds.tones.instruments import LENGTH, SAMPLE_RATE
from scripts.pretrain.tones_models import T5_LENGTH, tokenizer

MELS = 64
MEL_WINDOW = 512  # samples: 64 ms, 16 Hz apart
MEL_HOP = 48  # 6 ms: 251 frames
EMBEDDING = 64


def feature_extractor() -> ClapFeatureExtractor:
    """Log-mel spectrograms (1, 251, 64) in dB."""
    return ClapFeatureExtractor(
        feature_size=MELS,
        sampling_rate=SAMPLE_RATE,
        hop_length=MEL_HOP,
        max_length_s=LENGTH / SAMPLE_RATE,
        fft_window_size=MEL_WINDOW,
        frequency_min=100,
        frequency_max=SAMPLE_RATE // 2,
        truncation="rand_trunc",
        padding="pad",
    )


@cache
def _filters() -> Tensor:
    return torch.from_numpy(feature_extractor().mel_filters_slaney).float()


def log_mel(waveforms: Tensor) -> Tensor:
    """What ``feature_extractor`` makes of clips (B, 1, 12000): (B, 1, 251, 64) in dB; batched, differentiable."""
    return mel_decibels(waveforms[:, 0], _filters(), MEL_WINDOW, MEL_HOP)[:, None]


def build_clap() -> ClapModel:
    """A Swin transformer on 8 x 8 patches of the folded spectrogram, and two bidirectional layers of words."""
    words = tokenizer()
    text = ClapTextConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=T5_LENGTH + 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    audio = ClapAudioConfig(
        num_mel_bins=MELS,
        spec_size=128,
        window_size=4,
        patch_size=8,
        patch_stride=[8, 8],
        patch_embeds_hidden_size=48,
        hidden_size=96,
        depths=[2, 2],
        num_attention_heads=[3, 6],
        num_hidden_layers=2,
        hidden_dropout_prob=0.0,
    )
    return ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=EMBEDDING))


def matrices(model: ClapModel) -> tuple[nn.Parameter, ...]:
    """Weights of both transformers' linear layers."""
    layers = (model.audio_model.audio_encoder.layers, model.text_model.encoder)
    linear = (module for part in layers for module in part.modules() if isinstance(module, nn.Linear))
    return tuple(parameter for module in linear for parameter in module.parameters() if parameter.ndim == 2)


def assemble_clap(model: ClapModel, output: Path) -> None:
    """Write a folder for ``ClapModel`` and ``ClapProcessor``; weights in float16."""
    model.half().save_pretrained(output)
    ClapProcessor(feature_extractor(), tokenizer()).save_pretrained(output)
