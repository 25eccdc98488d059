"""``genalign reward collect``: samples of each prompt, side by side, to be judged."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from genalign.cli import parsing
from genalign.cli.context import CommandContext, load_with_lora, prompt_set, rank_share
from genalign.cli.external_samples import external_samples
from genalign.cli.generation_settings import require_positive
from genalign.cli.model_settings import Model
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import generate
from genalign.diffusion.sampling import Sampling
from genalign.reward_learning.labeling import sample_rate
from genalign.reward_learning.preferences import COMPARISONS, JudgedSample, Judgment
from genalign.runtime.distributed import RankShare
from genalign.runtime.files import write_json, write_text
from genalign.runtime.media import AudioFormat, medium_of_file, writer
from genalign.runtime.progress import Progress
from genalign.runtime.text_files import read_json
from genalign.types import Prompt

T = TypeVar("T")

COLLECTION = "collection.json"
"""The file in a dataset's folder that records how its samples were collected."""


@dataclass(frozen=True)
class ComparedModel:
    """A generator whose samples are compared.

    Args:
        model: The model.
        lora: An adapter of the model.
        sampling: Sampling settings.
    """

    model: Model
    lora: str | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(20))


@dataclass(frozen=True, kw_only=True)
class RewardCollect:
    """Comparisons of samples of one prompt, for genalign reward label: from one model, several, or other programs.

    Run the command again to resume it; processes that a launcher starts share the batches.

    Args:
        output: Folder of the dataset: the samples' files, and a comparisons.jsonl.
        models: Named models. A single one is compared with itself; of several, each comparison draws different ones
            by the seed, if there are enough.
        prompts: Prompts of the models' samples: a file, a dataset, or a split of a world.
        samples: A folder of other programs' samples with a prompts.jsonl, instead of models; a line may have a
            generator and a seed. Of several folders, each comparison draws different ones, if there are enough, and the
            generator defaults to the folder's name.
        group_size: Number of samples in a comparison.
        comparisons_per_prompt: Number of comparisons per prompt, each with its own samples.
        batch_size: Number of samples that are generated at once.
        audio: File format of audio clips.
        seed: Seed of the samples' noise, of the draws and of the sides.
    """

    output: str
    models: dict[str, ComparedModel] = field(default_factory=dict)
    prompts: str | None = None
    samples: str | list[str] | None = None
    group_size: int = 2
    comparisons_per_prompt: int = 1
    batch_size: int = 8
    audio: AudioFormat = "wav"
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "comparisons_per_prompt", "batch_size")
        if self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 samples to compare, not {self.group_size}")
        if bool(self.models) == (self.samples is not None):
            raise ValueError("nothing to compare: set models and prompts, or samples")
        if bool(self.models) != (self.prompts is not None):
            raise ValueError("models and prompts belong together: set both, or only samples")


@dataclass(frozen=True)
class _Sample:
    """A sample of a comparison: its prompt, the model that makes it, and its seed."""

    prompt: Prompt
    model: str
    seed: int


def reward_collect_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign reward collect``: make the missing samples, and list the comparisons."""
    settings, plain = parsing.parse(RewardCollect, arguments, "reward collect")
    output, share = Path(settings.output), rank_share()
    _begin(output, {name: value for name, value in plain.items() if name != "output"})
    if settings.samples is not None:
        folders = [settings.samples] if isinstance(settings.samples, str) else settings.samples
        comparisons, source = list(_of_folders(settings, folders, output)), ", ".join(folders)
    else:
        planned = _planned(settings)
        for name in settings.models:
            _generate(context, settings, name, planned, output, share)
        files = _files(output)
        if missing := set(range(len(planned))) - files.keys():
            print(f"{len(missing)} of {len(planned)} samples are left to other processes, the last of which lists them")
            return 0
        comparisons, source = list(_grouped(settings, planned, files)), str(settings.prompts)
    distinct = [one for one in comparisons if len({sample.digest() for sample in one.samples}) == len(one.samples)]
    if equal := len(comparisons) - len(distinct):
        print(f"left out: {equal} of {len(comparisons)} comparisons, whose samples are equal")
    if not distinct:
        raise ValueError(f"{source} gave no comparison: each needs {settings.group_size} different samples of a prompt")
    sample_rate(distinct)  # raises where they differ
    lines = [json.dumps(one.as_dict(output), ensure_ascii=False) + "\n" for one in distinct]
    write_text(output / COMPARISONS, "".join(lines))
    shutil.rmtree(output / ".part", ignore_errors=True)
    prompts = {one.prompt.text for one in distinct}
    print(f"comparisons: {output / COMPARISONS}, {len(distinct)} comparisons of {len(prompts)} prompts")
    return 0


def _begin(output: Path, settings: dict[str, object]) -> None:
    """Record how the samples are collected. Raises ValueError for a folder with samples from other settings."""
    has_record = (output / COLLECTION).is_file()
    if has_record and read_json(output / COLLECTION) == settings:
        return
    if _files(output) or (output / COMPARISONS).is_file():
        how = "collected with other settings" if has_record else "made by another program"
        raise ValueError(f"{output} has samples that were {how}: choose another output")
    write_json(output / COLLECTION, settings)


def _planned(settings: RewardCollect) -> list[_Sample]:
    """List the samples, one comparison after the other, in the order in which they are shown."""
    assert settings.prompts is not None, "the models' prompts are required"
    planned = list[_Sample]()
    for prompt in {prompt.text: prompt for prompt in prompt_set(settings.prompts).prompts}.values():
        for number in range(settings.comparisons_per_prompt):
            models = _shuffled(list(settings.models), settings.seed, "models", prompt.text, number)
            for place in range(settings.group_size):
                seed = derived_seed(settings.seed, "comparison", prompt.text, number, place)
                planned.append(_Sample(prompt, models[place % len(models)], seed))
    return planned


def _shuffled(items: list[T], seed: int, *parts: int | str) -> list[T]:
    generator = torch.Generator().manual_seed(derived_seed(seed, *parts))
    return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]


def _divided(items: list[T], size: int) -> list[list[T]]:
    """Divide into consecutive lists of at most ``size``."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _files(output: Path) -> dict[int, Path]:
    """Find the samples' files by number; unfinished ones are in a hidden folder."""
    files = (path for path in output.glob("[!.]*/*") if path.stem.isdecimal())
    return {int(path.stem): path for path in files}


def _generate(
    context: CommandContext,
    settings: RewardCollect,
    name: str,
    planned: Sequence[_Sample],
    output: Path,
    share: RankShare,
) -> None:
    """Make this process's batches of a model's missing samples; the model is loaded only if there are any."""
    compared, files = settings.models[name], _files(output)
    own = [number for number, sample in enumerate(planned) if sample.model == name]
    batches = _divided(own, settings.batch_size)[share.rank :: share.world_size]
    rest = [batch for batch in batches if not all(number in files for number in batch)]
    if not rest:
        return
    progress = Progress(share.rank == 0)
    with progress.phase(f"loading {compared.model.path}"):
        pipeline = load_with_lora(context, compared.model, compared.lora)
        pipeline.encode_ahead(list(dict.fromkeys(planned[number].prompt.text for number in own)))
    grid, guidance = compared.sampling.grid(pipeline), compared.sampling.guidance_scale(pipeline)
    write, kernel = writer(pipeline.sample_rate, settings.audio), compared.sampling.kernel_on(grid)
    with progress.phase(f"sampling {name}", sum(map(len, rest))) as advance:
        for batch in rest:
            prompts, seeds = [planned[number].prompt for number in batch], [planned[number].seed for number in batch]
            (samples,) = generate(pipeline, prompts, seeds, grid, guidance, len(batch), kernel)
            if not bool(samples.isfinite().all()):
                raise ValueError(f"{name} generated a sample with non-finite values: use another dtype")
            for number, sample in zip(batch, samples, strict=True):
                (file,) = write(sample[None], output / ".part", number)
                _move(output / ".part" / file, output / file)
            advance(len(batch))


def _move(temporary: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, file)


def _grouped(settings: RewardCollect, planned: Sequence[_Sample], files: dict[int, Path]) -> Iterator[Judgment]:
    for group in _divided(list(enumerate(planned)), settings.group_size):
        samples = [JudgedSample(files[number], sample.model, sample.seed) for number, sample in group]
        yield _comparison(group[0][1].prompt, samples)


def _comparison(prompt: Prompt, samples: Sequence[JudgedSample]) -> Judgment:
    return Judgment(prompt, tuple(samples), "pair" if len(samples) == 2 else "ranking")


def _of_folders(settings: RewardCollect, folders: Sequence[str], output: Path) -> Iterator[Judgment]:
    """Copy the samples of folders, and group those of a prompt in random order, alternating between folders."""
    by_prompt: dict[str, list[tuple[Prompt, Path, str]]] = {}
    for folder in folders:
        external = external_samples(Path(folder), None, None)
        for spec, path in zip(external.specs, external.files, strict=True):
            by_prompt.setdefault(spec.prompt.text, []).append((spec.prompt, path, folder))
    if few := sum(len(samples) < settings.group_size for samples in by_prompt.values()):
        print(f"left out: {few} of {len(by_prompt)} prompts, which have fewer than {settings.group_size} samples")
    number = 0
    for text, samples in by_prompt.items():
        order, turns = [], Counter[str]()
        for sample in _shuffled(samples, settings.seed, "samples", text):
            order.append((turns[sample[2]], sample))
            turns[sample[2]] += 1
        order.sort(key=lambda one: one[0])
        for group in _divided([sample for _, sample in order], settings.group_size)[: settings.comparisons_per_prompt]:
            if len(group) < settings.group_size:
                continue
            judged = list[JudgedSample]()
            for prompt, path, folder in group:
                about = {"generator": Path(folder).name if len(folders) > 1 else None} | dict(prompt.metadata or {})
                file = output / medium_of_file(path).folder / f"{number:05d}{path.suffix.lower()}"
                (output / ".part").mkdir(exist_ok=True)
                shutil.copyfile(path, output / ".part" / file.name)
                _move(output / ".part" / file.name, file)
                judged.append(JudgedSample(file, about.get("generator"), about.get("seed")))
                number += 1
            yield _comparison(group[0][0], judged)
