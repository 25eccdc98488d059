from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genalign.scoring.shared_results import SharedResults
from genalign.types import Prompt

PROMPTS = [Prompt(str(number)) for number in range(4)]


class Sums:
    """A computation of the sum of samples, which counts its calls."""

    def __init__(self) -> None:
        self.shared, self.calls = SharedResults[float](), 0

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt] = PROMPTS, source: object = "judge") -> float:
        return self.shared(source, samples, prompts, lambda: self.compute(samples))

    def compute(self, samples: Tensor) -> float:
        self.calls += 1
        return float(samples.sum())


def test_a_batch_is_computed_once_for_all_equal_sources() -> None:
    sums, samples = Sums(), torch.ones(4, 2)
    assert [sums(samples), sums(samples, source="jud" + "ge"), sums(samples, list(PROMPTS))] == [8.0] * 3
    assert sums.calls == 1
    assert sums(samples, source="another") == 8.0 and sums.calls == 2
    same_texts = [Prompt(prompt.text, {"tag": "other"}) for prompt in PROMPTS]
    assert sums(samples, same_texts) == 8.0 and sums.calls == 3


def test_the_parts_of_a_batch_are_computed_once() -> None:
    sums, samples = Sums(), torch.arange(8.0).view(4, 2)
    for _ in range(3):
        parts = torch.split(samples, 2)
        assert [sums(part, PROMPTS[2 * n : 2 * n + 2]) for n, part in enumerate(parts)] == [6.0, 22.0]
    assert sums.calls == 2


def test_other_samples_are_computed_anew() -> None:
    sums, samples = Sums(), torch.ones(4, 2)
    assert sums(samples) == 8.0
    assert sums(samples.clone()) == 8.0 and sums.calls == 2
    samples += 1
    assert sums(samples) == 16.0 and sums.calls == 3
    for number in range(3):  # tensors that may take the memory of one that is gone
        assert sums(torch.full((4, 2), float(number))) == 8.0 * number


def test_samples_are_not_kept() -> None:
    sums = Sums()
    sums(torch.ones(4, 2))
    assert sums.shared._batch() is None


def test_samples_of_inference_mode() -> None:
    with torch.inference_mode():
        sums, samples = Sums(), torch.ones(4, 2)
        assert sums(samples) == sums(samples) == 8.0
