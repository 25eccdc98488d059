"""Four people with planted tastes, followed by one model: PPD's attention to users in the shapes world.

Each user prefers, of two samples of a prompt, the one with more of a statistic that is computed exactly: red, green,
blue, or bright. Embeddings come from a few comparisons of each, the attention is trained by DPO on a pool that all
four labeled, and samples of held-out compositions are drawn for each user from the same noises. A fifth user, whose
taste is the mean of red and bright, is seen by no training: its embedding comes from as many comparisons.

What counts as proof: of each user's own taste, samples for the user less samples of the same noises for the other three
lie above 0 (95% interval over prompts and seeds). The unseen user's samples have more of its taste than those for
nobody, and lie between its parents: they are redder than those for the bright user and less red than those for the red
one, and brighter and less bright likewise. Settings were not chosen on these seeds. The part is planned to take 50
minutes of two cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import pipelines
from genalign import Lora, TrainerSettings, train
from genalign.algorithms.preference_recipes import dpo
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import RolloutInputs, generate, rollout
from genalign.diffusion.transitions import ODE
from genalign.evaluation.records import PromptRecord
from genalign.prompts import drawn_in_turn
from genalign.reward_learning.users import AnnotatedPair
from genalign.training.offline import stored_score
from genalign.training.pools import INFO, Pool, PoolInfo, PoolSample, write_part
from genalign.types import Prompt
from genalign.worlds.shapes.prompts import prompts as split
from rewards.user_embeddings import MeanDifferenceLearner
from scripts.benchmarks.planted_rewards import LIKED, Liked
from scripts.benchmarks.published_results import write_results
from scripts.benchmarks.shapes_sampling import shapes_sampling
from scripts.benchmarks.trained_runs import RESULTS, head

TASTES: Mapping[str, tuple[Liked, ...]] = {
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "bright": ("brightness",),
}
UNSEEN = "red and bright"
PARENTS: tuple[Liked, ...] = ("red", "brightness")
"""The tastes of the unseen user, which are those of the users ``red`` and ``bright``."""


@dataclass(frozen=True)
class ExperimentSize:
    """How much is sampled, trained and evaluated, for one seed.

    Attributes:
        prompts: Number of prompts of the pool, of which each has two samples.
        comparisons: Number of comparisons that a user's embedding is made of.
        rounds: Number of rounds of training.
        evaluated: Number of held-out prompts.
        steps: Number of sampling steps.
    """

    prompts: int = 512
    comparisons: int = 4
    rounds: int = 100
    evaluated: int = 48
    steps: int = 10


def taste(user: str, images: Tensor) -> Tensor:
    """Score images (B, 3, H, W) by a user's taste, (B,): the mean of the statistics that the user likes."""
    liked = TASTES.get(user, PARENTS)
    return torch.stack([LIKED[name](images.float()) for name in liked]).mean(0)


def users_part(
    work: Path,
    seeds: Sequence[int] = (91, 92, 93),
    size: ExperimentSize = ExperimentSize(),
    results: Path = RESULTS,
) -> None:
    """One model follows four users' tastes, and a fifth one's that it has not seen."""
    records = [record for seed in seeds for record in user_records(work / "users" / f"seed-{seed}", seed, size)]
    claim = (
        "A model trained by PPD follows each of four users with planted tastes (held-out compositions, suite comp,"
        " ODE): the taste of a user in samples for the user, and for the others; and one unseen user, beside nobody and"
        " between the two users whose tastes it has"
    )
    write_results(results, "users_shapes", head(claim, "python scripts/benchmarks/proofs.py users"), records)


def user_records(folder: Path, seed: int, size: ExperimentSize) -> list[PromptRecord]:
    """Collect, train and evaluate with one seed; a pool and an attention that are there are not made again."""
    embeddings, trained = folder / "embeddings.safetensors", folder / "run" / "lora"
    _collect(folder, embeddings, seed, size)
    if not trained.is_dir():
        pool = Pool.load(folder / "pool")
        settings = TrainerSettings(
            rounds=size.rounds, prompts_per_round=min(48, size.prompts), group_size=2, seed=seed, data=str(pool.folder)
        )
        seeing = pipelines.load("shapes-sd3", users=str(embeddings))
        sampling, lora = shapes_sampling(size.steps), Lora(frozen=True)
        rewards, output = {"preference": stored_score}, folder / "run"
        train(seeing, rewards, pool.prompts, dpo(), settings, sampling, lora, output)
    pipeline = pipelines.load("shapes-sd3", users=str(embeddings))
    pipeline.load_lora(trained)
    prompts = drawn_in_turn(split("comp"), size.evaluated, seed)
    seeds = [derived_seed(seed, "evaluation", prompt.text) for prompt in prompts]  # the same noises for every user
    grid, sampled = shapes_sampling(size.steps).grid(pipeline), dict[str | None, Tensor]()
    for user in (None, *TASTES, UNSEEN):  # None for nobody
        for_user = [Prompt(prompt.text, None if user is None else {"user": user}) for prompt in prompts]
        with torch.no_grad():
            sampled[user] = torch.cat(list(generate(pipeline, for_user, seeds, grid, 1.0, 48)))
    records = list[PromptRecord]()
    for user in TASTES:
        own = taste(user, sampled[user])
        others = torch.stack([taste(user, sampled[other]) for other in TASTES if other != user]).mean(0)
        records += _records(f"users.{user}", "taste of the user", seed, prompts, others, own)
    nobody, unseen = (taste(UNSEEN, sampled[user]) for user in (None, UNSEEN))
    records += _records("users.unseen", "taste of the unseen user", seed, prompts, nobody, unseen)
    for parent, other in (("red", "bright"), ("bright", "red")):
        above, below = f"users.unseen_over_{other}", f"users.{parent}_over_unseen"
        low, middle, high = (taste(parent, sampled[user]) for user in (other, UNSEEN, parent))
        records += _records(above, f"taste of {parent}", seed, prompts, low, middle)
        records += _records(below, f"taste of {parent}", seed, prompts, middle, high)
    return records


def _records(
    name: str, metric: str, seed: int, prompts: Sequence[Prompt], before: Tensor, after: Tensor
) -> list[PromptRecord]:
    pairs = zip(prompts, before.tolist(), after.tolist(), strict=True)
    return [PromptRecord(name, metric, seed, prompt.task, prompt.text, old, new, 1) for prompt, old, new in pairs]


@torch.no_grad()
def _collect(folder: Path, embeddings: Path, seed: int, size: ExperimentSize) -> None:
    """Sample two images of each prompt, let every user compare them, and learn the embeddings of all five users."""
    if embeddings.is_file():
        return
    pipeline = pipelines.load("shapes-sd3")
    prompts = drawn_in_turn(split("train"), size.prompts, seed)
    info = PoolInfo(pipeline.autoencoder, tuple(pipeline.latent_shape), ("preference",), {"by": "planted tastes"})
    few = list[AnnotatedPair]()
    for number, first in enumerate(range(0, len(prompts), 24)):
        batch = prompts[first : first + 24]
        seeds = tuple(derived_seed(seed, "pool", prompt.text, side) for prompt in batch for side in (0, 1))
        rows = torch.arange(len(batch)).repeat_interleave(2)
        inputs = RolloutInputs(pipeline.encode(batch), rows, seeds, seeds)
        grid = shapes_sampling(size.steps).grid(pipeline)
        latents = rollout(pipeline, inputs, grid, [ODE()] * len(grid), 1.0).final
        images, samples = pipeline.decode(latents), list[PoolSample]()
        for user in (*TASTES, UNSEEN):
            better = taste(user, images).view(-1, 2).diff(dim=1)[:, 0] > 0  # the second of a pair
            for place, (prompt, second) in enumerate(zip(batch, better.tolist(), strict=True)):
                if first + place < size.comparisons:
                    liked, other = (images[2 * place + side] for side in (int(second), 1 - int(second)))
                    few.append(AnnotatedPair(prompt.text, user, partial(_same, liked), partial(_same, other)))
                if user != UNSEEN:
                    for_user, group = Prompt(prompt.text, {"user": user}), f"{user}-{first + place}"
                    scores = (float(not second), float(second))
                    samples += [PoolSample(for_user, {"preference": score}, group) for score in scores]
        write_part(folder / "pool", number, latents.repeat(len(TASTES), 1, 1, 1), samples)
    if not (folder / "pool" / INFO).is_file():
        info.write(folder / "pool")
    accuracy = MeanDifferenceLearner("shapes-clip").learn(few, embeddings)
    print(f"comparisons predicted by the embeddings that they made: {mean(accuracy.seen.values()):.2f}")


def _same(image: Tensor) -> Tensor:
    return image
