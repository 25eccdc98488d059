"""A third medium, video frames, in one place: saved, drawn, and measured."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genalign.evaluation.report.samples import thumbnail
from genalign.runtime import media
from genalign.runtime.media import ImageMedium, Thumbnail, data_uri, eight_bits, medium_of, register_medium, writer
from genalign.runtime.waveforms import warn_once
from genalign.training.panel import STATISTICS, PanelMeasures
from genalign.types import Prompt


class Frames:
    """Frames (B, T, 3, H, W) in [0, 1], saved as one array of 8 bits."""

    name, folder, suffixes, ndim = "frames", "frames", (".npy",), 5

    def encode(self, sample: Tensor) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, eight_bits(sample).numpy(), allow_pickle=False)
        return buffer.getvalue()

    def thumbnail(self, path: Path) -> Thumbnail:
        frames = torch.from_numpy(np.load(path, allow_pickle=False)).float() / 255
        return Thumbnail(data_uri("image/png", ImageMedium().encode(torch.cat(list(frames), dim=2))), note="frames")


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(media, "_MEDIA", list(media._MEDIA))
    monkeypatch.setattr("genalign.training.panel.STATISTICS", dict(STATISTICS))
    register_medium(Frames())
    return torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def test_a_registered_medium_is_saved_and_drawn(frames: Tensor, tmp_path: Path) -> None:
    names = writer(None)(frames, tmp_path, 7)
    assert names == ["frames/00007.npy", "frames/00008.npy"]
    assert np.array_equal(np.load(tmp_path / names[1], allow_pickle=False), eight_bits(frames[1]).numpy())
    drawn = thumbnail(tmp_path, names[0])
    assert drawn.picture.startswith("data:image/png;base64,") and drawn.note == "frames"


def test_a_medium_without_statistics_gives_one_line(frames: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    prompts = [Prompt("a wave")] * 2
    assert [dict(PanelMeasures()(frames, prompts).statistics) for _ in range(2)] == [{}, {}]
    assert caplog.text.count("no statistics are registered for the medium 'frames'") == 1


def test_statistics_of_a_medium_are_registered_by_its_name(frames: Tensor) -> None:
    from genalign.training import panel

    panel.STATISTICS["frames"] = {"motion": lambda samples: samples.diff(dim=1).abs().flatten(1).mean(1)}
    assert PanelMeasures()(frames, [Prompt("a wave")] * 2).statistics["motion"].shape == (2,)


def test_unknown_and_repeated_media_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="match no medium"):
        medium_of(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="registered already"):
        register_medium(ImageMedium())
    with pytest.raises(ValueError, match="images must be"):
        writer(None)(torch.zeros(1, 1, 2, 2), tmp_path, 0)
    image = Image.new("RGB", (2, 2))
    image.save(tmp_path / "image.tiff")
    with pytest.raises(ValueError, match="suffix of no medium"):
        thumbnail(tmp_path, "image.tiff")
