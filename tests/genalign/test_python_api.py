"""``genalign.train``, ``genalign.evaluate`` and ``genalign.gain``: each in one call."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import genalign
from pipelines.sd3 import SD3

PROMPTS = ["a red cat", "a blue dog"]


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    assert {prompt.split()[0] for prompt in prompts} == {"a"}  # prompts are strings
    return images[:, 0].flatten(1).mean(1)


def test_train_then_evaluate(tiny: SD3, tiny_folder: Path, tmp_path: Path) -> None:
    sampling = genalign.Sampling(3, guidance=1.0)
    before = genalign.evaluate(tiny, PROMPTS, redness, sampling, seeds=2, output=tmp_path / "before")
    assert len(before.records) == 4 and before.overall["reward"].n == 2
    assert (tmp_path / "before" / str(before.records[3].image)).is_file()

    settings = genalign.TrainerSettings(rounds=2, group_size=4, learning_rate=0.1)
    results = genalign.train(
        tiny, {"red": redness}, PROMPTS, settings=settings, sampling=sampling, output=tmp_path / "run"
    )
    assert [result.round for result in results] == [0, 1] and set(results[0].rewards) == {"red"}
    after = genalign.evaluate(tiny, PROMPTS, redness, sampling, seeds=2)
    assert genalign.gain(before, after)["reward"].mean != 0

    # The pipeline samples with the weights that were saved
    reopened = SD3.load(tiny_folder)
    reopened.load_lora(tmp_path / "run" / "lora")
    again = genalign.evaluate(reopened, PROMPTS, redness, sampling, seeds=2)
    assert genalign.gain(after, again)["reward"].mean == pytest.approx(0, abs=1e-6)


def test_nothing_to_evaluate(tiny: SD3) -> None:
    with pytest.raises(ValueError, match="no prompt"):
        genalign.evaluate(tiny, [], redness)
