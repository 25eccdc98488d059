"""Media: how a sample is recognized, saved and drawn. Images are PNG files, waveforms WAV or FLAC files.

Another medium is a class with the methods of ``Medium`` in one file, passed to ``register_medium``.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from genalign.runtime.waveforms import lowest_frequency, resample, spectrogram, warn_once

MAX_PIXELS = 2**26  # of an image that is read; one of 8192 x 8192
MAX_AUDIO_SAMPLES = 2**28  # of all channels of a file: 1 GiB in float32, 46 minutes in stereo at 48 kHz
MAX_PEAK = 4.0  # of a float file's samples: 12 dB above full scale; integers that were written as floats are far above
LONGEST_SIDE = 256  # pixels of a thumbnail
PLAYED_SECONDS, PLAYED_RATE = 6.0, 16000  # of a clip's player, at most, of one channel
AudioFormat = Literal["wav", "flac"]
AUDIO_SUFFIXES = frozenset({".wav", ".flac"})
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)  # of Pillow

Writer = Callable[[Tensor, Path, int], list[str]]
"""Writes samples (B, ...) into a folder, numbered from a first one; the files' names relative to the folder."""


@dataclass(frozen=True)
class Thumbnail:
    """A sample on a page: ``picture`` and ``sound`` as data URIs, or empty, and a ``note`` on what they hold."""

    picture: str = ""
    sound: str = ""
    note: str = ""

    def __len__(self) -> int:
        """Return the bytes that it takes on the page."""
        return len(self.picture) + len(self.sound)


class Medium(Protocol):
    """A kind of sample.

    ``name`` also selects the statistics of the reward-hacking report, ``folder`` is the folder of the numbered files,
    the first of ``suffixes`` is the suffix that is written, and a batch (B, ...) has ``ndim`` dimensions.
    """

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str: ...

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    @property
    def ndim(self) -> int: ...

    def encode(self, sample: Tensor) -> bytes:
        """Return the content of a file of one sample."""

    def thumbnail(self, path: Path) -> Thumbnail:
        """Draw a saved sample for a page. Raises ValueError for a damaged file."""


class ImageMedium:
    """Images (B, 3, H, W) in [0, 1], saved as PNG."""

    name, folder, suffixes, ndim = "image", "images", (".png", ".jpg", ".jpeg", ".webp"), 4

    def encode(self, sample: Tensor) -> bytes:
        return _png(_pil_image(sample))

    def thumbnail(self, path: Path) -> Thumbnail:
        with opened_image(path) as file:
            image = _rgb(file, path)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        return Thumbnail(data_uri("image/png", _png(image, optimize=True)))


@dataclass(frozen=True)
class AudioMedium:
    """Waveforms (B, C, L) in [-1, 1] at ``sample_rate`` Hz, saved in 16 bits."""

    sample_rate: int = 48000
    format: AudioFormat = "wav"
    name: str = "audio"
    folder: str = "audio"
    ndim: int = 3

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffix that is written, then the other one."""
        return (".flac", ".wav") if self.format == "flac" else (".wav", ".flac")

    def encode(self, sample: Tensor) -> bytes:
        """Return a WAV or FLAC file of a waveform (C, L); NaN is silence. Raises ValueError if soundfile is missing."""
        samples = sample.detach().float().nan_to_num().clamp(-1, 1).cpu().numpy().T
        buffer = BytesIO()
        _soundfile().write(buffer, samples, self.sample_rate, subtype="PCM_16", format=self.format.upper())
        return buffer.getvalue()

    def thumbnail(self, path: Path) -> Thumbnail:
        """Draw the spectrogram of the whole clip, and a player of its beginning as FLAC, whose size is small."""
        clip = read_waveform(path)
        rate, seconds = clip.sample_rate, clip.waveform.shape[1] / clip.sample_rate
        mono = clip.waveform.mean(0, keepdim=True)
        beginning, played_rate = mono[:, : round(PLAYED_SECONDS * rate)], min(rate, PLAYED_RATE)
        sound = AudioMedium(played_rate, "flac").encode(resample(beginning, rate, played_rate))
        part = f"the first {PLAYED_SECONDS:g} of " if seconds > PLAYED_SECONDS else ""
        note = f"{part}{seconds:.3g} s, {lowest_frequency(rate):g} to {rate / 2:g} Hz"
        picture = _png(spectrogram(mono, rate), optimize=True)
        return Thumbnail(data_uri("image/png", picture), data_uri("audio/flac", sound), note)


_MEDIA: list[Medium] = [ImageMedium(), AudioMedium()]


def register_medium(medium: Medium) -> None:
    """Add a medium, so its samples and files are recognized. Raises ValueError for a name that is taken."""
    if any(medium.name == other.name for other in _MEDIA):
        raise ValueError(f"a medium named {medium.name!r} is registered already: choose another name")
    _MEDIA.append(medium)


def medium_of(samples: Tensor) -> Medium:
    """Return the medium of a batch (B, ...) by its shape. Raises ValueError if none matches."""
    for medium in _MEDIA:
        if medium.ndim == samples.ndim:
            return medium
    names = ", ".join(medium.name for medium in _MEDIA)
    raise ValueError(f"samples of shape {tuple(samples.shape)} match no medium ({names}): see register_medium")


def medium_of_file(path: Path) -> Medium:
    """Return the medium of a file by its suffix. Raises ValueError if none has it."""
    for medium in _MEDIA:
        if path.suffix.lower() in medium.suffixes:
            return medium
    raise ValueError(f"{path} has a suffix of no medium: see register_medium")


def write_samples(samples: Tensor, directory: Path, first: int, medium: Medium | None = None) -> list[str]:
    """Save samples as files that are numbered from ``first``.

    Args:
        samples: The samples (B, ...).
        directory: The folder in which the medium's own folder is created.
        first: The number of the first file.
        medium: How to save them; by default the medium of their shape.

    Returns:
        The names of the files relative to ``directory``.

    Raises:
        ValueError: ``samples`` are not of the medium, or soundfile is missing.
    """
    medium = medium or medium_of(samples)
    if medium.ndim != samples.ndim:
        raise ValueError(f"samples of shape {tuple(samples.shape)} are not of the medium {medium.name!r}")
    names = [f"{medium.folder}/{first + index:05d}{medium.suffixes[0]}" for index in range(len(samples))]
    (directory / medium.folder).mkdir(parents=True, exist_ok=True)
    for name, sample in zip(names, samples, strict=True):
        (directory / name).write_bytes(medium.encode(sample))
    return names


def writer(sample_rate: int | None, audio: AudioFormat = "wav") -> Writer:
    """Return the writer for a pipeline's samples: waveforms at ``sample_rate`` Hz in the format ``audio``.

    With a ``sample_rate`` of None the shape of the samples decides their medium.
    """
    medium = None if sample_rate is None else AudioMedium(sample_rate, audio)
    return lambda samples, directory, first: write_samples(samples, directory, first, medium)


def displayed(sample: Tensor) -> Any:
    """Convert one sample to what a notebook shows or plays: a PIL image, or a float32 array (C, L) of a waveform.

    Raises ValueError for an image that has not three channels.
    """
    return _pil_image(sample) if sample.ndim == 3 else sample.detach().float().cpu().numpy()


def _pil_image(sample: Tensor) -> Image.Image:
    if sample.shape[0] != 3:
        raise ValueError(f"images must be (B, 3, H, W), not (B, {', '.join(map(str, sample.shape))})")
    return Image.fromarray(eight_bits(sample).permute(1, 2, 0).cpu().numpy())


def save_images(images: Tensor, paths: Sequence[Path]) -> None:
    """Write one PNG file for each of the images (B, 3, H, W) in [0, 1]."""
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(ImageMedium().encode(image))


def eight_bits(images: Tensor) -> Tensor:
    """Convert images (..., H, W) in [0, 1] to the uint8 of a PNG file; NaN becomes 0."""
    return images.detach().float().nan_to_num().clamp(0, 1).mul(255).round().byte()


def as_jpeg(images: Tensor, quality: int) -> Tensor:
    """Compress images (B, 3, H, W) in [0, 1] as JPEG and read them again; NaN becomes 0."""
    read = []
    for pixels in eight_bits(images).permute(0, 2, 3, 1).cpu().numpy():
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        with Image.open(file, formats=("JPEG",)) as compressed:
            read.append(torch.from_numpy(np.array(compressed)).permute(2, 0, 1))
    return torch.stack(read).to(images) / 255


@contextlib.contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """Open a PNG, JPEG or WebP file without decoding its pixels.

    Raises FileNotFoundError, and ValueError for a file that is damaged, of another kind, or over ``MAX_PIXELS``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{path} has {file.width} x {file.height} pixels, over {MAX_PIXELS}: make it smaller")
            yield file
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): save it again as PNG, JPEG or WebP") from error


def read_image(path: Path) -> Tensor:
    """Read an image (3, H, W) in [0, 1], rotated by its EXIF data, transparent parts on white, 16-bit gray as 8-bit.

    Transparency is logged. Raises FileNotFoundError, and ValueError as ``opened_image``.
    """
    with opened_image(path) as file:
        pixels = np.array(_rgb(file, path))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _rgb(file: Image.Image, path: Path) -> Image.Image:
    """Decode an opened image as ``read_image`` describes."""
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if np.asarray(image.getchannel("A")).min() < 255:
        warn_once(f"transparent parts of images are put on white, as in {path.parent}")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def inside(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in ``folder``. Raises ValueError for a name that leads out of the folder."""
    plain = os.path.normpath(name)
    if os.path.isabs(plain) or plain.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{name!r} leads out of {folder}: name a file in it")
    return folder / plain


@dataclass(frozen=True)
class Waveform:
    """A ``waveform`` (C, L) in [-1, 1], float32, at ``sample_rate`` Hz."""

    waveform: Tensor
    sample_rate: int


def read_waveform(path: Path) -> Waveform:
    """Read a WAV or FLAC file. Samples of a float file beyond [-1, 1] are clipped, with a line in the log.

    Raises FileNotFoundError, and ValueError for a file that cannot be read, is empty or holds samples that are not
    finite or far beyond [-1, 1], or if soundfile is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    soundfile = _soundfile()
    try:
        about = soundfile.info(path)
        if about.frames * about.channels > MAX_AUDIO_SAMPLES:
            raise ValueError(f"{path} has {about.frames} x {about.channels} samples, over {MAX_AUDIO_SAMPLES}: cut it")
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"expected audio (WAV or FLAC), but {path} cannot be read as such: {error}") from None
    waveform = torch.from_numpy(samples.T.copy())
    if not waveform.numel():
        raise ValueError(f"{path} has no samples: leave it out")
    if not bool(waveform.isfinite().all()):
        raise ValueError(f"{path} holds NaN or infinite samples: leave it out, or write it again")
    peak = float(waveform.abs().max())
    if peak > MAX_PEAK:
        raise ValueError(f"{path} holds samples up to {peak:.6g}, not in [-1, 1]: divide 16-bit values by 32768")
    if peak > 1:
        warn_once(f"samples beyond [-1, 1] are clipped, as in {path.parent}")
    return Waveform(waveform.clamp(-1, 1), int(rate))


def waveform_rate(path: Path) -> int:
    """Read the sample rate of a WAV or FLAC file in Hz. Raises as ``read_waveform``."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    soundfile = _soundfile()
    try:
        return int(soundfile.info(path).samplerate)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"expected audio (WAV or FLAC), but {path} cannot be read as such: {error}") from None


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError:
        raise ValueError("audio files need soundfile: pip install 'genalign[audio]'") from None
    return soundfile


def _png(image: Image.Image, optimize: bool = False) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """Return ``content`` of the media type ``kind`` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder and its subfolders, sorted. Raises FileNotFoundError for none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ImageMedium.suffixes)
    if not files:
        raise FileNotFoundError(f"there are no images in {folder}: give a folder of {', '.join(ImageMedium.suffixes)}")
    return files
