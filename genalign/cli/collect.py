"""``genalign collect``: a pool of samples on disk, from a model, a folder of samples, or a file of preferences.

With ``references`` it writes a folder of reference samples instead of a pool (``collect_references``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop, resize

from genalign.cli import parsing
from genalign.cli.collect_references import collect_references
from genalign.cli.context import Checkpoint, CommandContext, load_with_lora, named_rewards, prompt_set, rank_share
from genalign.cli.external_samples import external_samples
from genalign.cli.generation_settings import RewardChoice, require_positive, require_rewards
from genalign.cli.model_settings import Model
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import RolloutInputs, distinct_inputs, rollout, rows_are_finite
from genalign.diffusion.sampling import Sampling
from genalign.reward_learning.preference_formats import read_preferences
from genalign.runtime.media import AudioFormat
from genalign.runtime.progress import Progress
from genalign.scoring.budget import Budget
from genalign.scoring.score import NamedReward
from genalign.search.strategy import Strategy
from genalign.training.pools import INFO, PoolInfo, PoolSample, part_files, write_part
from genalign.training.sampler import score_finite
from genalign.types import Prompt

PREFERENCE = "preference"
"""The score of a file of preferences."""

_OF_REFERENCES = ("references", "strategy", "budget", "audio")  # settings that a pool does not have
_NO_SCORES = "rewards is empty: samples without scores cannot be trained on; name at least one reward"

Part = Callable[[], tuple[Tensor, list[PoolSample]]]
"""Produces the latents (n, ...) and the samples of a part."""


Listed = tuple[Prompt, str | None, dict[str, float], Callable[[], Tensor]]
"""A sample on disk: its prompt, group and scores, and the function that reads it."""


@dataclass(frozen=True, kw_only=True)
class Collect:
    """A pool of samples to learn from with ``training.data``: those of a model, or existing ones.

    With ``references`` it is a folder of files with their prompts, for rewards that compare with references of the same
    prompt: rewards.backbones.reference_images.ReferencesByPrompt.read. Run the command again to resume it; processes
    that a launcher starts share the parts.

    Args:
        output: Folder of the pool or of the references.
        model: The model whose samples are collected, or whose autoencoder encodes the others.
        lora: An adapter of the model.
        prompts: Prompts of the model's samples: a file, a dataset, or a split of a world.
        samples: A folder of another program's samples with a prompts.jsonl, instead of the model's; the scores of a
            line, as in {"file_name": "1.png", "prompt": "a circle", "scores": {"human": 4.5}}, are kept.
        preferences: Pairs and rankings, instead of the model's samples: genalign's own folder or .jsonl file, or a
            .json, .jsonl or .parquet file in the layout of Pick-a-Pic, HPD, ImageRewardDB or RewardBench; their score
            is named preference.
        rewards: Named rewards, whose scores are kept, or by which the strategy of references selects.
        sampling: Sampling settings of the model's samples.
        samples_per_prompt: Number of samples of each prompt.
        batch_size: Number of samples per part, which are generated at once; for a strategy, the largest number per
            call.
        seed: Seed of the samples' noise.
        references: Write files with their prompts instead of a pool; --references is short for --references true.
        strategy: Search whose best sample is a reference, as in genalign.BestOfN; null samples without a search.
        budget: Limit of NFE, cost or seconds for each reference of the strategy.
        audio: File format of references that are clips.
    """

    output: str
    model: Model
    lora: str | None = None
    prompts: str | None = None
    samples: str | None = None
    preferences: str | None = None
    rewards: dict[str, RewardChoice] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=lambda: Sampling(20))
    samples_per_prompt: int = 8
    batch_size: int = 8
    seed: int = 0
    references: bool = False
    strategy: Strategy | None = None
    budget: Budget | None = None
    audio: AudioFormat = "wav"

    def __post_init__(self) -> None:
        require_positive(self, "samples_per_prompt", "batch_size")
        if self.references:
            self._require_references()
            return
        if self.strategy is not None or self.budget is not None:
            raise ValueError("strategy and budget are for references: set references to true, or leave them out")
        sources = [name for name in ("prompts", "samples", "preferences") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(
                f"give exactly one source of samples (prompts, samples or preferences), not"
                f" {' and '.join(sources) or 'none'}"
            )
        if not self.rewards and self.prompts is not None:
            raise ValueError(_NO_SCORES)

    def _require_references(self) -> None:
        """Raise ValueError for settings that do not go together for references."""
        if self.prompts is None or self.samples is not None or self.preferences is not None:
            raise ValueError("references are samples of the model: give prompts instead of samples or preferences")
        if self.strategy is None and (self.rewards or self.budget is not None):
            raise ValueError(
                "rewards and budget have no effect on references without a strategy: give one, as in genalign.BestOfN,"
                " or leave them out"
            )
        if self.strategy is not None:
            require_rewards(self.rewards)


def collect_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign collect``: write the missing parts of the pool or the references, and print the folder."""
    settings, plain = parsing.parse(Collect, _with_values(arguments), "collect")
    if settings.references:
        return collect_references(context, settings, plain)
    output, share = Path(settings.output), rank_share()
    progress, rewards = Progress(share.rank == 0), named_rewards(settings.rewards)
    with progress.phase(f"loading {settings.model.path}"):
        pipeline = load_with_lora(context, settings.model, settings.lora)
    listed = _listed(settings)
    recorded = [name for _, _, scores, _ in listed for name in scores]
    names = tuple(dict.fromkeys([*recorded, *(reward.name for reward in rewards)]))
    if not names:
        raise ValueError(_NO_SCORES)
    origin = {name: value for name, value in plain.items() if name not in ("output", *_OF_REFERENCES)}
    denoiser = pipeline.fingerprint if settings.prompts is not None else None
    info = PoolInfo(pipeline.autoencoder, tuple(pipeline.latent_shape), names, origin, denoiser)
    _begin(output, info)
    parts, count = _parts(pipeline, settings, rewards, listed)
    with progress.phase("collecting", count) as advance:
        for number, (size, part) in enumerate(parts):
            if number % share.world_size == share.rank and not part_files(output, number)[1].is_file():
                write_part(output, number, *part())
            advance(size)
    print(f"pool: {output}, {count} samples")
    return 0


def _with_values(arguments: Sequence[str]) -> list[str]:
    """Write --references without a value as --references=true."""
    following = [*arguments[1:], "--"]
    return [
        "--references=true" if word == "--references" and after.startswith("--") else word
        for word, after in zip(arguments, following, strict=True)
    ]


def _begin(output: Path, info: PoolInfo) -> None:
    """Write the pool's description. Raises ValueError for a folder with a pool of other settings."""
    if (output / INFO).is_file():
        earlier = PoolInfo.read(output)
        if earlier != info:
            raise ValueError(f"{output} is a pool that was collected with other settings: choose another output")
        return
    output.mkdir(parents=True, exist_ok=True)
    info.write(output)


def _parts(
    pipeline: Checkpoint, settings: Collect, rewards: Sequence[NamedReward], listed: Sequence[Listed]
) -> tuple[Iterator[tuple[int, Part]], int]:
    """The size and the maker of each part, in order, and the total number of samples: the model's, or those listed."""
    if settings.prompts is not None:
        prompts = prompt_set(settings.prompts).prompts
        pipeline.encode_ahead([prompt.text for prompt in prompts], rank_share())
        jobs = [(prompt, number) for prompt in prompts for number in range(settings.samples_per_prompt)]
        own = (
            (len(batch), partial(_generated, pipeline, settings, rewards, batch))
            for batch in _batched(jobs, settings.batch_size)
        )
        return own, len(jobs)
    read = (
        (len(batch), partial(_encoded, pipeline, rewards, batch)) for batch in _batched(listed, settings.batch_size)
    )
    return read, len(listed)


def _listed(settings: Collect) -> list[Listed]:
    """The samples on disk to collect, with their scores; none if the model makes them."""
    if settings.preferences is not None:
        return _compared(Path(settings.preferences))
    if settings.samples is None:
        return []
    files = external_samples(Path(settings.samples), None, None)
    return [
        (spec.prompt, None, _recorded_scores(spec.prompt), partial(files.read, path))
        for spec, path in zip(files.specs, files.files, strict=True)
    ]


def _recorded_scores(prompt: Prompt) -> dict[str, float]:
    """The scores in a line of prompts.jsonl. Raises ValueError for anything but numbers."""
    scores = (prompt.metadata or {}).get("scores", {})
    if not isinstance(scores, Mapping) or not all(isinstance(score, int | float) for score in scores.values()):
        raise ValueError(f"the scores of a sample of {prompt.text!r} must map names to numbers, not {scores}")
    return {str(name): float(score) for name, score in scores.items()}


def _compared(path: Path) -> list[Listed]:
    """The samples of the pairs and rankings of ``path``, one group per judgment; other judgments are left out.

    Raises ValueError where there are none.
    """
    judgments, listed = read_preferences(path), list[Listed]()
    compared = [judgment for judgment in judgments if judgment.kind in ("pair", "ranking")]
    if not compared:
        raise ValueError(f"{path} contains only ratings and labels: give pairs or rankings, or train a reward on them")
    if rest := len(judgments) - len(compared):
        print(f"left out: {rest} of the {len(judgments)} judgments of {path}, which are ratings or labels")
    for number, judgment in enumerate(compared, start=1):
        users = {"user": judgment.annotator} if judgment.annotator else {}
        prompt = Prompt(judgment.prompt.text, {**(judgment.prompt.metadata or {}), **users} or None)
        for sample, score in zip(judgment.samples, judgment.overall(), strict=True):
            listed.append((prompt, str(number), {PREFERENCE: score}, sample.read))
    return listed


def _batched(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Divide into consecutive lists of at most ``size``."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


@torch.no_grad()
def _generated(
    pipeline: Checkpoint, settings: Collect, rewards: Sequence[NamedReward], jobs: Sequence[tuple[Prompt, int]]
) -> tuple[Tensor, list[PoolSample]]:
    """Sample a part, one seed for each prompt and number; decode and score it."""
    prompts = [prompt for prompt, _ in jobs]
    different, rows = distinct_inputs(prompts)
    seeds = tuple(derived_seed(settings.seed, "pool", prompt.text, number) for prompt, number in jobs)
    grid, guidance = settings.sampling.grid(pipeline), settings.sampling.guidance_scale(pipeline)
    inputs = RolloutInputs(pipeline.encode(different), rows, seeds, seeds)
    kernels = [settings.sampling.kernel_on(grid)] * len(grid)
    latents = rollout(pipeline, inputs, grid, kernels, guidance).final
    return latents, _scored(pipeline.decode(latents), prompts, rewards)


@torch.no_grad()
def _encoded(
    pipeline: Checkpoint, rewards: Sequence[NamedReward], listed: Sequence[Listed]
) -> tuple[Tensor, list[PoolSample]]:
    """Read, fit to the model's size, encode and score a part."""
    samples = torch.stack([fitted(read(), pipeline.sample_shape) for *_, read in listed])
    latents = pipeline.encode_samples(samples)
    scored = _scored(samples, [prompt for prompt, *_ in listed], rewards)
    return latents, [
        PoolSample(sample.prompt, {**scores, **sample.scores}, group)
        for sample, (_, group, scores, _) in zip(scored, listed, strict=True)
    ]


def fitted(sample: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize and center-crop an image (3, H, W) to a size; a clip must have that size already."""
    if tuple(sample.shape) == tuple(shape):
        return sample
    if sample.ndim != 3:
        raise ValueError(f"a clip has shape {tuple(sample.shape)}, but the model's is {tuple(shape)}: cut it to that")
    _, height, width = shape
    factor = max(height / sample.shape[1], width / sample.shape[2])
    larger = [max(height, round(sample.shape[1] * factor)), max(width, round(sample.shape[2] * factor))]
    cut: Tensor = center_crop(resize(sample, larger, antialias=True), [height, width])
    return cut.clamp(0, 1)


def _scored(samples: Tensor, prompts: Sequence[Prompt], rewards: Sequence[NamedReward]) -> list[PoolSample]:
    """Score samples (n, ...) by every reward; NaN for non-finite samples."""
    finite = rows_are_finite(samples)
    table = score_finite(rewards, samples, prompts, finite).tolist() if rewards else [[] for _ in prompts]
    names = [reward.name for reward in rewards]
    return [
        PoolSample(prompt, dict(zip(names, scores, strict=True))) for prompt, scores in zip(prompts, table, strict=True)
    ]
