"""``genalign steer``, ``genalign prices`` and ``genalign train-noise-aware``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any

from genalign.cli import config
from genalign.cli.context import CommandContext, adapted, named_rewards, own_share, prompt_set, require_rate
from genalign.diffusion.noise import derived_seed
from genalign.evaluation.report import write_search
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import write_json
from genalign.runtime.media import writer
from genalign.scoring.budget import Ledger, Metered, measure_prices, metered_rewards
from genalign.search.engine import SearchRun
from genalign.search.folder import SearchFolder
from genalign.search.noise_aware import (
    Decoding,
    Look,
    NoiseAware,
    Recording,
    as_they_are,
    distil,
    learn_to_decode,
    record,
    validate,
)
from genalign.search.run_search import SearchResult, search
from genalign.types import Pipeline, Prompt


def steer_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign steer``; finished prompts are kept, so that it goes on where it stopped, and several processes, as
    torchrun or accelerate start them, share the prompts.
    """
    settings, plain = config.parse(config.Steer, arguments, "steer")
    asked = prompt_set(settings.prompts).prompts[: settings.limit]
    folder, plain = SearchFolder(Path(settings.output)), {**plain, "limit": None}
    folder.begun(plain)
    _search_share(context, settings, plain, folder, asked)
    if left := sum(not folder.done(index) for index in range(len(asked))):
        print(f"{left} of {len(asked)} prompts are left to other processes; if there are none, start it again")
        return 0
    with folder.claims.exclusive():
        folder.conclude()
        print(f"report: {write_search(folder.path)}")
    return 0


def _search_share(
    context: CommandContext,
    settings: config.Steer,
    plain: Mapping[str, Any],
    folder: SearchFolder,
    asked: Sequence[Prompt],
) -> None:
    """Every prompt of this process's share that is not finished, but for those that another process holds."""
    share, pipeline = own_share(os.environ), adapted(context, settings.model, settings.lora)
    rewards, strategy, budget = named_rewards(settings.rewards), settings.strategy, settings.budget
    require_rate(settings, pipeline.sample_rate)

    def find(index: int) -> SearchResult:
        seed = derived_seed(settings.seed, index)
        sampling, size = settings.sampling, settings.batch_size
        return search(pipeline, [asked[index]], rewards, strategy, budget, sampling, size, seed)

    names = [reward.name for reward in rewards]
    write = writer(pipeline.sample_rate, settings.audio)
    left = list(filterfalse(folder.done, share.indices(len(asked))))
    early = find(left[0]) if left and not folder.begun(plain) else None  # what cannot be made leaves nothing behind
    folder.begin(plain)
    for index in left:
        with folder.claims.try_claim(index) as held:
            if not held or folder.done(index):
                continue
            result = early if early and index == left[0] else find(index)
            folder.add(index, asked[index].text, names, result, write)
        found = "  ".join(f"{name} {score:.4g}" for name, score in zip(names, result.scores[0].tolist(), strict=True))
        print(f"{index + 1}/{len(asked)}  {found}  {result.ledger.nfe} NFE  {asked[index].text}", flush=True)


def prices_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign prices``."""
    settings, _ = config.parse(config.Prices, arguments, "prices")
    pipeline = context.load(settings.model)
    rewards = named_rewards(settings.rewards)
    known = prompt_set(settings.prompts).prompts
    prompts = [known[i % len(known)] for i in range(settings.batch_size)]
    grid = settings.sampling.grid(pipeline)
    prices = measure_prices(pipeline, rewards, prompts, grid, settings.sampling.guidance, settings.repeats)
    write_json(Path(settings.output), prices)
    for call, seconds in prices.items():
        print(f"{call:20s}{1000 * seconds:10.3f} ms a sample")
    return 0


def train_noise_aware_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign train-noise-aware``; recordings are kept, so that another student can be trained on them."""
    settings, plain = config.parse(config.TrainNoiseAware, arguments, "train-noise-aware")
    folder, pipeline = Path(settings.output), context.load(settings.model)
    write_json(folder / "config.json", plain)
    student = settings.student.to(settings.model.device)
    look: Look = pipeline.decode if student.on == "samples" else as_they_are
    train = _recorded(settings, pipeline, settings.prompts, folder / "train.safetensors")
    held_out = _recorded(settings, pipeline, settings.held_out, folder / "held_out.safetensors")
    if isinstance(student, Decoding):
        for loss in learn_to_decode(student, train, pipeline.decode, settings.distillation):
            print(f"decoder  loss {loss:.5f}", flush=True)
    for levels, loss in distil(student, train, look, settings.distillation):
        print(f"{levels}/{len(train.sigmas)} levels  loss {loss:.4f}", flush=True)
    qualities = validate(student.eval(), held_out, look, settings.batch_size)
    for found in qualities:
        print(f"level {found.sigma:.3f}  tau {found.tau:.3f}  top quarter {found.top:.3f}  gap {found.gap:.4f}")
    mean, std = float(train.clean.mean()), float(train.clean.std())
    context.save_scorer(folder / "scorer.safetensors", NoiseAware(student, tuple(qualities), mean, std))
    print(f"scorer: {folder / 'scorer.safetensors'}")
    return 0


def _recorded(settings: config.TrainNoiseAware, pipeline: Pipeline, source: str, path: Path) -> Recording:
    """Trajectories of prompts that are drawn by task, from the file where there is one."""
    if path.exists():
        return Recording.load(path)
    chosen = drawn_in_turn(prompt_set(source), settings.limit, settings.seed)
    ledger, made = Ledger(), None
    rewards = metered_rewards(named_rewards(settings.rewards), ledger)
    together = max(1, settings.batch_size // settings.count)
    for first in range(0, len(chosen), together):
        some, name = chosen[first : first + together], f"{settings.seed}/{source}/{first}"
        grid, guidance = settings.sampling.grid(pipeline), settings.sampling.guidance
        run = SearchRun(Metered(pipeline, ledger), some, rewards, grid, guidance, settings.batch_size, name)
        part = record(run, settings.count, settings.steps)
        made = part if made is None else made.joined(part)
        print(f"recorded {min(first + together, len(chosen))}/{len(chosen)} prompts of {source}", end="\r", flush=True)
    assert made is not None, "a prompt set has prompts"
    made.save(path)
    print()
    return made
