"""Reference images, from folders or memory, for discriminators and distances; ``reference_audio`` has clips."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from genalign.runtime.media import ImageMedium, read_image
from genalign.runtime.prompt_files import read_listing
from genalign.types import Prompt
from rewards.backbones.clip_encoder import resize

_PROMPTS = "prompts.jsonl"


class ReferenceSamples(Protocol):
    """A sequence of images or clips that loads them by number."""

    def __len__(self) -> int: ...

    def load(self, rows: Sequence[int]) -> Tensor:
        """Load images (n, 3, H, W) in [0, 1] or waveforms (n, C, L) in [-1, 1], float32 on the CPU."""


class References(Protocol):
    """Reference images, and which of them a sample of a prompt is compared with."""

    @property
    def images(self) -> ReferenceSamples:
        """All references, whatever their prompt."""

    def rows(self, prompt: Prompt) -> Sequence[int]:
        """Return the numbers of the references for ``prompt``; hashable."""

    def choose(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[int]:
        """Draw the number of one reference for each prompt."""


class SampleTensor:
    """Samples (N, ...) held in memory, called ``kind`` in messages. Raises ValueError for N = 0."""

    def __init__(self, samples: Tensor, kind: str) -> None:
        if not len(samples):
            raise ValueError(f"there are no reference {kind}: give at least one")
        self._samples = samples.detach().float().cpu()

    def __len__(self) -> int:
        return len(self._samples)

    def load(self, rows: Sequence[int]) -> Tensor:
        """Load the samples (n, ...) of ``rows``."""
        return self._samples[list(rows)]


class ImageTensor(SampleTensor):
    """Images (N, 3, H, W) in [0, 1] held in memory. Raises ValueError for another shape, integers, or N = 0."""

    def __init__(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            kind = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"reference images must be floats (N, 3, H, W) in [0, 1], not {kind}")
        super().__init__(images, "images")


class SampleFolder:
    """Files anywhere under ``folder``, of one kind; ``names`` are relative to it and sorted.

    Hidden files, files in hidden folders and prompts.jsonl are left out. Raises ValueError for a folder without files
    of this kind or with other ones, FileNotFoundError for a missing folder.
    """

    kind: str
    formats: str
    suffixes: Collection[str]

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give the folder of the reference {self.kind}")
        paths = sorted(path.relative_to(folder) for path in self.folder.rglob("*") if path.is_file())
        visible = (path for path in paths if not any(part.startswith(".") for part in path.parts))
        files = [path for path in visible if path.name != _PROMPTS]
        other = [path for path in files if path.suffix.lower() not in self.suffixes]
        if other:
            more = f" and {len(other) - 1} more files of another kind" if len(other) > 1 else ""
            raise ValueError(
                f"expected {self.kind} ({self.formats}) in {folder}, found {other[0]}{more}: keep them elsewhere"
            )
        if not files:
            raise ValueError(f"{folder} has no {self.kind}: put {self.formats} references there")
        self.names = tuple(path.as_posix() for path in files)

    def __len__(self) -> int:
        return len(self.names)


class ImageFolder(SampleFolder):
    """PNG, JPEG and WebP files anywhere under ``folder``, read when needed.

    They are resized to ``size`` (height, width) if given. ``names`` are relative to the folder and sorted; hidden files
    and prompts.jsonl are left out. Raises ValueError for a folder without images or with other files, FileNotFoundError
    for a missing folder.
    """

    kind, formats, suffixes = "images", "PNG, JPEG or WebP", ImageMedium.suffixes

    def __init__(self, folder: str | Path, size: tuple[int, int] | None = None) -> None:
        super().__init__(folder)
        self.size = size

    def load(self, rows: Sequence[int]) -> Tensor:
        """Load the images (n, 3, H, W) of ``rows``. Raises ValueError for an unreadable file or different sizes."""
        images = [read_image(self.folder / self.names[row])[None] for row in rows]
        if self.size is not None:
            images = [resize(image, self.size) for image in images]
        height, width = images[0].shape[-2:]
        if other := [row for row, image in zip(rows, images, strict=True) if image.shape != images[0].shape]:
            raise ValueError(
                f"the references in {self.folder} have different sizes ({self.names[other[0]]} is not {width} x"
                f" {height}): give size=(height, width)"
            )
        return torch.cat(images)


@dataclass(frozen=True)
class ReferencePool:
    """References for any prompt: a style, or a distribution (Adv-GRPO, arXiv 2511.20256, section 4.5)."""

    images: ReferenceSamples

    def rows(self, prompt: Prompt) -> Sequence[int]:
        """Return the numbers of all references."""
        return range(len(self.images))

    def choose(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[int]:
        """Draw the number of a reference for each prompt, uniformly with replacement."""
        numbers: list[int] = torch.randint(len(self.images), (len(prompts),), generator=generator).tolist()
        return numbers


class ReferencesByPrompt:
    """References of the same prompt; ``prompts`` has the text of each of ``images``.

    Raises ValueError where there is not one text for each image.
    """

    def __init__(self, images: ReferenceSamples, prompts: Sequence[str]) -> None:
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} reference images have {len(prompts)} prompts: give one for each")
        self.images = images
        rows: dict[str, list[int]] = {}
        for row, text in enumerate(prompts):
            rows.setdefault(text, []).append(row)
        self._rows = {text: tuple(numbers) for text, numbers in rows.items()}

    @classmethod
    def read(cls, folder: str | Path, size: tuple[int, int] | None = None) -> ReferencesByPrompt:
        """Read the images of a folder (see ``ImageFolder``) with their prompts.

        The folder's prompts.jsonl has one object a line: {"file_name": "a/1.png", "prompt": "a red circle"}.
        """
        images = ImageFolder(folder, size)
        try:
            prompts = {name: prompt.text for name, prompt in read_listing(images.folder).items()}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, or use ReferencePool, which needs no prompts") from None
        if without := [name for name in images.names if name not in prompts]:
            raise ValueError(
                f"{len(without)} images in {images.folder} have no prompt, such as {without[0]}: name them in"
                f" {_PROMPTS}, or use ReferencePool, which needs no prompts"
            )
        if absent := sorted(set(prompts) - set(images.names)):
            raise ValueError(
                f"{len(absent)} files that have a prompt are not in {images.folder}, such as {absent[0]}: add them, or"
                " remove their prompts"
            )
        return cls(images, [prompts[name] for name in images.names])

    def rows(self, prompt: Prompt) -> Sequence[int]:
        """Return the numbers of the references of ``prompt``. Raises ValueError where there are none."""
        if prompt.text not in self._rows:
            raise ValueError(
                f"there is no reference for the prompt {prompt.text!r}: add images of it, or use ReferencePool, which"
                " takes references of any prompt"
            )
        return self._rows[prompt.text]

    def choose(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[int]:
        """Draw the number of a reference of each prompt, uniformly with replacement."""
        choices = [self.rows(prompt) for prompt in prompts]
        drawn = torch.rand(len(choices), generator=generator, dtype=torch.float64).tolist()
        return [rows[int(u * len(rows))] for rows, u in zip(choices, drawn, strict=True)]
