from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from genalign.types import Prompt
from rewards.backbones.image_features import Dinov2Features
from rewards.backbones.reference_images import ImageTensor, ReferencePool, ReferencesByPrompt
from rewards.similarity import ReferenceSimilarity

RED, BLUE = Prompt("red"), Prompt("blue")


def means(samples: torch.Tensor) -> torch.Tensor:
    """Compute mean colors (B, 3), whose cosines are known by hand."""
    return samples.mean((2, 3))


def flat(*colors: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(colors, dtype=torch.float32)[:, :, None, None].expand(-1, 3, 4, 4).contiguous()


def test_cosines_with_the_references_of_the_prompt() -> None:
    images = ImageTensor(flat((1, 0, 0), (1, 1, 0), (0, 0, 1)))
    references = ReferencesByPrompt(images, ["red", "red", "blue"])
    samples = flat((1, 0, 0), (1, 0, 0), (0, 0, 0.5))
    half = 0.5**0.5
    mean = ReferenceSimilarity(means, references)(samples, [RED, BLUE, BLUE])
    assert mean.tolist() == pytest.approx([(1 + half) / 2, 0, 1])


def test_features_of_a_pool_are_computed_once_for_every_prompt() -> None:
    seen = []

    def features(samples: torch.Tensor) -> torch.Tensor:
        seen.append(len(samples))
        return means(samples)

    reward = ReferenceSimilarity(features, ReferencePool(ImageTensor(flat((1, 0, 0), (0, 1, 0)))))
    samples = flat((1, 0, 0), (0, 0, 1), (1, 1, 0))
    for _ in range(2):
        assert reward(samples, [RED, BLUE, RED]).tolist() == pytest.approx([0.5, 0, 0.5**0.5])
    assert sorted(seen) == [2, 3, 3]


def test_features_of_many_references_are_computed_in_batches() -> None:
    images = torch.rand(150, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(means(images), dim=1)
    score = ReferenceSimilarity(means, ReferencePool(ImageTensor(images)))(images[:1], [RED])
    assert float(score) == pytest.approx(float((unit @ unit[0]).mean()), abs=1e-6)


def test_dino_similarity_can_be_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    images = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    reward = ReferenceSimilarity(Dinov2Features(str(tmp_path)), ReferencePool(ImageTensor(images[:1])))
    leaf = images.clone().requires_grad_(True)
    scores = reward(leaf, [RED] * 3)
    assert scores[0].item() == pytest.approx(1, abs=1e-5) and (scores[1:] < 1 - 1e-5).all()
    scores.sum().backward()
    assert leaf.grad is not None and (leaf.grad[1:].flatten(1).abs().sum(1) > 0).all()
    broken = images.clone()
    broken[1] = torch.nan
    assert reward(broken, [RED] * 3).isnan().tolist() == [False, True, False]


def test_a_prompt_without_references_is_refused() -> None:
    reward = ReferenceSimilarity(means, ReferencesByPrompt(ImageTensor(flat((1, 0, 0))), ["red"]))
    with pytest.raises(ValueError, match="no reference for the prompt 'blue'"):
        reward(flat((1, 0, 0)), [BLUE])
    reward.require_references(RED)
    with pytest.raises(ValueError, match="no reference for the prompt 'blue'"):
        reward.require_references(BLUE)
    with pytest.raises(ValueError, match="one prompt per image, not 2 for 1 images"):
        reward(flat((1, 0, 0)), [RED, RED])
