"""Files of sample grids: one tiled image, or one file per clip."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from genalign.runtime.media import read_waveform
from genalign.runtime.progress import Progress
from genalign.training.round_log import RoundDisplay, SampleGrid, SampleGridWriter, tile
from genalign.training.settings import TrainerSettings


def test_a_resumed_run_shows_no_reward_before_its_next_round() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with Progress(console=terminal).phase("training", 16, "rounds", done=16) as rounds:
        RoundDisplay(TrainerSettings(rounds=16), rounds)
        terminal.print(rounds.progress._table())
    drawn = terminal.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "16/16 rounds" in drawn and "reward" not in drawn and "nan" not in drawn


def test_images_are_tiled_row_by_row_on_white() -> None:
    images = torch.arange(1, 4)[:, None, None, None].expand(3, 3, 4, 5) / 4
    tiled = tile(images, margin=1)
    assert tiled.shape == (3, 2 * 5, 2 * 6)
    assert [float(tiled[0, y, x]) for y, x in ((0, 0), (0, 6), (5, 0), (5, 6), (4, 0))] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_clips_are_written_one_by_one_when_a_grid_is_due(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    writer = SampleGridWriter(lambda: torch.full((2, 1, 80), 0.5), 8000, every=3)
    assert writer.after(2, False, tmp_path) == []
    names = writer.after(3, False, tmp_path)
    assert names == ["samples/round-000003-00.wav", "samples/round-000003-01.wav"]
    clip = read_waveform(tmp_path / names[1])
    assert clip.sample_rate == 8000 and clip.waveform.shape == (1, 80)
    assert SampleGridWriter(lambda: None, None, every=1).after(1, False, tmp_path) == []


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="every >= 0 and count >= 1"):
        SampleGrid(every=1, count=0)
