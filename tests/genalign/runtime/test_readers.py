"""Image and audio files of other programs: one reader each, the right values or one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from PIL import Image

from genalign.runtime.media import read_image, read_waveform
from genalign.runtime.waveforms import warn_once
from rewards.backbones.reference_images import ImageFolder

RAMP = np.linspace(0, 255, 6 * 8).round().astype(np.uint8).reshape(6, 8)
COLORS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
GRAY = np.stack([RAMP] * 3, axis=2)
OPAQUE = np.concatenate([COLORS, np.full((6, 8, 1), 255, np.uint8)], axis=2)


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    warn_once.cache_clear()


def _values(path: Path) -> np.ndarray:
    return (read_image(path) * 255).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("image", "name", "expected", "tolerance"),
    [
        (Image.fromarray(COLORS), "rgb.png", COLORS, 0),
        (Image.fromarray(COLORS), "UPPER.PNG", COLORS, 0),
        (Image.fromarray(OPAQUE), "rgba.png", COLORS, 0),
        (Image.fromarray(RAMP), "gray.png", GRAY, 0),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), "gray16.png", GRAY, 0),
        (Image.fromarray(RAMP > 127), "bits.png", np.where(GRAY > 127, 255, 0), 0),
        (Image.fromarray(GRAY).quantize(), "palette.png", GRAY, 0),
        (Image.fromarray(COLORS), "lossless.webp", COLORS, 0),
        (Image.fromarray(GRAY), "gray.jpg", GRAY, 8),
        (Image.fromarray(GRAY).convert("CMYK"), "cmyk.jpeg", GRAY, 8),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_image_has_the_values_that_were_saved(
    image: Image.Image, name: str, expected: np.ndarray, tolerance: int, tmp_path: Path
) -> None:
    image.save(
        tmp_path / name, **({"lossless": True} if name.endswith("webp") else {"quality": 100} if "jp" in name else {})
    )
    np.testing.assert_allclose(_values(tmp_path / name), expected, atol=tolerance + 1e-3)
    np.testing.assert_allclose(ImageFolder(tmp_path).load([0])[0], read_image(tmp_path / name))


@settings(deadline=None)
@given(gray=arrays(np.uint16, (3, 4)), alpha=arrays(np.uint8, (3, 4)))
def test_gray_of_16_bits_is_scaled_and_transparent_parts_are_put_on_white(
    gray: np.ndarray, alpha: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(gray).save(folder / "16.png")
    np.testing.assert_allclose(_values(folder / "16.png")[..., 0], gray / 257, atol=0.51)
    eight = (gray >> 8).astype(np.uint8)
    Image.fromarray(np.stack([eight, alpha], axis=2), "LA").save(folder / "la.png")
    share = alpha / 255
    np.testing.assert_allclose(_values(folder / "la.png")[..., 0], eight * share + 255 * (1 - share), atol=1.01)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images_are_turned_by_their_exif_data(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(GRAY).save(tmp_path / f"a.{suffix}", exif=exif, quality=100)
    turned = [
        RAMP,
        RAMP[:, ::-1],
        RAMP[::-1, ::-1],
        RAMP[::-1],
        RAMP.T,
        np.rot90(RAMP, -1),
        RAMP[::-1, ::-1].T,
        np.rot90(RAMP),
    ]
    np.testing.assert_allclose(_values(tmp_path / f"a.{suffix}")[..., 0], turned[orientation - 1], atol=8)


def test_transparency_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clear = np.concatenate([COLORS * 0, np.zeros((6, 8, 1), np.uint8)], axis=2)
    for name in ("a.png", "b.png"):
        Image.fromarray(clear).save(tmp_path / name)
        assert float(read_image(tmp_path / name).min()) == 1
    assert caplog.text.count("transparent parts of images are put on white") == 1


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_bytes(b""), "cannot be read as an image"),
        (_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "cannot be read as an image"),
        (lambda path: Image.fromarray(RAMP).save(path, "GIF"), "save it again as PNG"),
        (lambda path: Image.fromarray(RAMP).save(path, "TIFF"), "save it again as PNG"),
        (lambda path: Image.fromarray(RAMP).save(path, "BMP"), "save it again as PNG"),
    ],
)
def test_other_files_are_refused_in_one_line(write: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message) as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"there is no .*b\.png"):
        read_image(tmp_path / "b.png")


def test_hidden_files_and_folders_are_no_references(tmp_path: Path) -> None:
    for name in ("a.png", ".hidden.png", ".ipynb_checkpoints/a-checkpoint.png", "sub/b.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(COLORS).save(tmp_path / name, lossless=True)
    assert ImageFolder(tmp_path).names == ("a.png", "sub/b.webp")


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "MS_ADPCM"])
def test_audio_has_the_values_that_were_saved(subtype: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    wave = 0.5 * np.sin(np.arange(4000) / 9)[:, None] * [1.0, 0.5]
    soundfile.write(tmp_path / "a.WAV", wave, 8000, subtype=subtype, format="WAV")
    clip = read_waveform(tmp_path / "a.WAV")
    assert clip.sample_rate == 8000 and clip.waveform.dtype == torch.float32
    np.testing.assert_allclose(clip.waveform.T, wave, atol=0.03 if subtype in ("ULAW", "MS_ADPCM", "PCM_U8") else 1e-4)


@pytest.mark.parametrize(("peak", "message"), [(32767.0, "divide 16-bit values by 32768"), (np.nan, "NaN or infinite")])
def test_audio_that_is_no_waveform_is_refused(peak: float, message: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", peak * np.sin(np.arange(400) / 9), 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=message):
        read_waveform(tmp_path / "a.wav")


def test_audio_a_little_over_full_scale_is_clipped_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", 1.5 * np.sin(np.arange(400) / 9), 8000, subtype="FLOAT")
    assert float(read_waveform(tmp_path / "a.wav").waveform.abs().max()) == 1
    assert "samples beyond [-1, 1] are clipped" in caplog.text
