"""``genalign train-noise-aware``: a reward of noisy previews, trained from the reward of clean samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from genalign.cli import parsing
from genalign.cli.context import CommandContext, load_with_lora, named_rewards, prompt_set
from genalign.cli.generation_settings import Generation, require_positive, require_rewards
from genalign.diffusion.noise import derived_seed
from genalign.prompts import drawn_in_turn
from genalign.reward_learning.noise_aware import (
    Distillation,
    HasDecoder,
    PreviewDataset,
    RewardIdentity,
    distill,
    train_decoder,
    validate,
)
from genalign.runtime.files import write_json
from genalign.search.engine import SearchRun
from genalign.search.noise_aware import NoiseAware, ScorerLevel, record_previews
from genalign.types import AnyCallable, Pipeline


@dataclass(frozen=True, kw_only=True)
class TrainNoiseAware(Generation):
    """Training of a reward's own network to predict the reward of the clean sample from its noisy previews.

    Args:
        output: Folder of the recordings and the trained network.
        model: The generator whose trajectories are recorded.
        prompts: Prompts of the recorded trajectories.
        held_out: Prompts of the recorded trajectories for validation.
        student: Builds the network to train from the reward, as in rewards.noise_aware.SelfDistilled.
        rewards: The reward, a single named one.
        steps: Indices of the sampling steps whose previews are recorded.
        count: Number of trajectories of each prompt.
        limit: Number of prompts.
        distillation: Optimizer settings.
        batch_size: Number of samples in one batch.
        seed: Seed of all noises.
    """

    held_out: str
    student: Callable[[AnyCallable], nn.Module]
    steps: tuple[int, ...] = (2, 4, 6, 8, 10, 13, 16)
    count: int = 8
    limit: int = 512
    distillation: Distillation = field(default_factory=Distillation)
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_rewards(self.rewards)
        if len(self.rewards) > 1:
            raise ValueError(
                f"a student predicts one reward, not {', '.join(self.rewards)}: give one, and train a student for each"
            )
        require_positive(self, "count", "limit", "batch_size")


def train_noise_aware_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign train-noise-aware``: record previews, train a student on them, validate and save it.

    The datasets of previews stay in the output folder, so another student of the reward can be trained on them.
    """
    settings, plain = parsing.parse(TrainNoiseAware, arguments, "train-noise-aware")
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

    # For each level from the cleanest: how well the reward itself ranks there, the training, and the student's ranking
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


def _preview_dataset(settings: TrainNoiseAware, pipeline: Pipeline, source: str, path: Path) -> PreviewDataset:
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
        kernel = settings.sampling.kernel_on(grid)
        run = SearchRun(pipeline, batch, rewards, grid, guidance, settings.batch_size, name, kernel)
        part = record_previews(run, settings.count, settings.steps)
        dataset = part if dataset is None else dataset.extend(part)
        done = min(first + per_run, len(prompts))
        print(f"recorded {done}/{len(prompts)} prompts of {source}", end="\r", flush=True)
    assert dataset is not None, "a prompt set has prompts"
    dataset.save(path)
    print()
    return dataset
