"""``genalign steer``, ``genalign prices`` and ``genalign train-noise-aware``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from genalign.cli import config, parsing
from genalign.cli.context import CommandContext, load_with_lora, named_rewards, prompt_set, rank_share, require_rate
from genalign.cli.family_defaults import with_family_defaults
from genalign.diffusion.noise import derived_seed
from genalign.evaluation.report import write_search
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import write_json
from genalign.runtime.media import writer
from genalign.runtime.progress import Progress
from genalign.scoring.budget import measure_prices
from genalign.search.engine import SearchRun
from genalign.search.folder import SearchFolder
from genalign.search.noise_aware import (
    HasDecoder,
    NoiseAware,
    PreviewDataset,
    RewardIdentity,
    ScorerLevel,
    distill,
    record_previews,
    train_decoder,
    validate,
)
from genalign.search.results import SearchResult
from genalign.search.run_search import SearchSetup
from genalign.types import Pipeline, PromptSet


def steer_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign steer``: search the best sample of every prompt.

    Finished prompts are kept, so that the same command resumes. Processes started by torchrun or accelerate share the
    prompts.
    """
    settings, plain = parsing.parse(config.Steer, gathered(arguments, "prompt"), "steer")
    source = PromptSet.of(settings.prompt) if settings.prompt else prompt_set(settings.prompts)
    prompts = source.prompts[: settings.limit]
    folder, plain = SearchFolder(Path(settings.output)), {**plain, "limit": None}
    share = rank_share()
    progress = Progress(enabled=share.rank == 0)
    with progress.phase("loading"):
        pipeline, rewards = load_with_lora(context, settings.model, settings.lora), named_rewards(settings.rewards)
    plain = with_family_defaults(plain, pipeline, {"sampling": settings.sampling})
    resuming = folder.holds(plain)
    require_rate(settings, pipeline.sample_rate)
    pipeline.encode_ahead([prompt.text for prompt in prompts], share, progress=progress)
    write = writer(pipeline.sample_rate, settings.audio)

    setup = SearchSetup(pipeline, rewards, settings.strategy, settings.budget, settings.sampling, settings.batch_size)

    @lru_cache(1)
    def search_prompt(index: int) -> SearchResult:
        return setup.search([prompts[index]], derived_seed(settings.seed, index), progress)

    # Search the first prompt before anything is written: settings that cannot work leave no folder behind
    unfinished = [index for index in share.indices(len(prompts)) if not folder.done(index)]
    with progress.phase("searching", len(unfinished), "prompts") as advance:
        if unfinished and not resuming:
            search_prompt(unfinished[0])
        folder.begin(plain)
        for index in unfinished:
            with folder.claims.try_claim(index) as claimed:
                if claimed and not folder.done(index):
                    result = search_prompt(index)
                    folder.add(index, result, write)
                    print(f"{index + 1}/{len(prompts)}  {result}", flush=True)
            advance(1)
    _conclude(folder, len(prompts))
    return 0


def gathered(arguments: Sequence[str], name: str) -> list[str]:
    """Join every ``--name TEXT`` among the words of a command into one list of texts, as JSON."""
    texts, others, words = [], [], iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            texts.append(value if equals else next(words, ""))
        else:
            others.append(word)
    return [*others, f"--{name}={json.dumps(texts)}"] if texts else others


def _conclude(folder: SearchFolder, count: int) -> None:
    """Write the scores of all ``count`` prompts and the report, if this process is the one that finishes last."""
    if remaining := sum(not folder.done(index) for index in range(count)):
        print(
            f"{remaining} of {count} prompts are unfinished; another process may be working on them."
            " If none is, run this command again."
        )
        return
    with folder.claims.exclusive():
        folder.conclude()
        print(f"report: {write_search(folder.path)}")


def prices_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign prices``: measure the seconds per sample of each call, and write them as JSON."""
    settings, _ = parsing.parse(config.Prices, arguments, "prices")
    pipeline, rewards = load_with_lora(context, settings.model, None), named_rewards(settings.rewards)
    available = prompt_set(settings.prompts).prompts
    prompts = [available[i % len(available)] for i in range(settings.batch_size)]
    pipeline.encode_ahead([prompt.text for prompt in prompts])
    grid = settings.sampling.grid(pipeline)
    guidance = settings.sampling.guidance_scale(pipeline)
    prices = measure_prices(pipeline, rewards, prompts, grid, guidance, settings.repeats, settings.gradients)
    write_json(Path(settings.output), prices)
    for call, seconds in prices.items():
        print(f"{call:20s}{1000 * seconds:10.3f} ms per sample")
    return 0


def train_noise_aware_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign train-noise-aware``: record previews, train a student on them, validate and save it.

    The datasets of previews stay in the output folder, so that another student of the reward can be trained on them.
    """
    settings, plain = parsing.parse(config.TrainNoiseAware, arguments, "train-noise-aware")
    folder, pipeline = Path(settings.output), load_with_lora(context, settings.model, None)
    (reward,) = named_rewards(settings.rewards)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(settings.seed, "student"))
        student = settings.student(reward.function).to(settings.model.device).eval()
    write_json(folder / "config.json", plain)
    sources = [prompt_set(source) for source in (settings.prompts, settings.held_out)]
    pipeline.encode_ahead([prompt.text for source in sources for prompt in source.prompts])
    identity = RewardIdentity.of(reward.function)
    train, held_out = (
        _preview_dataset(settings, pipeline, source, folder / f"{part}-{identity.digest}.safetensors")
        for part, source in (("train", settings.prompts), ("held_out", settings.held_out))
    )
    if isinstance(student, HasDecoder):
        for loss in train_decoder(student, train, pipeline.decode, settings.distillation):
            print(f"decoder: loss {loss:.5f}", flush=True)

    # Each level from the cleanest: how well the reward itself ranks there, the training, and how well the student does
    places = reversed(range(len(train.sigmas)))
    raw = {place: validate(student, held_out, place, pipeline.decode, settings.batch_size) for place in places}
    levels = []
    for place, trained in zip(raw, distill(student, train, pipeline.decode, settings.distillation), strict=True):
        quality = validate(student, held_out, place, pipeline.decode, settings.batch_size)
        levels.append(ScorerLevel(quality, trained.weights))
        print(
            f"level {quality.sigma:.3f}: loss {trained.loss:.4f}, tau {quality.tau:.3f} (untrained"
            f" {raw[place].tau:.3f}), top quarter {quality.top:.3f}, gap {quality.gap:.4f}",
            flush=True,
        )
    scorer = NoiseAware(settings.student, student.input_kind, tuple(levels), identity)
    context.save_scorer(folder / "scorer.safetensors", scorer, student)
    print(f"scorer: {folder / 'scorer.safetensors'}")
    return 0


def _preview_dataset(settings: config.TrainNoiseAware, pipeline: Pipeline, source: str, path: Path) -> PreviewDataset:
    """Load the dataset of previews in ``path``, or record it from prompts of each task of ``source`` in turn."""
    if path.exists():
        return PreviewDataset.load(path)
    prompts = drawn_in_turn(prompt_set(source), settings.limit, settings.seed)
    dataset, rewards = None, named_rewards(settings.rewards)
    per_run = max(1, settings.batch_size // settings.count)
    grid, guidance = settings.sampling.grid(pipeline), settings.sampling.guidance_scale(pipeline)
    for first in range(0, len(prompts), per_run):
        name = f"{settings.seed}/{source}/{first}"
        batch = prompts[first : first + per_run]
        run = SearchRun(pipeline, batch, rewards, grid, guidance, settings.batch_size, name)
        part = record_previews(run, settings.count, settings.steps)
        dataset = part if dataset is None else dataset.extend(part)
        done = min(first + per_run, len(prompts))
        print(f"recorded {done}/{len(prompts)} prompts of {source}", end="\r", flush=True)
    assert dataset is not None, "a prompt set has prompts"
    dataset.save(path)
    print()
    return dataset
