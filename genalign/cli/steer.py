"""``genalign steer``: a search for the best sample of every prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext, load_with_lora, named_rewards, prompt_set, rank_share, require_rate
from genalign.cli.family_defaults import with_family_defaults
from genalign.cli.generation_settings import RewardChoice, require_positive, require_rewards
from genalign.cli.model_settings import Model
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.sampling import Sampling
from genalign.evaluation.report import write_search
from genalign.runtime.media import AudioFormat, writer
from genalign.runtime.progress import Progress
from genalign.scoring.budget import Budget
from genalign.search.result_folder import SearchFolder
from genalign.search.results import SearchResult
from genalign.search.run_search import SearchSetup
from genalign.search.strategy import Strategy
from genalign.types import PromptSet


@dataclass(frozen=True, kw_only=True)
class Steer:
    """A search for the best sample of every prompt.

    Args:
        output: Folder of the samples and the report.
        model: The generator.
        prompts: A file of prompts, or a split of a world, as in shapes:val; or give ``prompt``.
        prompt: Texts to search for, instead of ``prompts``; --prompt TEXT may be repeated.
        strategy: Search strategy, as in genalign.BestOfN.
        rewards: Named rewards; the search maximizes their weighted sum.
        sampling: Sampling settings.
        budget: Limit of NFE, cost or seconds per prompt.
        lora: An adapter of the model.
        batch_size: Largest number of samples per call of the network.
        seed: Seed of all noises.
        limit: Search only this many prompts, from the first; null for all.
        audio: File format of audio clips.
    """

    output: str
    model: Model
    prompts: str | None = None
    rewards: dict[str, RewardChoice] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=lambda: Sampling(20))
    prompt: list[str] = field(default_factory=list)
    strategy: Strategy
    budget: Budget | None = None
    lora: str | None = None
    batch_size: int = 32
    seed: int = 0
    limit: int | None = None
    audio: AudioFormat = "wav"

    def __post_init__(self) -> None:
        if (self.prompts is None) != bool(self.prompt):
            raise ValueError("give either prompts, a file as in --prompts prompts.txt, or texts, as in --prompt TEXT")
        require_rewards(self.rewards)
        require_positive(self, "batch_size", "limit")


def steer_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign steer``: search the best sample of every prompt.

    The same command resumes, as finished prompts are kept. Processes started by torchrun or accelerate share the
    prompts.
    """
    settings, plain = parsing.parse(Steer, gathered(arguments, "prompt"), "steer")
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
    """Join every ``--name TEXT`` among the words of a command into one JSON list of texts."""
    texts, others, words = [], [], iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            texts.append(value if equals else next(words, ""))
        else:
            others.append(word)
    return [*others, f"--{name}={json.dumps(texts)}"] if texts else others


def _conclude(folder: SearchFolder, count: int) -> None:
    """Write the scores of all ``count`` prompts and the report, if this process finishes last."""
    if remaining := sum(not folder.done(index) for index in range(count)):
        print(
            f"{remaining} of {count} prompts are unfinished; other processes may be working on them."
            " If none is running, run this command again."
        )
        return
    with folder.claims.exclusive():
        folder.conclude()
        print(f"report: {write_search(folder.path)}")
