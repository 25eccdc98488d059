"""Train the reward that searches in an embedded world select by; the verifier itself is left for judging.

    python scripts/pretrain/selection_reward.py shapes --output runs/search/selection/reward.safetensors

A regressor on the frozen shapes-clip, or tones-clap, learns the verifier's partial credit of rendered samples for
captions that are right, nearly right, or of another sample of the task. Like a published reward model it has only ever
seen clean samples: nothing makes it robust to the blur of previews. It needs no generator, and a few minutes. Seeded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.types import Prompt, RewardFunction
from genalign.worlds.tones.instruments import SAMPLE_RATE
from rewards.regressor import Regressor
from rewards.shapes import ShapesReward
from rewards.tones import TonesReward
from scripts.pretrain import shapes_dataset, tones_dataset
from scripts.pretrain.training_loop import Fit, fit

SAMPLES, HELD_OUT, BATCH = 12_000, 1_000, 64
SETTINGS = Fit(steps=4000, learning_rate=1e-3, save_every=1000)


@dataclass(frozen=True)
class JudgedPairs:
    """N rendered samples, as the world's dataset stores them, with a caption each and its partial credit (N,)."""

    samples: Callable[[Tensor], Tensor]
    captions: tuple[Prompt, ...]
    credit: Tensor

    def __len__(self) -> int:
        return len(self.captions)


def judged_pairs(world: str, count: int, seed: int) -> JudgedPairs:
    """Render samples of seen prompts, and judge them by captions of which a third each is true, wrong, and another's.

    The wrong ones have one mistake, where the task offers one.
    """
    rng = np.random.default_rng(seed)
    if world == "shapes":
        scenes = shapes_dataset.captioned_scenes(count, seed)
        images = scenes.images
        return _judged(
            lambda rows: images[rows].float() / 255, scenes.prompts, shapes_dataset.corrupted, ShapesReward(), rng
        )
    clips = tones_dataset.captioned_clips(count, seed)
    return _judged(clips.floats, clips.prompts, tones_dataset.corrupted, TonesReward(), rng)


def _judged(
    samples: Callable[[Tensor], Tensor],
    true: Sequence[Prompt],
    corrupted: Callable[[Prompt, np.random.Generator], Prompt],
    verifier: RewardFunction,
    rng: np.random.Generator,
) -> JudgedPairs:
    by_task: dict[str, list[Prompt]] = {}
    for prompt in true:
        by_task.setdefault(prompt.task, []).append(prompt)
    captions = []
    for prompt in true:
        others = by_task[prompt.task]
        choices = (prompt, corrupted(prompt, rng), others[rng.integers(len(others))])
        captions.append(choices[rng.integers(3)])
    parts = torch.split(torch.arange(len(captions)), 500)
    credit = [verifier(samples(rows), [captions[row] for row in rows.tolist()]) for rows in parts]
    return JudgedPairs(samples, tuple(captions), torch.cat(credit))


@torch.no_grad()
def features(network: Regressor, pairs: JudgedPairs) -> Tensor:
    """Compute what the head reads of all pairs, (N, 4 d)."""
    parts = [rows.tolist() for rows in torch.split(torch.arange(len(pairs)), 100)]
    return torch.cat(
        [network.features(pairs.samples(torch.tensor(rows)), [pairs.captions[row] for row in rows]) for rows in parts]
    )


def train(network: Regressor, pairs: JudgedPairs, state: Path) -> None:
    """Fit the head to the partial credit by least squares."""
    inputs = features(network, pairs)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(pairs), (BATCH,), generator=torch.Generator().manual_seed(step))
        return F.mse_loss(network.head(inputs[rows]).squeeze(-1), pairs.credit[rows])

    fit(network.head, loss, SETTINGS, state)


@torch.no_grad()
def agreement(network: Regressor, pairs: JudgedPairs) -> float:
    """Spearman's correlation of scores and partial credit on other samples."""
    scores = network.head(features(network, pairs)).squeeze(-1)
    return float(scipy.stats.spearmanr(scores.numpy(), pairs.credit.numpy()).statistic)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the selection reward of a world and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=("shapes", "tones"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    network = (
        Regressor("shapes-clip") if options.world == "shapes" else Regressor("tones-clap", sample_rate=SAMPLE_RATE)
    )
    pairs, others = (judged_pairs(options.world, count, seed) for count, seed in ((SAMPLES, 20), (HELD_OUT, 21)))
    with tempfile.TemporaryDirectory() as folder:
        train(network, pairs, Path(folder) / "head.safetensors")
    network.save(options.output)
    score = agreement(network, others)
    print(f"{options.output}: Spearman's correlation with the partial credit of other samples {score:.3f}")


if __name__ == "__main__":
    main()
