"""Plain callables, as flow_grpo and TRL write them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genalign.scoring.reward_check import Probe, check
from genalign.scoring.score import NamedReward, score
from genalign.types import Prompt
from rewards.adapters import Adapted

IMAGES = (torch.tensor([0.0, 51.0, 255.0]) / 255).view(3, 1, 1, 1).expand(3, 3, 2, 4)
PROMPTS = [Prompt("a", {"tag": "one", "level": 1}), Prompt("b", {"tag": "two"}), Prompt("c")]


def test_pil_images_and_columns_of_metadata() -> None:
    def plain(images: list[Image.Image], prompts: list[str], tag: list[Any], level: list[Any]) -> list[float | None]:
        assert prompts == ["a", "b", "c"] and tag == ["one", "two", None] and level == [1, None, None]
        assert all(image.mode == "RGB" and image.size == (4, 2) for image in images)
        return [
            None if name is None else float(image.getpixel((0, 0))[0]) for image, name in zip(images, tag, strict=True)
        ]

    scores = Adapted(plain)(IMAGES, PROMPTS)
    assert scores[:2].tolist() == [0.0, 51.0] and bool(scores[2].isnan()) and scores.dtype == torch.float32


def test_rows_of_metadata_and_a_pair_as_flow_grpo_has_them() -> None:
    def plain(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> tuple[np.ndarray, dict]:
        assert images.dtype == np.uint8 and images.shape == (3, 2, 4, 3)
        assert metadata == [{"tag": "one", "level": 1}, {"tag": "two"}, {}]
        return images.mean((1, 2, 3)), {"info": 1}

    assert Adapted(plain, images="numpy", metadata="rows")(IMAGES, PROMPTS).tolist() == [0.0, 51.0, 255.0]


def test_tensors_keep_their_gradient() -> None:
    given = IMAGES.clone().requires_grad_()
    adapted = Adapted(lambda images, prompts, **columns: images.flatten(1).mean(1), images="tensor")
    adapted(given, PROMPTS).sum().backward()
    assert given.grad is not None and bool((given.grad != 0).all())


def test_coroutines_are_awaited_also_within_a_loop() -> None:
    async def plain(images: list, prompts: list[str], **columns: list) -> list[float]:
        await asyncio.sleep(0)
        return [1.0, 2.0, 3.0]

    async def main() -> list[float]:
        return Adapted(plain)(IMAGES, PROMPTS).tolist()

    assert Adapted(plain)(IMAGES, PROMPTS).tolist() == asyncio.run(main()) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "returned",
    [[1, True, 0.5], [np.float32(1), np.int64(1), 0.5], [torch.tensor(1.0), torch.tensor([1.0]), 0.5], (1, 1, 0.5)],
)
def test_numbers_of_any_kind(returned: Any) -> None:
    pair = (returned, {}) if isinstance(returned, tuple) else returned
    assert Adapted(lambda images, prompts, **_: pair)(IMAGES, PROMPTS).tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], r"returned \(2,\) for 3 images"),
        (torch.zeros(3, 1), r"returned \(3, 1\) for 3 images"),
        (["good", 1.0, 2.0], "returned 'good' for an image: return a number, or None"),
        (1.0, "returned a float"),
        (None, "returned a NoneType"),
    ],
)
def test_other_results_are_refused(returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapted(lambda images, prompts, **_: returned)(IMAGES, PROMPTS)


def test_names_that_are_taken_and_shapes_that_are_no_images() -> None:
    adapted = Adapted(lambda images, prompts, **_: [0.0])
    with pytest.raises(ValueError, match=r"the metadata key 'images' is an argument"):
        adapted(IMAGES[:1], [Prompt("a", {"images": 3})])
    with pytest.raises(ValueError, match=r'are not images .* give them as "tensor"'):
        adapted(torch.zeros(1, 1, 100), PROMPTS[:1])


def test_an_adapted_function_keeps_to_the_contract() -> None:
    def redness(images: list[Image.Image], prompts: Sequence[str], **columns: Any) -> list[float]:
        return [float(np.asarray(image)[..., 0].mean()) for image in images]

    samples = torch.rand(6, 3, 8, 8)
    probe = Probe(samples, [Prompt(f"p{n}") for n in range(6)])
    assert [found for found in check(Adapted(redness), probe) if found.passed is False] == []


def test_what_an_adapted_function_raises_becomes_nan() -> None:
    def broken(images: list[Image.Image], prompts: Sequence[str], **columns: Any) -> list[float]:
        raise ConnectionError("gone")

    assert bool(score([NamedReward("x", Adapted(broken))], IMAGES, PROMPTS).isnan().all())
