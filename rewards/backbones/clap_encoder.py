"""CLAP checkpoints as frozen encoders of sounds and texts.

transformers is imported when a checkpoint is opened, not before.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign import assets
from genalign.runtime.waveforms import as_heard, mel_decibels, warn_once
from genalign.types import Precision
from rewards.backbones.encoders import DualEncoder, Features, read_config


class ClapEncoder(DualEncoder):
    """A CLAP checkpoint of transformers, a folder or Hub id, with its processor next to the weights.

    Spectrograms are made in torch, so scores have a gradient, and without the processor's random crops. It hears
    windows of ``length`` samples at ``rate`` Hz. A longer clip is covered by as few windows as possible, evenly spaced.
    A shorter one is padded as its checkpoint was trained: by whole repetitions and then silence ("repeatpad"),
    repetition ("repeat"), or silence ("pad").
    """

    def __init__(self, model: str, dtype: Precision = "float32") -> None:
        from transformers import ClapModel, ClapProcessor

        text = read_config(model, "CLAP").text_config
        super().__init__(ClapModel.from_pretrained(model, dtype=torch.float32), dtype)
        norm = self.model.audio_model.audio_encoder.batch_norm.float()  # of levels in dB, with few of their digits lost
        norm.register_forward_hook(lambda module, inputs, output: output.to(self.dtype))
        processor = ClapProcessor.from_pretrained(model)
        extractor = processor.feature_extractor  # with fusion a checkpoint has another mel scale
        filters = extractor.mel_filters if extractor.truncation == "fusion" else extractor.mel_filters_slaney
        self.filters = torch.from_numpy(filters).float()
        self.rate, self.length = int(extractor.sampling_rate), int(extractor.nb_max_samples)
        self.fft, self.hop = int(extractor.fft_window_size), int(extractor.hop_length)
        self._padding, self._name, self.tokenizer = extractor.padding, Path(model).name, processor.tokenizer
        self.context = min(self.tokenizer.model_max_length, text.max_position_embeddings - text.pad_token_id - 1)

    def forward(self, waveforms: Tensor, rate: int) -> Tensor:
        """Compute unit embeddings (B, d) of waveforms (B, C, L) at ``rate`` Hz; differentiable.

        The embedding of a long clip is the mean over its windows. Spectrograms as ``spectra`` makes them are taken too.
        """
        return self.features(waveforms, rate).global_

    def features(self, waveforms: Tensor, rate: int) -> Features:
        """Compute the embeddings of ``forward``, and unit embeddings of the frames (B, n, d).

        Frames are the last layer's tokens, averaged over frequency and projected. Frames of padding are left out, but
        of spectrograms, whose padding is not known.
        """
        if waveforms.ndim == 5:
            whole, frames = self.embed_spectra(waveforms)
            return Features(whole, frames.flatten(1, 2))
        clips = self._clips(waveforms, rate)
        whole, frames = self.embed_spectra(self._spectra(clips))
        unpadded = math.ceil(frames.shape[2] * min(1.0, clips.shape[1] / self.length))
        return Features(whole, frames[:, :, :unpadded].flatten(1, 2))

    def spectra(self, waveforms: Tensor, rate: int) -> Tensor:
        """Compute the network's input, log-mel spectrograms (B, windows, 1, frames, mels) in dB; differentiable."""
        return self._spectra(self._clips(waveforms, rate))

    def embed_spectra(self, spectra: Tensor) -> tuple[Tensor, Tensor]:
        """Embed ``spectra`` (B, windows, 1, frames, mels) as unit vectors: clips (B, d), frames (B, windows, f, d)."""
        flat = spectra.flatten(0, 1)
        shorter = torch.zeros(len(flat), 1, dtype=torch.bool, device=flat.device)  # no window is to be fused
        output = self.model.audio_model(input_features=flat, is_longer=shorter)
        tokens = output.last_hidden_state.mean(2).transpose(1, 2)
        projected = (self.model.audio_projection(part).float() for part in (output.pooler_output, tokens))
        parts = (F.normalize(part, dim=-1) for part in projected)
        whole, frames = (part.view(*spectra.shape[:2], *part.shape[1:]) for part in parts)
        return F.normalize(whole.mean(1), dim=-1), frames

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return self.model.audio_model, self.model.audio_projection

    def _clips(self, waveforms: Tensor, rate: int) -> Tensor:
        clips = as_heard(waveforms, rate, self.rate, f"CLAP {self._name}")
        if clips.shape[1] < self.length:
            seconds = self.length / self.rate
            warn_once(f"CLAP {self._name} hears {seconds:g} s: shorter clips are filled up ({self._padding})")
        return clips

    def _spectra(self, clips: Tensor) -> Tensor:
        length = clips.shape[1]
        if length < self.length:
            times = {"repeatpad": self.length // length, "repeat": math.ceil(self.length / length), "pad": 1}
            repeated = clips.repeat(1, times[self._padding])[:, : self.length]
            windows = F.pad(repeated, (0, self.length - repeated.shape[1]))[:, None]
        else:
            starts = torch.linspace(0, length - self.length, math.ceil(length / self.length)).round().long().tolist()
            windows = torch.stack([clips[:, start : start + self.length] for start in starts], 1)
        spectra = mel_decibels(windows.flatten(0, 1), self.filters, self.fft, self.hop)
        return spectra.view(*windows.shape[:2], 1, *spectra.shape[1:])


def load_clap(model: str, dtype: Precision = "float32") -> ClapEncoder:
    """Load the CLAP encoder of an embedded name ("tones-clap"), a transformers folder or a Hub id.

    It is opened once per process and ``dtype``, and shared; its batch norm stays in float32. Raises ValueError for a
    folder of another kind.
    """
    return _opened(assets.resolve(model), dtype)


@functools.cache
def _opened(model: str, dtype: Precision) -> ClapEncoder:
    with torch.random.fork_rng(devices=[]):  # opening draws random numbers, and only the first call opens
        return ClapEncoder(model, dtype)
