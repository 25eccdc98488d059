"""``genalign prices``: the cost of NFE, decoding and rewards on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genalign.cli import parsing
from genalign.cli.context import CommandContext, load_with_lora, named_rewards, prompt_set
from genalign.cli.generation_settings import Generation, require_positive
from genalign.runtime.files import write_json
from genalign.scoring.budget import measure_prices


@dataclass(frozen=True, kw_only=True)
class Prices(Generation):
    """A measurement of the cost of NFE, decoding and each reward on this machine, in seconds per sample.

    Args:
        output: JSON file to write.
        prompts: Prompts, as in training; the first ``batch_size`` are used.
        batch_size: Number of samples in one batch.
        repeats: Number of measurements, of which the median is taken.
        gradients: Also measure backward passes, which ReNO, DNO and guides need; they take the memory of a gradient.
    """

    batch_size: int = 32
    repeats: int = 5
    gradients: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "repeats")


def prices_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign prices``: measure the seconds per sample of each call, and write them as JSON."""
    settings, _ = parsing.parse(Prices, arguments, "prices")
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
