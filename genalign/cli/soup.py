"""``genalign soup``: weighted sums of LoRAs of one base model, and the front between two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from genalign.cli import parsing
from genalign.cli.context import CommandContext
from genalign.cli.evaluate import prompts_command
from genalign.cli.export import trained_weights
from genalign.cli.lora_formats import TrainedAdapter
from genalign.cli.model_card import base_of
from genalign.diffusion.lora import DIFFUSERS_WEIGHTS, adapter_file, sort_metadata
from genalign.diffusion.lora_soup import Factors, lora_soup
from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.report.front_page import FrontPoint, write_front
from genalign.runtime.files import apply_umask, write_json

_A, _B = ".lora_A.weight", ".lora_B.weight"
RECORD = "soup.json"


@dataclass(frozen=True)
class Soup:
    """A weighted sum of the LoRAs of several runs from one base model, or the front between two of them.

    With weights, one adapter is written. With ``evaluate``, a series of mixtures of two adapters is evaluated, and
    front.html plots their scores.

    Args:
        adapters: The adapters: folders of runs, lora/ folders or .safetensors files.
        output: Folder to write.
        weights: The weight of each adapter; they need not add up to 1.
        rank: Truncate the sum to this rank, by its largest singular values; null adds up the ranks, and is exact.
        evaluate: A configuration of ``genalign evaluate prompts``, with which mixtures of two adapters are evaluated.
        points: The number of mixtures, including the two adapters themselves.
    """

    adapters: list[str]
    output: str
    weights: list[float] | None = None
    rank: int | None = None
    evaluate: str | None = None
    points: int = 5

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.evaluate is None):
            raise ValueError("give weights for one mixture, or evaluate: CONFIG for the front between two adapters")
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(
                f"give one weight for each adapter: there are {len(self.adapters)} adapters and {len(self.weights)}"
                " weights"
            )
        if self.evaluate is not None and (len(self.adapters) != 2 or self.points < 2):
            raise ValueError("a front is between two adapters, with at least 2 points")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}; null adds up the ranks")


def soup_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign soup``: write one mixture, or evaluate several and plot their front."""
    settings, _ = parsing.parse(Soup, arguments, "soup")
    output, sources = Path(settings.output), [Path(adapter) for adapter in settings.adapters]
    adapters = _read(sources)
    if settings.weights is not None:
        if output.exists():
            raise FileExistsError(f"{output} exists: choose another output, or remove it")
        _write(output, adapters, settings.adapters, settings.weights, settings.rank)
        print(f"lora: {output}")
        return 0
    points = []
    for number in range(settings.points):
        share = number / (settings.points - 1)
        folder = output / f"share-{share:.3f}"
        lora, weights = folder / "lora", [1 - share, share]
        if not (lora / RECORD).is_file():
            _write(lora, adapters, settings.adapters, weights, settings.rank)
        elif json.loads((lora / RECORD).read_text()) != _record(settings.adapters, weights, settings.rank):
            raise ValueError(f"{lora} has another mixture, see its {RECORD}: choose another output, or remove it")
        where = ["--lora", str(lora), "--output", str(folder / "evaluation")]
        if status := prompts_command(context, ["--config", str(settings.evaluate), *where]):
            return status
        points.append(FrontPoint(share, load_evaluation(folder / "evaluation").overall))
    write_json(output / "front.json", [point.as_dict() for point in points])
    print(f"front: {write_front(output / 'front.html', points, [source.name for source in sources])}")
    return 0


def _record(names: Sequence[str], weights: Sequence[float], rank: int | None) -> dict[str, Any]:
    """The record of a mixture in its folder."""
    return {"adapters": list(names), "weights": list(weights), "cut_to_rank": rank}


def _read(sources: Sequence[Path]) -> list[TrainedAdapter]:
    """Read the adapters of runs or files.

    Raises ValueError for runs with different base checkpoints; plain files do not record theirs.
    """
    runs = {source: base_of(source).name for source in sources if (source / "config.json").is_file()}
    if len(set(runs.values())) > 1:
        named = ", ".join(f"{source} of {base}" for source, base in runs.items())
        raise ValueError(f"the adapters have different base models ({named}): mix adapters of the same one")
    paths = [trained_weights(source, None).path if source in runs else adapter_file(source) for source in sources]
    return [TrainedAdapter.read(path) for path in paths]


def _write(
    output: Path, adapters: Sequence[TrainedAdapter], names: Sequence[str], weights: Sequence[float], rank: int | None
) -> None:
    """Write a mixture as an adapter of diffusers, with the scale in its second matrices."""
    components = {adapter.component for adapter in adapters}
    if len(components) > 1:
        raise ValueError(f"the adapters are of different networks ({', '.join(sorted(components))}): mix those of one")
    factors = list[dict[str, Factors]]()
    for adapter in adapters:
        matrices = {name.removeprefix(f"{adapter.component}."): tensor for name, tensor in adapter.folded().items()}
        factors.append({layer: (matrices[f"{layer}{_A}"], matrices[f"{layer}{_B}"]) for layer in adapter.alphas})
    mixed = lora_soup(factors, weights, rank)
    component, common = components.pop(), len(next(iter(mixed.values()))[0])
    tensors = {
        f"{component}.{layer}{end}": tensor.contiguous()
        for layer, pair in mixed.items()
        for end, tensor in zip((_A, _B), pair, strict=True)
    }
    own = {"r": common, "lora_alpha": common, "target_modules": sorted(mixed)}
    header = json.dumps({f"{component}.{name}": value for name, value in own.items()}, sort_keys=True)
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / DIFFUSERS_WEIGHTS, metadata={"format": "pt", "lora_adapter_metadata": header})
    sort_metadata(output / DIFFUSERS_WEIGHTS, _student(adapters))
    apply_umask(output)
    write_json(output / RECORD, _record(names, weights, rank))


def _student(adapters: Sequence[TrainedAdapter]) -> Mapping[str, str]:
    """The few-step student's metadata in the headers of the adapters. Raises ValueError if they differ."""
    students = list(
        {tuple(adapter.student.items()): adapter.student for adapter in adapters if adapter.student}.values()
    )
    if len(students) > 1:
        raise ValueError("the adapters are few-step students with different guidance scales: mix those of one scale")
    return students[0] if students else {}
