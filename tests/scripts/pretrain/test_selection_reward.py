"""The reward of searches, trained on rendered samples alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewards.regressor import RegressorReward
from rewards.shapes import ShapesReward
from scripts.pretrain import selection_reward, shapes_dataset
from scripts.pretrain.training_loop import Fit


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes that are rendered in this process."""

    def captioned(count: int, seed: int) -> shapes_dataset.CaptionedScenes:
        images, prompts = shapes_dataset._chunk((0, count, seed))
        return shapes_dataset.CaptionedScenes(torch.from_numpy(images), tuple(prompts))

    monkeypatch.setattr(shapes_dataset, "captioned_scenes", captioned)


@pytest.mark.usefixtures("scenes")
def test_captions_are_true_nearly_true_and_of_others() -> None:
    pairs = selection_reward.judged_pairs("shapes", 90, seed=1)
    everything = torch.arange(len(pairs))
    credit = ShapesReward()(pairs.samples(everything), pairs.captions)
    assert torch.equal(pairs.credit, credit)
    assert 0.2 < float((credit == 1).float().mean()) < 0.8 and bool(((credit > 0) & (credit < 1)).any())


@pytest.mark.usefixtures("scenes")
def test_the_reward_learns_the_partial_credit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = Fit(steps=200, learning_rate=1e-3, save_every=200)
    for name, value in {"SAMPLES": 300, "HELD_OUT": 90, "SETTINGS": few}.items():
        monkeypatch.setattr(selection_reward, name, value)
    path = tmp_path / "reward.safetensors"
    selection_reward.main(["shapes", "--output", str(path)])
    assert float(capsys.readouterr().out.split()[-1]) > 0.6
    others = selection_reward.judged_pairs("shapes", 30, seed=3)
    scores = RegressorReward(path)(others.samples(torch.arange(30)), others.captions)
    assert float((scores - others.credit).square().mean()) < float(others.credit.var())


def test_a_missing_or_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train the reward with scripts/pretrain/selection_reward\.py"):
        RegressorReward(tmp_path / "none.safetensors").network()
