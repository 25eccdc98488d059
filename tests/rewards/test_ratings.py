"""A reward fitted to ratings: closed forms of the regression, what it tells apart, and how ratings are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genalign.types import Prompt, Reward
from rewards.backbones.image_features import extract_text_features
from rewards.backbones.reference_images import ImageFolder, ImageTensor
from rewards.ratings import KernelRegression, RatedSamples, RatingReward, read_ratings
from rewards.shapes import worded

PROMPTS = [Prompt("a picture")]


def mean_colors(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


def _images(count: int) -> Tensor:
    colors = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return colors.expand(-1, -1, 4, 4).contiguous()


def test_a_regression_is_that_of_its_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(30, 2, generator=generator)
    targets = examples[:, 0].sin() + 0.1 * torch.randn(30, generator=generator)
    found = KernelRegression.fit(examples, targets)
    kernel = torch.exp(-torch.cdist(examples, examples).double().square() / (2 * found.width**2))
    ridges = {}
    for ridge in (1e-3, 1e-2, 1e-1, 1.0):
        weights = torch.linalg.solve(kernel + ridge * torch.eye(30), (targets - targets.mean()).double())
        ridges[ridge] = float((weights - found.weights).abs().max())
    assert min(ridges.values()) < 1e-3 < 1 < sorted(ridges.values())[1]
    ridge = min(ridges, key=lambda key: ridges[key])
    errors = []
    for left in range(30):  # predicted from the others, with the mean of all
        rest = [row for row in range(30) if row != left]
        inner = kernel[rest][:, rest] + ridge * torch.eye(29)
        weights = torch.linalg.solve(inner, (targets[rest] - targets.mean()).double())
        errors.append(float(targets.mean() + kernel[left, rest] @ weights - targets[left]))
    assert found.error == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
    assert found(torch.full((1, 2), 100.0)).item() == pytest.approx(float(targets.mean()))


def test_a_liked_color_is_predicted_for_new_samples_with_a_gradient() -> None:
    images = _images(80)
    rated = RatedSamples(ImageTensor(images[:60]), (1 + 4 * images[:60, 0, 0, 0]).round().tolist())
    reward = RatingReward(mean_colors, rated)
    assert isinstance(reward, Reward)
    predicted = reward(images[60:], PROMPTS * 20)
    assert torch.corrcoef(torch.stack([predicted, images[60:, 0, 0, 0]]))[0, 1] > 0.97
    torch.testing.assert_close(reward(images[60:61], PROMPTS), predicted[:1], rtol=1e-3, atol=1e-3)
    leaf = images[:2].clone().requires_grad_()  # of which one is an example
    reward(leaf, PROMPTS * 2).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and leaf.grad[:, 0].sum() > 0
    broken = images[:2].clone()
    broken[0, 0, 0, 0] = torch.nan
    assert reward(broken, PROMPTS * 2).isnan().tolist() == [True, False]


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    (tmp_path / "images").mkdir()
    for number, level in enumerate((0, 128, 255)):
        Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    return ImageFolder(tmp_path / "images")


def test_ratings_are_read_by_file_and_averaged(folder: ImageFolder, tmp_path: Path) -> None:
    file = tmp_path / "ratings.jsonl"
    rows = [("2.png", 5), ("0.png", 1), ("1.png", 3), ("1.png", 4)]
    file.write_text("".join(f'{{"file_name": "{name}", "rating": {rating}}}\n' for name, rating in rows))
    assert read_ratings(folder, str(file)).ratings == [1, 3.5, 5]
    file.write_text('{"file_name": "2.png", "rating": 5}\n')
    with pytest.raises(ValueError, match=r"2 files of .* have no rating in .*, such as 0\.png"):
        read_ratings(folder, str(file))


@pytest.mark.parametrize("line", ['{"file_name": "9.png", "rating": 1}', '{"file_name": "0.png"}', "[]", "1.png 3"])
def test_a_wrong_line_is_named(folder: ImageFolder, tmp_path: Path, line: str) -> None:
    file = tmp_path / "ratings.jsonl"
    file.write_text(f'{{"file_name": "0.png", "rating": 5}}\n{line}\n')
    with pytest.raises(ValueError, match=r'line 2: expected \{"file_name": \.\.\., "rating": \.\.\.\} with a file of'):
        read_ratings(folder, str(file))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RatedSamples(ImageTensor(_images(3)), [1, 2]), "3 samples have 2 ratings"),
        (lambda: RatedSamples(ImageTensor(_images(1)), [1]), "1 samples have 1 ratings"),
        (lambda: RatedSamples(ImageTensor(_images(2)), [1, float("nan")]), "must be finite"),
        (lambda: KernelRegression.fit(torch.ones(4, 2), torch.rand(4)), "the same features"),
        (lambda: extract_text_features(["a circle"], "shapes-clip"), "needs 2 texts or more, got 1"),
        (lambda: worded(["gold"], "shapes-clip"), "no color gold in the palette"),
    ],
)
def test_what_cannot_be_fitted_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
