"""Pools: samples on disk to learn from, with their latents, prompts, scores and groups.

A pool is a folder: ``pool.json``, and numbered parts ``part-00000.safetensors`` (latents, float16) with
``part-00000.jsonl`` (a line for each sample). A part is complete once its lines are written, after its latents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.runtime.files import apply_umask, write_json, write_text
from genalign.types import Prompt, PromptSet, users_of

FORMAT = 1
INFO = "pool.json"


@dataclass(frozen=True)
class PoolInfo:
    """What the samples of a pool are.

    Attributes:
        autoencoder: The fingerprint of the autoencoder that made the latents.
        latent_shape: The shape of a sample's latents.
        scores: The names of the scores.
        made_by: How the pool was made, for human readers.
        denoiser: The fingerprint of the denoiser that sampled the latents, without its adapter; None for samples that
            were not made by the model, or where it is not known.
    """

    autoencoder: str
    latent_shape: tuple[int, ...]
    scores: tuple[str, ...]
    made_by: Mapping[str, Any]
    denoiser: str | None = None

    def write(self, folder: Path) -> None:
        """Write pool.json, with the version of the format."""
        write_json(folder / INFO, {"format": FORMAT, **vars(self)})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read pool.json. Raises FileNotFoundError where there is none, ValueError for another format."""
        path = folder / INFO
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a pool: it has no {INFO}; make one with genalign collect")
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("format") != FORMAT:
            raise ValueError(f"{path} has format {value.get('format')}, but this version reads format {FORMAT}")
        shape, scores = tuple(value["latent_shape"]), tuple(value["scores"])
        return cls(value["autoencoder"], shape, scores, value["made_by"], value.get("denoiser"))


@dataclass(frozen=True)
class PoolSample:
    """A sample of a pool: its prompt, its scores by name (NaN where a reward failed), and its group.

    Samples of one group are compared with each other; without a group name, the prompt defines the group.
    """

    prompt: Prompt
    scores: Mapping[str, float]
    group: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as JSON types."""
        scores = {name: value if math.isfinite(value) else None for name, value in self.scores.items()}
        line: dict[str, Any] = {"prompt": self.prompt.text, "scores": scores}
        if self.prompt.metadata is not None:
            line["metadata"] = dict(self.prompt.metadata)
        if self.group is not None:
            line["group"] = self.group
        return line

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Self:
        """Restore the result of ``as_dict``."""
        scores = {name: math.nan if value is None else float(value) for name, value in line["scores"].items()}
        return cls(Prompt(line["prompt"], line.get("metadata")), scores, line.get("group"))


def part_files(folder: Path, number: int) -> tuple[Path, Path]:
    """The files of a part: its latents, and the lines of its samples."""
    return folder / f"part-{number:05d}.safetensors", folder / f"part-{number:05d}.jsonl"


def write_part(folder: Path, number: int, latents: Tensor, samples: Sequence[PoolSample]) -> None:
    """Write a part of latents (n, ...) and as many samples; the lines come last, when the part is complete."""
    if len(latents) != len(samples):
        raise ValueError(f"a part has as many latents as samples, not {len(latents)} and {len(samples)}")
    tensors, lines = part_files(folder, number)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents.detach().to("cpu", torch.float16).contiguous()}, tensors)
    apply_umask(folder)
    write_text(lines, "".join(json.dumps(sample.as_dict(), ensure_ascii=False) + "\n" for sample in samples))


@dataclass(frozen=True)
class Pool:
    """The n samples of a pool, whose latents are read when needed.

    Attributes:
        folder: The folder.
        info: What the samples are.
        samples: The samples, in the order of the parts.
        read: Reads the latents (N, ...) of samples by their numbers, in float32.
    """

    folder: Path
    info: PoolInfo
    samples: tuple[PoolSample, ...]
    read: Callable[[Sequence[int]], Tensor]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open a pool. Raises FileNotFoundError or ValueError for one that is missing or incomplete."""
        info, samples, places = PoolInfo.read(folder), list[PoolSample](), list[tuple[Path, int]]()
        for lines in sorted(folder.glob("part-*.jsonl")):
            tensors = lines.with_suffix(".safetensors")
            own = [PoolSample.from_dict(json.loads(line)) for line in lines.read_text("utf-8").splitlines()]
            _require_part(tensors, len(own), info)
            samples += own
            places += [(tensors, row) for row in range(len(own))]
        if not samples:
            raise ValueError(f"{folder} has no samples yet: run genalign collect again, which continues")
        return cls(folder, info, tuple(samples), lambda rows: _read([places[row] for row in rows]))

    def require(self, autoencoder: str, latent_shape: Sequence[int]) -> None:
        """Raise ValueError for a model with another autoencoder, or of another size."""
        if autoencoder != self.info.autoencoder:
            raise ValueError(
                f"{self.folder} has latents of another autoencoder ({self.info.autoencoder}, not {autoencoder}):"
                " collect a pool with this model"
            )
        if tuple(latent_shape) != self.info.latent_shape:
            own, other = ("x".join(map(str, shape)) for shape in (self.info.latent_shape, latent_shape))
            raise ValueError(f"{self.folder} has latents of {own}, but the model samples {other}: set the same size")

    @property
    def prompts(self) -> PromptSet:
        """The different prompts, in the order of the samples."""
        distinct = {sample.prompt.text: sample.prompt for sample in reversed(self.samples)}
        return PromptSet(self.folder.name, tuple(reversed(distinct.values())))

    def restricted(self, prompts: PromptSet) -> PromptSet:
        """Keep only the samples of the given prompts. Raises ValueError if there are none."""
        own = {sample.prompt.text for sample in self.samples}
        common = tuple(prompt for prompt in prompts.prompts if prompt.text in own)
        if not common:
            raise ValueError(
                f"{self.folder} has no samples of the prompts in {prompts.name}: set prompts to the pool, too"
            )
        return PromptSet(prompts.name, common)

    def with_groups_of(self, size: int) -> Pool:
        """Leave out the groups of fewer than ``size`` samples. Raises ValueError if nothing would be left."""
        rows = [row for groups in self.groups().values() for group in groups if len(group) >= size for row in group]
        if not rows:
            raise ValueError(
                f"no group of {self.folder} has {size} samples: lower training.group_size, or collect more per prompt"
            )
        rows.sort()
        return Pool(
            self.folder,
            self.info,
            tuple(self.samples[row] for row in rows),
            lambda numbers: self.read([rows[number] for number in numbers]),
        )

    def groups(self) -> dict[str, list[list[int]]]:
        """The numbers of the samples in each group, by the text of their prompt; groups never mix users."""
        by_prompt: dict[str, dict[tuple[str | None, str], list[int]]] = {}
        for row, sample in enumerate(self.samples):
            key = sample.group, repr(users_of(sample.prompt))
            by_prompt.setdefault(sample.prompt.text, {}).setdefault(key, []).append(row)
        return {text: list(groups.values()) for text, groups in by_prompt.items()}


def drawn_group(groups: Sequence[Sequence[int]], size: int, name: str) -> list[int]:
    """Draw ``size`` samples of one of a prompt's groups, without replacement, by the seed ``name``."""
    group = groups[derived_seed(name, "group") % len(groups)]
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(derived_seed(name, "order")))
    return [group[place] for place in order[:size].tolist()]


def _require_part(tensors: Path, count: int, info: PoolInfo) -> None:
    """Raise ValueError unless a part has as many latents as lines, of the pool's shape."""
    if not tensors.is_file():
        raise FileNotFoundError(f"{tensors} is missing, although its samples are listed: collect the pool again")
    with safe_open(tensors, framework="pt") as file:
        shape = tuple(file.get_slice("latents").get_shape())
    if shape != (count, *info.latent_shape):
        raise ValueError(
            f"{tensors} holds latents of {shape}, not {(count, *info.latent_shape)}: collect the pool again"
        )


def _read(places: Sequence[tuple[Path, int]]) -> Tensor:
    """Read rows of several files, each opened once."""
    rows: dict[Path, list[int]] = {}
    for place, (path, _) in enumerate(places):
        rows.setdefault(path, []).append(place)
    latents: list[Tensor | None] = [None] * len(places)
    for path, wanted in rows.items():
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice("latents")
            for place in wanted:
                number = places[place][1]
                latents[place] = stored[number : number + 1][0].float()
    return torch.stack([row for row in latents if row is not None])
