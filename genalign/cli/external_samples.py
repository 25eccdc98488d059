"""Samples of another program in a folder, with their prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from genalign.evaluation.evaluate import SampleSpec, load_evaluation
from genalign.evaluation.folder import PROMPTS, EvaluationFolder
from genalign.evaluation.geneval.result_files import read_samples
from genalign.runtime.media import AUDIO_SUFFIXES, inside, read_image, read_waveform
from genalign.runtime.prompt_files import read_listing
from genalign.types import Prompt, PromptSet
from genalign.worlds.registry import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExternalSamples:
    """Samples on disk: their specs and files, and how to read a file; ``sample_rate`` is None for images."""

    specs: Sequence[SampleSpec]
    files: Sequence[Path]
    read: Callable[[Path], Tensor]
    sample_rate: int | None


def external_samples(root: Path, prompts: PromptSet | None, world: World | None) -> ExternalSamples:
    """List the samples of a finished evaluation, of a folder with a prompts.jsonl, or in GenEval's layout.

    Args:
        root: The folder.
        prompts: Prompts with the metadata of the samples' prompts; None takes the prompts as listed.
        world: The world of the prompts, which may be of any split, and which reads the files.

    Raises:
        FileNotFoundError: The folder or a file is missing, or the folder has none of the three layouts.
        ValueError: A line is invalid, a prompt is not among the prompts, or clips differ in sample rate.
    """
    if (root / "summary.json").is_file():
        listed = _evaluated(root)
    elif next(root.glob("*/metadata.jsonl"), None):
        listed = _numbered(root)
    else:
        listed = _listed(root)
    if not listed:
        raise ValueError(f"{root} has no samples to evaluate: list at least one")
    if missing := next((path for _, path in listed if not path.is_file()), None):
        raise FileNotFoundError(f"{missing}, which {root} lists, is missing: add the file, or remove its line")
    look_up = _look_up(prompts, world)
    specs = [SampleSpec(look_up(spec.prompt), spec.sample, external=True) for spec, _ in listed]
    files = [path for _, path in listed]
    if world:
        return ExternalSamples(specs, files, world.read, world.sample_rate)
    if files[0].suffix.lower() not in AUDIO_SUFFIXES:
        return ExternalSamples(specs, files, read_image, None)
    rate = read_waveform(files[0]).sample_rate
    return ExternalSamples(specs, files, lambda path: _waveform(path, rate), rate)


def _evaluated(root: Path) -> list[tuple[SampleSpec, Path]]:
    """List the samples of a finished evaluation, for example to score them with other rewards."""
    folder, records = EvaluationFolder(root), load_evaluation(root).records
    prompts = folder.prompts() if (root / PROMPTS).is_file() else {}
    if any(record.image is None for record in records):
        raise ValueError(f"the samples of {root} were not saved: evaluate the model again")
    return [
        (SampleSpec(prompts.get((r.task, r.prompt), Prompt(r.prompt)), r.sample), root / str(r.image)) for r in records
    ]


def _listed(root: Path) -> list[tuple[SampleSpec, Path]]:
    """List the samples of prompts.jsonl; those of one prompt are numbered in file order."""
    counts: dict[tuple[str, str], int] = {}
    listed = []
    for name, prompt in read_listing(root).items():
        number = counts.setdefault((prompt.task, prompt.text), 0)
        counts[prompt.task, prompt.text] += 1
        listed.append((SampleSpec(prompt, number), inside(root, name)))
    files = {path for _, path in listed}
    suffixes = {path.suffix for path in files}
    others = [path for path in root.rglob("*") if path.suffix in suffixes and path not in files]
    if others:
        logger.warning(
            "%d files of %s are not in its prompts.jsonl, the first of them %s", len(others), root, others[0]
        )
    return listed


def _numbered(root: Path) -> list[tuple[SampleSpec, Path]]:
    """List the images in GenEval's layout; a file's number is the sample's number."""
    listed: list[tuple[SampleSpec, Path]] = []
    folders: dict[tuple[str, str], Path] = {}
    for sample in read_samples(root):
        prompt = Prompt(sample.metadata["prompt"], sample.metadata)
        folder = folders.setdefault((prompt.task, prompt.text), sample.path.parent)
        if folder != sample.path.parent:
            raise ValueError(f"{folder} and {sample.path.parent} have the same prompt: put its images into one folder")
        listed.append((SampleSpec(prompt, sample.number), sample.path))
    return listed


def _look_up(prompts: PromptSet | None, world: World | None) -> Callable[[Prompt], Prompt]:
    """Return a function that finds the prompt of a text with its metadata, and raises ValueError if there is none."""
    if world:
        return lambda prompt: world.prompt(prompt.text)
    if prompts is None:
        return lambda prompt: prompt
    name, by_text = prompts.name, {prompt.text: prompt for prompt in prompts.prompts}

    def look_up(prompt: Prompt) -> Prompt:
        if prompt.text not in by_text:
            raise ValueError(f"{prompt.text!r} is not among the prompts of {name}: list only samples of these")
        return by_text[prompt.text]

    return look_up


def _waveform(path: Path, sample_rate: int) -> Tensor:
    clip = read_waveform(path)
    if clip.sample_rate != sample_rate:
        raise ValueError(
            f"{path} is at {clip.sample_rate} Hz, but the first clip is at {sample_rate} Hz: convert one of them"
        )
    return clip.waveform
