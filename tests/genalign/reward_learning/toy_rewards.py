"""Preference data of images whose quality is their brightness, and an encoder of them that needs no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genalign.reward_learning.encoding import StoredTokens
from genalign.reward_learning.examples import Examples, examples, split_by_prompt
from genalign.reward_learning.network import RewardEncoder
from genalign.reward_learning.objective import RewardData, nothing_held_out
from genalign.reward_learning.preferences import JudgedSample, Judgment, Kind
from genalign.runtime.media import save_images
from genalign.types import Prompt


class PixelTokens(RewardEncoder):
    """The mean colors of the quarters of an image, as four tokens, with trainable ``weights`` if asked."""

    def __init__(self, trainable: bool = False) -> None:
        super().__init__()
        self._arguments = {"trainable": trainable}
        self.scale = nn.Parameter(torch.ones(3), requires_grad=trainable)

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self._arguments)

    @property
    def width(self) -> int:
        return 3

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return (self,)

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        tokens = nn.functional.adaptive_avg_pool2d(samples, 2).flatten(2).transpose(1, 2)
        return self.scale * tokens


def images(count: int, seed: int = 0) -> Tensor:
    """Images (count, 3, 8, 8) of flat colors."""
    colors = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return colors.expand(-1, -1, 8, 8)


def write_judgments(
    folder: Path, prompts: int, kind: Kind = "pair", flips: float = 0.0, seed: int = 0
) -> list[Judgment]:
    """Judge two images of each prompt by their red, with a share of flipped pairs; ratings are 1 to 5."""
    pictures = images(2 * prompts, seed)
    paths = [folder / "images" / f"{seed}-{number:04d}.png" for number in range(2 * prompts)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    save_images(pictures, paths)
    flipped = torch.rand(prompts, generator=torch.Generator().manual_seed(seed + 1)) < flips
    judgments = []
    for number in range(prompts):
        red = pictures[2 * number : 2 * number + 2, 0, 0, 0]
        wins = bool(red[0] > red[1]) != bool(flipped[number])
        scores = {
            "pair": (float(wins), float(not wins)),
            "ranking": (float(wins), float(not wins)),
            "rating": tuple((1 + 4 * red).round().tolist()),
            "label": tuple((red > 0.5).float().tolist()),
        }[kind]
        samples = tuple(JudgedSample(path) for path in paths[2 * number : 2 * number + 2])
        judgments.append(Judgment(Prompt(f"prompt {number}"), samples, kind, {"overall": scores}, "ada"))
    return judgments


def toy_data(judgments: Sequence[Judgment], fraction: float = 0.25) -> RewardData:
    """Encode judgments, of which a fraction of the prompts is held out."""
    training, held_out = split_by_prompt(judgments, fraction, 0)
    learned = examples(training)
    measured = examples(held_out).of_dimensions(learned.dimensions) if held_out else nothing_held_out(learned)
    parts: tuple[Examples, Examples] = (learned, measured)
    samples = torch.stack([item.sample.read() for part in parts for item in part.items])
    with torch.no_grad():
        tokens = PixelTokens()(samples, [Prompt("")] * len(samples))
    return RewardData(*parts, StoredTokens(tokens, samples.mean((2, 3))[:, 2:]))
