"""``genalign collect --references``: samples of every prompt as files, either plain or the best of a search.

OUTPUT/images/00017.png           the samples; audio/00017.wav of clips
OUTPUT/prompts.jsonl              the file, prompt and metadata of every sample; written last
OUTPUT/.references/config.json    the settings
OUTPUT/.references/00017.jsonl    the samples of part 17, with the scores of a search; written after their files
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genalign.cli.context import (
    Checkpoint,
    CommandContext,
    load_with_lora,
    named_rewards,
    prompt_set,
    rank_share,
    require_rate,
)
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import SeededSamples
from genalign.runtime.files import Claims, write_json, write_text
from genalign.runtime.media import Writer, writer
from genalign.runtime.progress import SILENT, Progress
from genalign.scoring.score import NamedReward
from genalign.search.run_search import SearchSetup
from genalign.types import Prompt

if TYPE_CHECKING:
    from genalign.cli.collect import Collect

_LISTING = "prompts.jsonl"


@dataclass(frozen=True)
class ReferenceFolder:
    """The output folder, which the same command continues."""

    path: Path

    @property
    def state(self) -> Path:
        """The hidden folder of the settings and the finished parts, which readers of references ignore."""
        return self.path / ".references"

    def part(self, number: int) -> Path:
        """Return the lines of a part; it is finished once the file exists."""
        return self.state / f"{number:05d}.jsonl"

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write the settings, or continue a folder with the same settings.

        Raises ValueError for a folder with other contents, or with finished parts of other settings.
        """
        file = self.state / "config.json"
        with Claims(self.state / "locks").exclusive():
            if not file.is_file():
                if other := next((path for path in self.path.iterdir() if not path.name.startswith(".")), None):
                    raise ValueError(f"{self.path} holds {other.name}, not references: choose another output")
            elif json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(config)):
                return
            elif next(self.state.glob("*.jsonl"), None):
                raise ValueError(f"{self.path} holds references of other settings: choose another output")
            write_json(file, config)

    def conclude(self, parts: int) -> list[dict[str, Any]] | None:
        """List all samples in prompts.jsonl and return their rows; None while one of the ``parts`` is unfinished."""
        if not all(self.part(number).is_file() for number in range(parts)):
            return None
        lines = [self.part(number).read_text(encoding="utf-8").splitlines() for number in range(parts)]
        rows = [json.loads(line) for part in lines for line in part]
        listed = [{"file_name": row["file"], **row["metadata"], "prompt": row["prompt"]} for row in rows]
        with Claims(self.state / "locks").exclusive():
            write_text(self.path / _LISTING, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed))
        return rows


def collect_references(context: CommandContext, settings: Collect, plain: Mapping[str, Any]) -> int:
    """Write the references that are missing, list them, and print how many there are.

    Args:
        context: The pipelines and rewards.
        settings: The settings of the command.
        plain: The settings as plain JSON.

    Raises:
        ValueError: The folder holds something else, or a sample is not finite.
    """
    folder, share = ReferenceFolder(Path(settings.output)), rank_share()
    progress, rewards = Progress(share.rank == 0), named_rewards(settings.rewards)
    with progress.phase(f"loading {settings.model.path}"):
        pipeline = load_with_lora(context, settings.model, settings.lora)
    require_rate(settings, pipeline.sample_rate)
    prompts = dict[str, Prompt]()
    for prompt in prompt_set(str(settings.prompts)).prompts:
        prompts.setdefault(prompt.text, prompt)
    pipeline.encode_ahead(prompts, share)
    jobs = [(prompt, number) for prompt in prompts.values() for number in range(settings.samples_per_prompt)]
    size = settings.batch_size if settings.strategy is None else 1
    parts = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    folder.begin({name: value for name, value in plain.items() if name != "output"})

    write, first = writer(pipeline.sample_rate, settings.audio), 0
    with progress.phase("collecting", len(jobs)) as advance:
        for number, part in enumerate(parts):
            if number % share.world_size == share.rank and not folder.part(number).is_file():
                rows = _written(pipeline, settings, rewards, part, folder.path, first, write)
                write_text(folder.part(number), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            first += len(part)
            advance(len(part))
    listed = folder.conclude(len(parts))
    if listed is None:
        print("other processes are working on the remaining references; if none is running, run this command again")
        return 0
    print(f"references: {settings.output}, {len(listed)} samples of {len(prompts)} prompts{_scores_text(listed)}")
    return 0


def _written(
    pipeline: Checkpoint,
    settings: Collect,
    rewards: Sequence[NamedReward],
    part: Sequence[tuple[Prompt, int]],
    output: Path,
    first: int,
    write: Writer,
) -> list[dict[str, Any]]:
    """Sample or search a part, write its files from number ``first``, and return a row of JSON for each."""
    seeds = [derived_seed(settings.seed, "reference", prompt.text, number) for prompt, number in part]
    scores: list[dict[str, Any]] = [{} for _ in part]
    if settings.strategy is None:
        grid, guidance = settings.sampling.grid(pipeline), settings.sampling.guidance_scale(pipeline)
        kernel, texts = settings.sampling.kernel_on(grid), [prompt.text for prompt, _ in part]
        samples = SeededSamples(pipeline, texts, seeds, grid, guidance, len(part), kernel).batch(0)
    else:
        setup = SearchSetup(
            pipeline, rewards, settings.strategy, settings.budget, settings.sampling, settings.batch_size
        )
        search = setup.search([prompt for prompt, _ in part], seeds[0], SILENT)
        samples = search.samples
        for row, result in zip(scores, search.per_prompt, strict=True):
            row["scores"] = _named(rewards, result.scores[0])
            row["plain"] = None if result.plain is None else _named(rewards, result.plain.scores)
    for (prompt, _), finite in zip(part, samples.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            raise ValueError(f"a sample of {prompt.text!r} is not finite: use another dtype or fewer steps")
    files = write(samples, output, first)
    return [
        {"file": file, "prompt": prompt.text, "metadata": dict(prompt.metadata or {}), **own}
        for file, (prompt, _), own in zip(files, part, scores, strict=True)
    ]


def _named(rewards: Sequence[NamedReward], scores: torch.Tensor) -> dict[str, float | None]:
    values = [value if math.isfinite(value) else None for value in scores.tolist()]
    return {reward.name: value for reward, value in zip(rewards, values, strict=True)}


def _scores_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the mean scores of searched references, and their gain over plain samples."""
    text = ""
    for name in rows[0].get("scores", {}):
        scores = [row["scores"][name] for row in rows if row["scores"][name] is not None]
        gains = [
            row["scores"][name] - row["plain"][name]
            for row in rows
            if row["plain"] and None not in (row["scores"][name], row["plain"][name])
        ]
        mean = sum(scores) / len(scores) if scores else math.nan
        gain = f" ({sum(gains) / len(gains):+.3f} over plain sampling)" if gains else ""
        text += f"; {name} {mean:.3f}{gain}"
    return text
