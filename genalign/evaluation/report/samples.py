"""How a kept sample is shown on a page: an image as itself, a clip as a spectrogram and something to play."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from genalign.runtime.media import AUDIO_SUFFIXES, Recording, encoded, opened_image, read_waveform
from genalign.runtime.waveforms import mel_decibels, resample

LIST_BYTES = 1_400_000  # of the samples of one list, as base64: two lists and the charts stay under 5 MB
LONGEST_SIDE = 256  # pixels of an image
PLAYED_SECONDS, PLAYED_RATE = 6.0, 16000  # at most, of one channel
_COLUMNS, _BANDS = 220, 96  # pixels of a spectrogram
_WINDOW_SECONDS, _LOWEST_HZ = 0.064, 50.0
_QUIET, _LOUD = -80.0, 0.0  # dB of a full-scale sine, at the ends of the colours: the same for all clips
_COLOURS = ((8, 12, 34), (56, 34, 110), (170, 52, 108), (244, 137, 72), (252, 240, 190))

Card = TypeVar("Card")


@dataclass(frozen=True)
class Shown:
    """A sample on a page: ``picture`` and ``sound`` as data URIs, empty where it was not kept or cannot be heard, and a
    ``note`` on what is seen and played of a clip."""

    picture: str = ""
    sound: str = ""
    note: str = ""

    def __len__(self) -> int:
        """Bytes that it takes on the page."""
        return len(self.picture) + len(self.sound)


def shown(folder: Path, name: str | None) -> Shown:
    """The file ``name`` in ``folder``, by its suffix an image or a clip; nothing where there is none.

    Raises ValueError for a file that is damaged, or a clip where soundfile is missing.
    """
    if name is None or not (folder / name).is_file():
        return Shown()
    path = folder / name
    return _clip(read_waveform(path)) if path.suffix.lower() in AUDIO_SUFFIXES else Shown(_picture(path))


def fitting(cards: Iterable[Card], samples: Callable[[Card], Sequence[Shown]]) -> list[Card]:
    """The first ``cards``, until their samples have taken ``LIST_BYTES``."""
    made: list[Card] = []
    spent = 0
    for card in cards:
        spent += sum(map(len, samples(card)))
        if spent > LIST_BYTES:
            break
        made.append(card)
    return made


def _picture(path: Path) -> str:
    """A PNG of at most ``LONGEST_SIDE`` pixels a side."""
    with opened_image(path) as file:
        image = file.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return _png(image)


def _png(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _data_uri("image/png", buffer.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _clip(recording: Recording) -> Shown:
    """All of it is seen; its beginning is played, as FLAC, whose size is that of what there is to hear."""
    rate, seconds = recording.sample_rate, recording.waveform.shape[1] / recording.sample_rate
    mixed = recording.waveform.mean(0, keepdim=True)
    kept, heard = mixed[:, : round(PLAYED_SECONDS * rate)], min(rate, PLAYED_RATE)
    sound = encoded(Recording(resample(kept, rate, heard), heard), "flac")
    part = f"the first {PLAYED_SECONDS:g} of " if seconds > PLAYED_SECONDS else ""
    note = f"{part}{seconds:.3g} s, {_lowest(rate):g} to {rate / 2:g} Hz"
    return Shown(_png(spectrogram(mixed, rate)), _data_uri("audio/flac", sound), note)


def spectrogram(waveform: Tensor, rate: int) -> Image.Image:
    """The spectrogram of one channel (1, L) at ``rate`` Hz: time to the right, the logarithm of the frequency upwards
    to half the rate, brightness by dB of full scale on one scale for all clips."""
    window = max(8, round(_WINDOW_SECONDS * rate))
    padded = F.pad(waveform, (0, max(0, window - waveform.shape[1])))
    spectra = mel_decibels(padded, _log_bands(window, rate), window, max(1, -(-padded.shape[1] // _COLUMNS)))[0]
    full_scale = 20 * np.log10(window / 4)  # of a sine through a Hann window
    share = ((spectra.T.flip(0) - full_scale - _QUIET) / (_LOUD - _QUIET)).clamp(0, 1)
    image = Image.fromarray(share.mul(255).round().byte().numpy(), "L")
    image.putpalette(_palette())
    return image


@cache
def _log_bands(window: int, rate: int) -> Tensor:
    """Triangles (window // 2 + 1, bands) at even steps of log frequency, never narrower than two bins, of height 1."""
    nyquist, lowest = rate / 2, _lowest(rate)
    centres = lowest * (nyquist / lowest) ** ((torch.arange(_BANDS) + 0.5) / _BANDS)
    reach = (centres * ((nyquist / lowest) ** (1 / _BANDS) - 1)).clamp(min=rate / window)
    bins = torch.linspace(0, nyquist, window // 2 + 1)[:, None]
    bands: Tensor = (1 - (bins - centres).abs() / reach).clamp(min=0)
    return bands


def _lowest(rate: int) -> float:
    """The frequency in Hz at the lower edge of a spectrogram."""
    return min(_LOWEST_HZ, rate / 16)


@cache
def _palette() -> list[int]:
    """256 colours, from dark to light."""
    at, stops = np.linspace(0, len(_COLOURS) - 1, 256), np.arange(len(_COLOURS))
    channels = [np.interp(at, stops, channel) for channel in zip(*_COLOURS, strict=True)]
    return [int(value) for value in np.stack(channels, 1).round().ravel()]
