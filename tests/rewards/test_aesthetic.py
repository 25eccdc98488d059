from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genalign.types import Prompt
from rewards.aesthetic import AestheticReward
from rewards.backbones.clip_encoder import load_clip

WIDTH = 128  # of the embedded CLIP
PROMPTS = [Prompt("anything")] * 3


def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def published(tmp_path: Path) -> nn.Sequential:
    """Version 2's layers, for another width, in a file as published; version 1's beside it."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2), nn.Linear(16, 8)]
    head = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "v2.pth")
    torch.save({"weight": torch.randn(1, WIDTH), "bias": torch.tensor([3.5])}, tmp_path / "v1.pth")
    return head


@torch.no_grad()
def test_version_two_is_the_mlp_of_the_unit_embedding_and_version_one_is_linear(
    published: nn.Sequential, tmp_path: Path
) -> None:
    unit, linear = F.normalize(load_clip("shapes-clip")(images()), dim=-1), torch.load(tmp_path / "v1.pth")
    expected = {"v2": published(unit)[:, 0], "v1": unit @ linear["weight"][0] + 3.5}
    for name, scores in expected.items():
        reward = AestheticReward(str(tmp_path / f"{name}.pth"), "shapes-clip")
        torch.testing.assert_close(reward(images(), PROMPTS), scores, rtol=0, atol=1e-5)


def test_gradients_broken_images_and_other_models(published: nn.Sequential, tmp_path: Path) -> None:
    reward = AestheticReward(str(tmp_path / "v2.pth"), "shapes-clip")
    leaf = images().requires_grad_(True)
    reward(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None and (leaf.grad.flatten(1).abs().sum(1) > 0).all()
    broken = images()
    broken[2] = torch.nan
    assert reward(broken, PROMPTS).isnan().tolist() == [False, False, True]
    torch.save({"weight": torch.randn(1, 768), "bias": torch.zeros(1)}, tmp_path / "large.pth")
    with pytest.raises(ValueError, match=r"for features \(B, 768\), not \(3, 128\): give the model that"):
        AestheticReward(str(tmp_path / "large.pth"), "shapes-clip")(images(), PROMPTS)
