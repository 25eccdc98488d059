"""Reference clips: recordings in a folder, or waveforms in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from genalign.metrics.audio import SILENT
from genalign.runtime.media import AUDIO_SUFFIXES, read_waveform
from genalign.runtime.waveforms import as_heard, require_waveforms, warn_once
from rewards.backbones.reference_images import SampleFolder, SampleTensor


class AudioTensor(SampleTensor):
    """Waveforms (N, C, L) in [-1, 1] in memory.

    Raises ValueError for another shape, N = 0, or values that are not finite; TypeError for integers.
    """

    def __init__(self, waveforms: Tensor) -> None:
        super().__init__(require_waveforms(waveforms), "clips")
        if not bool(waveforms.isfinite().all()):
            raise ValueError("reference clips must be finite: leave failed samples out")


class AudioFolder(SampleFolder):
    """WAV and FLAC files anywhere under ``folder``, read when needed, as one channel at ``sample_rate`` Hz.

    Mixing and resampling are logged. ``seconds`` cuts every clip to its beginning. ``names`` are relative to the folder
    and sorted; hidden files and folders and prompts.jsonl are left out. Raises ValueError for a folder without audio or
    with other files, FileNotFoundError for a missing folder.
    """

    kind, formats, suffixes = "audio", "WAV or FLAC", AUDIO_SUFFIXES

    def __init__(self, folder: str | Path, sample_rate: int, seconds: float | None = None) -> None:
        super().__init__(folder)
        self.sample_rate, self.seconds = sample_rate, seconds

    def load(self, rows: Sequence[int]) -> Tensor:
        """Load the clips (n, 1, L) of ``rows``.

        Raises ValueError for a file that is unreadable, not finite or shorter than ``seconds``, and for clips of
        different lengths.
        """
        clips: list[Tensor] = []
        for path in (self.folder / self.names[row] for row in rows):
            recording, reader = read_waveform(path), f"the reader of {self.folder}"
            clip = as_heard(recording.waveform[None], recording.sample_rate, self.sample_rate, reader)
            if bool((clip.abs() < SILENT).all()):
                warn_once(f"the reference {path} is silent")
            if self.seconds is not None:
                length, duration = round(self.seconds * self.sample_rate), clip.shape[1] / self.sample_rate
                if clip.shape[1] < length:
                    raise ValueError(
                        f"{path} lasts {duration:.2f} s, less than seconds={self.seconds:g}: lower it, or leave it out"
                    )
                clip = clip[:, :length]
            if clips and clip.shape != clips[0].shape:
                first, other = (len(one[0]) / self.sample_rate for one in (clips[0], clip))
                raise ValueError(
                    f"the references in {self.folder} have different lengths ({first:.2f} s, but {path.name}"
                    f" {other:.2f} s): give seconds="
                )
            clips.append(clip)
        return torch.stack(clips)
