"""``genalign plan``: a training run looked through before any weights are read."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from rich.console import Console
from rich.table import Table

from genalign.cli import config
from genalign.cli.context import CommandContext, prompt_set, require_rate
from genalign.cli.memory import counted as count
from genalign.cli.memory import estimate, reliefs
from genalign.cli.train import require_trackers
from genalign.evaluation.evaluate import plan as jobs
from genalign.scoring.budget import DECODE, FORWARD, Ledger
from genalign.training.dry_run import Counted
from genalign.training.memory_estimate import FORMULAS, Held, Outline, Part, seconds
from genalign.training.reward_hacking import due
from genalign.training.run import RunFolder
from genalign.training.trainer import adam
from genalign.types import Prompt, PromptSet

_WEIGHTS_OF_REWARDS = {"model", "processor", "tokenizer", "weights"}
Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan(config.Train):
    """A training configuration to be looked through: what a round and the run will do, hold and take, what is missing,
    and what training would refuse. No weights are read. ``prices`` is a file that `genalign prices` wrote.
    """

    prices: str | None = None


@dataclass
class Refusals:
    """What training would refuse, in its own words."""

    messages: list[str] = field(default_factory=list)

    def attempt(self, step: Callable[[], Found]) -> Found | None:
        """What ``step`` gives; None, and its message, where it is refused."""
        try:
            return step()
        except config.REFUSED as error:
            if str(error) not in self.messages:
                self.messages.append(str(error))
            return None


def plan_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """``genalign plan``; the exit status is 2 where training would be refused, with every reason on standard error."""
    settings, plain = config.parse(Plan, arguments, "plan")
    refusals, console = Refusals(), Console()
    refusals.attempt(lambda: RunFolder(Path(settings.output)).require_unused())
    refusals.attempt(lambda: context.require(settings.model))
    refusals.attempt(lambda: adam(settings.training))
    refusals.attempt(lambda: require_trackers(settings.trackers))
    outline = refusals.attempt(lambda: context.outline(settings.model))
    if outline is not None:
        refusals.attempt(lambda: require_rate(settings, outline.pipeline.sample_rate))
    counted = refusals.attempt(lambda: count(settings, outline, _prompts(settings, refusals)))
    if counted is not None:
        watched = refusals.attempt(lambda: _watched(settings, counted.rounds)) or {}
        console.print(_geometry(settings, counted), _calls(counted, watched))
        _print_time(console, settings, counted, watched, refusals)
    if outline is not None and counted is not None:
        refusals.attempt(lambda: _print_memory(console, context, settings, outline, counted))
    _print_weights_of_rewards(console, plain["rewards"], refusals)
    for message in refusals.messages:
        print(f"error: {message}", file=sys.stderr)
    return 2 if refusals.messages else 0


def _prompts(settings: Plan, refusals: Refusals) -> PromptSet:
    """The prompts, or as many stand-ins as a round needs."""
    stand_ins = PromptSet("prompts", tuple(Prompt(str(i)) for i in range(settings.training.prompts_per_round)))
    return refusals.attempt(lambda: prompt_set(settings.prompts)) or stand_ins


def _watched(settings: Plan, rounds: int) -> dict[str, Ledger]:
    """What is made for evaluations beside training, by their names; none of it is in the run's own bill."""
    alarms = _looks(rounds, settings.reward_hacking.every)
    asked: list[tuple[str, config.HeldOut | config.Hacking | config.BeforeAfter | None, int]] = [
        ("held_out", settings.held_out, _looks(rounds, settings.held_out.every)),
        ("reward_hacking", settings.reward_hacking, alarms and alarms + 1),  # and one before training
        ("before_after", settings.before_after, 2),
    ]
    sampling = settings.evaluation or settings.sampling
    evaluations = sampling.num_steps * (2 if sampling.guidance > 1 else 1)
    made = {}
    for name, chosen, times in asked:
        if chosen is None or not times:
            continue
        images = times * len(jobs(prompt_set(chosen.prompts), chosen.samples_per_task, chosen.seeds))
        made[name] = Ledger()
        made[name].bill(FORWARD, images * evaluations)
        made[name].bill(DECODE, images)
    return made


def _looks(rounds: int, every: int) -> int:
    """After how many of the rounds a look is due; 0 for never."""
    return sum(due(done, every, done == rounds) for done in range(1, rounds + 1)) if every else 0


def _geometry(settings: Plan, counted: Counted) -> Table:
    chosen = settings.training
    images = chosen.prompts_per_round * chosen.group_size
    batches = images // chosen.batch_size
    table = Table("geometry", "", title=f"plan of {settings.output}", title_justify="left")
    table.add_row("images a round", f"{chosen.prompts_per_round} prompts x {chosen.group_size} = {images}")
    table.add_row(
        "batches a round", f"{batches} of {chosen.batch_size}, {batches // chosen.updates_per_round} an update"
    )
    table.add_row("optimiser steps a round", str(chosen.updates_per_round))
    table.add_row("rounds", f"{counted.rounds}{' (max_nfe)' if counted.rounds < chosen.rounds else ''}")
    table.add_row("optimiser steps", f"{counted.rounds * chosen.updates_per_round:,}")
    table.add_row("images", f"{counted.rounds * images:,}")
    table.add_row("trained steps", _windows(counted, settings.sampling.num_steps))
    return table


def _windows(counted: Counted, total: int) -> str:
    sizes = {len(window) for window in counted.windows}
    if sizes == {0}:
        return "none: final samples are noised anew"
    shown = "/".join(str(size) for size in sorted(sizes))
    return f"{shown} of {total}" + (f", {len(counted.windows)} windows" if len(counted.windows) > 1 else "")


def _calls(counted: Counted, watched: Mapping[str, Ledger]) -> Table:
    """Calls of single samples by name; guidance counts twice."""
    table = Table("calls of single samples", "first round", "whole run")
    for call in sorted(counted.total.counts):
        table.add_row(call, f"{counted.first.counts[call]:,}", f"{counted.total.counts[call]:,}")
    for name, ledger in watched.items():
        table.add_row(f"{name}: forward", "", f"{ledger.nfe:,}")
        table.add_row(f"{name}: decode", "", f"{ledger.decodes:,}")
    return table


def _print_time(
    console: Console, settings: Plan, counted: Counted, watched: Mapping[str, Ledger], refusals: Refusals
) -> None:
    source = settings.prices
    if source is None:
        console.print("time: not estimated; measure with `genalign prices --output prices.json` and give --prices")
        return
    prices = refusals.attempt(lambda: _read_prices(Path(source)))
    if prices is None:
        return
    taken = refusals.attempt(
        lambda: (seconds(counted.total, prices), sum(seconds(ledger, prices) for ledger in watched.values()))
    )
    if taken is not None:
        console.print(
            f"time: {taken[0] / 60:,.1f} min of training and {taken[1] / 60:,.1f} min of evaluations at the prices of"
            f" {source}, without optimiser steps; a backward pass is taken as two forwards"
        )


def _read_prices(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise FileNotFoundError(f"no prices in {path}: write them by genalign prices --output {path}")
    try:
        return {str(call): float(price) for call, price in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is no file of prices: write one by genalign prices --output {path}") from None


def _print_memory(
    console: Console, context: CommandContext, settings: Plan, outline: Outline, counted: Counted
) -> None:
    found = estimate(settings, outline, counted.stored)
    console.print(_networks(found.parts, found.trained, settings))
    console.print(_memory(found.held), _reliefs(reliefs(context, settings, counted.stored)), *FORMULAS, sep="\n")


def _reliefs(peaks: Mapping[str, float]) -> Table:
    table = Table("to hold less", "largest sum, GiB")
    for arguments, peak in peaks.items():
        table.add_row(arguments, f"{peak / 2**30:,.3f}")
    return table


def _networks(parts: Sequence[Part], trained: int, settings: Plan) -> Table:
    table = Table("network", "millions", "weights")
    for part in parts:
        table.add_row(part.name, f"{part.numbers / 1e6:,.3f}", "here" if part.present else "not here: downloaded first")
    what = (
        "the whole network"
        if settings.lora is None
        else f"LoRA {settings.init_lora or f'of rank {settings.lora.rank}'}"
    )
    table.add_row("trained", f"{trained / 1e6:,.3f}", what)
    return table


def _memory(found: Held) -> Table:
    table = Table("estimate of memory", "GiB")
    rows = [(f"always: {name}", size) for name, size in found.always.items()]
    rows += [(f"{phase}: {name}", size) for phase, extra in found.phases.items() for name, size in extra.items()]
    rows += [(f"sum while {phase}", size) for phase, size in found.peaks().items()]
    for name, size in rows:
        table.add_row(name, f"{size / 2**30:,.3f}")
    return table


def _print_weights_of_rewards(console: Console, rewards: Mapping[str, Any], refusals: Refusals) -> None:
    for repository in sorted(set(_repositories(rewards))):
        if _is_cached(repository):
            continue
        console.print(f"rewards: {repository} is not in the local cache; it is downloaded at the first call")
        if constants.HF_HUB_OFFLINE:
            refusals.messages.append(
                f"{repository} is not in the local cache, and HF_HUB_OFFLINE is set: while online, run `hf download"
                f" {repository}`"
            )


def _repositories(found: Any, key: str = "") -> Iterator[str]:
    """Hub ids among the settings of rewards that name weights, and addresses hf://owner/repository/file."""
    if isinstance(found, dict):
        for name, value in found.items():
            yield from _repositories(value, name)
    elif isinstance(found, list):
        for value in found:
            yield from _repositories(value, key)
    elif isinstance(found, str) and not os.path.exists(found):
        named = r"([\w.-]+/[\w.-]+)"
        address = re.match(f"hf://{named}/", found) or (key in _WEIGHTS_OF_REWARDS and re.fullmatch(named, found))
        if address:
            yield address[1]


def _is_cached(repository: str) -> bool:
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    return (folder / "snapshots").is_dir()
