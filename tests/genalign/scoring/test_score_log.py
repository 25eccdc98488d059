"""The log's key of a call: the bits of its samples, without a copy of them where they are on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.scoring.score import NamedReward
from genalign.scoring.score_log import ScoreLog, hash_bits
from genalign.types import Prompt
from tests.fake_cuda import FakeCuda

PROMPTS = [Prompt("a circle"), Prompt("a square")]


def brightness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


def test_any_bit_and_any_place_count() -> None:
    sample = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    others = {"equal": sample.clone(), "flipped": sample.flip(2), "channels": sample.roll(1, 0)}
    others["last bit"] = sample.clone()
    others["last bit"][2, 7, 7] = torch.nextafter(sample[2, 7, 7], torch.tensor(2.0))
    others["two numbers"] = sample.clone()
    others["two numbers"][0, 0, :2] = sample[0, 0, :2].flip(0)
    others["zeros"], others["negative zeros"] = torch.zeros(3, 8, 8), -torch.zeros(3, 8, 8)
    hashes = {name: tuple(hash_bits(other).tolist()) for name, other in others.items()}
    assert hashes["equal"] == tuple(hash_bits(sample).tolist())
    assert len(set(hashes.values())) == len(hashes)
    assert all(first != second for first, second in hashes.values())


def test_many_samples_have_different_hashes() -> None:
    levels = torch.randint(0, 2, (4000, 24), generator=torch.Generator().manual_seed(1)).float()
    distinct = len(levels.unique(dim=0))
    for place in range(2):
        assert len({int(hash_bits(row)[place]) for row in levels}) == distinct


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_samples_stay_on_the_gpu(tmp_path: Path) -> None:
    log = ScoreLog()
    log.record_to(tmp_path / "scores.jsonl")
    [reward] = log.logged([NamedReward("one", brightness)])
    with FakeCuda() as cuda:
        reward(torch.zeros(2, 3, 64, 64, device="cuda"), PROMPTS)
        copied = [event.size for event in cuda.waits if event.kind == "copy to the CPU"]
    assert len(cuda.waits) == 2 and copied == [2 * 16, 2 * 4]  # the hashes, and the scores
