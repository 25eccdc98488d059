"""A head that finds artifacts, from labels of single items (1 for clean, 0 for an artifact) on patch features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.reward_learning.encoding import LiveTokens
from genalign.reward_learning.examples import Grades, examples, split_by_prompt
from genalign.reward_learning.fitting import FitSettings
from genalign.reward_learning.heads import AttentionHead
from genalign.reward_learning.network import RewardEncoder
from genalign.reward_learning.objective import RewardData, RewardObjective
from genalign.reward_learning.preference_losses import LabelPool
from genalign.reward_learning.preferences import JudgedSample, Judgment, append_judgments, read_judgments
from genalign.reward_learning.training import RewardFit, RewardTraining, build_network
from genalign.runtime.media import write_samples
from genalign.types import Prompt


class Patches(RewardEncoder):
    """The mean color and the contrast of each of 16 patches of an image."""

    width = 4

    @property
    def arguments(self) -> dict[str, Any]:
        return {}

    @property
    def sample_tower(self) -> tuple[torch.nn.Module, ...]:
        return ()

    def forward(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        patches = samples.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(2, 3)  # (B, 3, 16, 16)
        return torch.cat([patches.mean(3).transpose(1, 2), patches.std(3).mean(1)[..., None]], dim=2)


def labelled_folder(folder: Path, count: int) -> Path:
    """Write images of one color each, every other with a checkered patch somewhere, and their labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, 16, 16).clone()
    checkered = torch.tensor([0.0, 1.0]).repeat(8).view(4, 4) * 0.6
    for number in range(0, count, 2):
        top, left = (4 * torch.randint(4, (2,), generator=generator)).tolist()
        images[number, :, top : top + 4, left : left + 4] = checkered
    files = write_samples(images, folder, 0)
    judgments = [
        Judgment(Prompt(f"prompt {number // 4}"), (JudgedSample(folder / file),), "label", {"clean": (number % 2,)})
        for number, file in enumerate(files)
    ]
    append_judgments(folder, judgments)
    return folder


def test_a_head_on_patches_learns_artifacts_from_labels(tmp_path: Path) -> None:
    judgments = read_judgments(labelled_folder(tmp_path, 120))
    rest, held = split_by_prompt(judgments, 0.25, seed=0)
    training, held_out = examples(rest), examples(held)
    assert training.dimensions == ("clean",) and len(training.grades) == 88 and not len(training.pairs)
    encoder = Patches()
    items = [*training.items, *held_out.items]
    data = RewardData(training, held_out, LiveTokens(encoder, items, torch.empty(len(items), 0)))
    network = build_network(encoder, AttentionHead(2, 8), 1, 1, seed=0)
    fit = RewardFit(epochs=40, batch_size=22, optimizer=FitSettings(learning_rate=2e-2), evaluate_every=40)
    (metrics,) = RewardTraining(network, data, RewardObjective(LabelPool()), fit).run()
    assert metrics["held_out"]["loss"] < 0.3

    def scores(grades: Grades, first: int) -> Tensor:
        samples = torch.stack([items[first + row].sample.read() for row in grades.rows.tolist()])
        return network(samples, [items[first + row].prompt for row in grades.rows.tolist()]).detach()

    held_scores, clean = scores(held_out.grades, len(training.items)), held_out.grades.values[:, 0] == 1
    assert held_scores[clean].min() > held_scores[~clean].max()
