"""Waits of rewards for a GPU, on the simulated device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genalign.evaluation.geneval.scoring import Thresholds
from genalign.scoring.score import NamedReward, score
from genalign.types import Prompt
from rewards.backbones import clip_encoder, detectors
from rewards.backbones.detectors import Mask2Former, Owlv2
from rewards.clip import ClipReward
from tests.fake_cuda import FakeCuda
from tests.rewards import tiny_detectors

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
PROMPTS = [Prompt(text) for text in ("red circle", "blue ring")] * 4
ALL = Thresholds(confidence=0.0, counting=0.0)


@pytest.fixture(autouse=True)
def networks_of_the_test_alone() -> Iterator[None]:
    """No other test gets networks without values."""
    openers = clip_encoder._opened, detectors._opened
    for opener in openers:
        opener.cache_clear()
    yield
    for opener in openers:
        opener.cache_clear()


def test_clip_waits_for_its_scores_alone(tmp_path: Path) -> None:
    reward = NamedReward("clip", ClipReward(tiny_detectors.clip(tmp_path), dtype="bfloat16"), score_batch=4)
    with FakeCuda() as cuda:
        images = torch.zeros(8, 3, 64, 64, device="cuda")
        score([reward], images, PROMPTS)  # opens the network, and encodes the texts
        cuda.waits.clear()
        score([reward], images, PROMPTS)
    assert [(event.kind, event.size) for event in cuda.waits] == [("copy to the CPU", 4 * 4)] * 2  # of each batch


@pytest.mark.parametrize(
    ("kind", "make", "own", "all_together"),
    [
        (Mask2Former, tiny_detectors.mask2former, 2, 4),  # likely queries, then masks; two in transformers
        (Owlv2, tiny_detectors.owlv2, 1, 6),  # five in transformers
    ],
)
def test_detectors_wait_a_few_times_for_a_batch(
    kind: type[Mask2Former], make: object, own: int, all_together: int, tmp_path: Path
) -> None:
    assert callable(make)
    detector = kind(make(tmp_path), ALL, batch_size=2, dtype="bfloat16")
    with FakeCuda() as cuda:
        images = torch.zeros(4, 3, 64, 64, device="cuda")
        detected = detector(images, [["dog", "cat"]] * 4)
        cuda.waits.clear()
        detected = detector(images, [["dog", "cat"]] * 4)
    assert all(len(instances) > 10 for instances in detected)
    results = [event for event in cuda.waits if event.kind == "copy to the CPU"]
    assert len(results) == 2 * own and len(cuda.waits) <= 2 * all_together
