"""``genalign calibrate``: the noise level of each sampling step, tuned for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext, load_with_lora, named_rewards, prompt_set
from genalign.cli.train_settings import Train
from genalign.prompts import PromptSampler
from genalign.scoring.score import group_reward
from genalign.training.noise_calibration import Calibration, calibrate, save_kernel
from genalign.training.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Calibrate(Train):
    """A training configuration for which the noise level of each sampling step is calibrated.

    Args:
        output: JSON file to write.
        calibration: Settings of the calibration.
    """

    calibration: Calibration = field(default_factory=Calibration)


def calibrate_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Find the noise level of each sampling step, and write a kernel that uses them."""
    settings, _ = parsing.parse(Calibrate, arguments, "calibrate")
    source, sampling = prompt_set(settings.prompts), settings.sampling
    pipeline, rewards = load_with_lora(context, settings.model, None), named_rewards(settings.rewards)
    pipeline.encode_ahead([prompt.text for prompt in source.prompts])
    unit, grouped = settings.recipe.objective.unit, group_reward(settings.rewards)
    training = settings.training.fit(source, unit, group_reward=grouped)
    guidance = sampling.guidance_scale(pipeline)
    grid = sampling.grid(pipeline)
    sampler = Sampler(
        pipeline, rewards, grid, guidance, training, keep_samples=False, elsewhere=sampling.kernel_on(grid)
    )
    rounds = PromptSampler(source, training.prompts_per_round, training.seed).rounds()
    for number, kernel in enumerate(calibrate(sampler, settings.recipe, rounds, settings.calibration), start=1):
        levels = " ".join(f"{level:.2f}" for level in kernel.levels)
        print(f"{number}/{settings.calibration.iterations}  noise levels {levels}", flush=True)
        save_kernel(kernel, Path(settings.output))
    print(f"Train with it: --recipe.kernel genalign.calibrated --recipe.kernel.path {settings.output}")
    return 0
