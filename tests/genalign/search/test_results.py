"""What a search returns: it prints, saves and tiles itself, and a reward that never scores ends it by name."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genalign.diffusion.transitions import DDIM
from genalign.runtime.media import read_image, read_waveform
from genalign.scoring.budget import Ledger
from genalign.scoring.score import NamedReward, RewardError
from genalign.search import (
    DNO,
    Beam,
    BestOfN,
    Budget,
    Evolution,
    FKSteering,
    Prune,
    ReNO,
    SearchResult,
    ZeroOrder,
    search,
)
from genalign.search.results import PlainSample, PromptResult
from genalign.search.strategy import Strategy
from genalign.types import Prompt
from pipelines import SD3
from tests.genalign.search.tiny_searches import PROMPTS, SAMPLING, redness

INCLUDED: dict[str, Strategy] = {
    "best of n": BestOfN(4),
    "zero-order": ZeroOrder(1, 2),
    "evolution": Evolution((0, 2), (3, 2), 2),
    "reno": ReNO(2),
    "pruning that keeps the first": Prune((1,), (1.0,), 2),
}
APART: dict[str, Strategy] = {
    "best of n by a stochastic kernel": BestOfN(3, DDIM(1.0)),
    "beam": Beam(1, 2),
    "FK steering": FKSteering(3, lam=0.0),
    "dno": DNO(2),
    "reno after a search": ReNO(2, initial_search=Beam(1, 2)),
}


@pytest.mark.parametrize("name", [*INCLUDED, *APART])
def test_gain_is_over_the_plain_sample_of_the_first_noise(tiny: SD3, name: str) -> None:
    """It is a candidate of the search where the search makes it, and counted separately where it does not."""
    strategy = {**INCLUDED, **APART}[name]
    result = search(tiny, PROMPTS, redness, strategy, sampling=SAMPLING)
    alone = search(tiny, PROMPTS, redness, BestOfN(1), sampling=SAMPLING)
    for one, sample, scores in zip(result.per_prompt, alone.samples, alone.scores, strict=True):
        assert one.plain is not None and one.plain.extra == (name in APART)
        torch.testing.assert_close(one.plain.sample, sample, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.gain, one.scores[0] - scores, rtol=0, atol=1e-5)
        assert one.plain.ledger.counts == {"nfe": 5, "decode": 1, "reward/reward": 1}
    assert result.plain_ledger.nfe == (2 * 5 if name in APART else 0)


def test_result_holds_the_best_four_with_the_chosen_one_first(tiny: SD3) -> None:
    result = search(tiny, PROMPTS, redness, BestOfN(6), sampling=SAMPLING)
    finished = [
        sorted((node["scores"][-1][1][0] for node in result.lineage if node["prompt"] == place), reverse=True)
        for place in range(2)
    ]
    for one, scores in zip(result.per_prompt, finished, strict=True):
        assert one.scores[:, 0].tolist() == pytest.approx(scores[:4])
        assert torch.equal(one.scores[:, 0], redness(one.samples, []))
    drawn = search(tiny, PROMPTS, redness, FKSteering(5, terminal="weighted", lam=0.0), sampling=SAMPLING)
    for place, one in enumerate(drawn.per_prompt):
        chosen = drawn.lineage[drawn.winners[place]]["scores"][-1][1]
        assert one.scores[0].tolist() == pytest.approx(chosen) and len(one.scores) == 4
        assert torch.equal(one.scores[1:, 0].sort(descending=True).values, one.scores[1:, 0])


def result_of(
    *scores: float, extra: bool = True, plain: float = 0.25, rewards: tuple[str, ...] = ("red",)
) -> SearchResult:
    """A search of two prompts by hand, whose samples are images of one color each."""
    samples = torch.stack([torch.full((3, 8, 8), value).nan_to_num() for value in scores])
    column = torch.tensor(scores)[:, None].expand(-1, len(rewards))
    base = PlainSample(
        torch.full((3, 8, 8), plain), torch.full((len(rewards),), plain), Ledger(Counter({"nfe": 20})), extra
    )
    ledger = Ledger(Counter({"nfe": 160, "decode": 40, "reward/red": 40}))
    one = PromptResult(Prompt("a red circle"), rewards, samples, column, base, ledger, 3.25)
    two = PromptResult(Prompt("a ring"), rewards, samples, column - 0.125, base, ledger, 1.0)
    return SearchResult((one, two), [], (0, 1))


def test_print_has_the_gain_with_both_costs_and_no_pixels() -> None:
    result = result_of(0.5, 0.375)
    assert str(result).splitlines() == [
        "a red circle: red 0.5 (+0.25) over plain sampling; 160 NFE, 40 decodes, 3.2 s (plain: 20 NFE, counted apart)",
        "a ring: red 0.375 (+0.125) over plain sampling; 160 NFE, 40 decodes, 1.0 s (plain: 20 NFE, counted apart)",
        "mean of 2 prompts: red 0.4375 (+0.1875) over plain sampling; 320 NFE, 80 decodes, 4.2 s in all, and 40 NFE for"
        " plain samples",
    ]
    assert repr(result) == str(result) and repr(result.per_prompt) != ""
    assert "tensor" not in repr(result.per_prompt)
    assert "(plain: 20 NFE, among them)" in str(result_of(0.5, extra=False))
    assert "red failed, blue failed over plain sampling" in str(result_of(math.nan, rewards=("red", "blue")))


def test_save_writes_the_samples_with_the_plain_one_and_all_scores(tmp_path: Path) -> None:
    folder = result_of(0.5, 0.375, math.nan).save(tmp_path / "new" / "found")
    first, second = json.loads((folder / "scores.json").read_text())
    assert (
        first["prompt"] == "a red circle" and first["scores"] == {"red": 0.5} and first["image"] == "images/00000.png"
    )
    assert first["plain"] == {
        "scores": {"red": 0.25},
        "image": "plain/images/00000.png",
        "calls": {"nfe": 20},
        "extra": True,
    }
    assert [row["scores"]["red"] for row in second["top"]] == [0.25, None]
    assert second["top"][0]["image"] == "top/00001/images/00001.png"
    files = [row["image"] for row in (first, second, *first["top"], *second["top"], first["plain"], second["plain"])]
    assert len(set(files)) == 8 == len(list(folder.rglob("*.png"))) and all((folder / name).is_file() for name in files)
    torch.testing.assert_close(
        read_image(folder / first["top"][0]["image"])[0, 0, 0], torch.tensor(0.375), atol=2e-3, rtol=0
    )
    assert json.loads((folder / "lineage.json").read_text()) == {"chosen": [0, 1], "lives": []}


def test_images_and_grid() -> None:
    result = result_of(0.5, 0.375)
    assert [image.size for image in result.pil] == [(8, 8)] * 2 and len(result.per_prompt[0].pil) == 2
    grid = np.asarray(result.grid())
    assert grid.shape == (16, 24, 3)  # of each prompt the plain sample, the best and the second
    assert [int(grid[0, column, 0]) for column in (0, 8, 16)] == [64, 128, 96]


def test_waveforms_are_arrays_and_files_at_their_rate(tmp_path: Path) -> None:
    wave = torch.linspace(-0.5, 0.5, 64).expand(1, 2, -1)
    one = PromptResult(Prompt("a tone"), ("loud",), wave, torch.ones(1, 1), None, Ledger(Counter({"nfe": 4})), 1.0)
    assert str(one) == "a tone: loud 1; 4 NFE, 0 decodes, 1.0 s"
    result = SearchResult((one,), [], (0,), sample_rate=8000)
    assert result.pil[0].shape == (2, 64) and result.pil[0].dtype == np.float32
    read = read_waveform(result.save(tmp_path) / "audio" / "00000.wav")
    assert read.sample_rate == 8000
    torch.testing.assert_close(read.waveform, wave[0], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="sample rate of these waveforms is not known"):
        SearchResult((one,), [], (0,)).save(tmp_path)
    with pytest.raises(ValueError, match="a grid is of images"):
        result.grid()


# --- rewards that never score -----------------------------------------------------------------------------------------


class FailsLater:
    """A reward that scores the check before a search, and nothing afterwards."""

    def __init__(self, failure: str) -> None:
        self.failure, self.calls = failure, 0

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.calls += 1
        if self.calls > 3:
            if self.failure == "raises":
                raise KeyError("color")
            return torch.full((len(samples),), math.nan)
        return redness(samples, prompts)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("raises", r"it raised KeyError: 'color' \(test_results\.py:\d+\)"),
        ("returns NaN", "it returned NaN or infinite scores"),
    ],
)
@pytest.mark.parametrize(
    "strategy", [BestOfN(3), FKSteering(3), Prune((1,), (0.5,), 3), Evolution((0, 1), (2, 2))], ids=repr
)
def test_a_reward_that_never_scores_ends_the_search(tiny: SD3, strategy: Strategy, failure: str, message: str) -> None:
    rewards = [NamedReward("red", redness), NamedReward("moody", FailsLater(failure))]
    with pytest.raises(RewardError, match=f"reward 'moody' scored none of the samples of 'a circle': {message}"):
        search(tiny, PROMPTS, rewards, strategy, sampling=SAMPLING)


def test_a_reward_that_fails_at_once_is_named_with_its_line(tiny: SD3) -> None:
    with pytest.raises(
        RewardError, match=r"'reward' failed on a first batch: KeyError: 'color' \(test_results\.py:\d+\)"
    ):
        reward = FailsLater("raises")
        reward.calls = 3
        search(tiny, PROMPTS, reward, BestOfN(2), sampling=SAMPLING)


def test_a_plain_function_and_lists_of_strings_are_taken(tiny: SD3) -> None:
    for prompts in ("a circle", ["a circle", "a ring"], (Prompt("a circle"),)):
        assert len(search(tiny, prompts, redness, BestOfN(1), sampling=SAMPLING).per_prompt) in (1, 2)

    def words(samples: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(prompt.split())) for prompt in prompts])

    assert search(tiny, ["a red circle"], words, BestOfN(1), sampling=SAMPLING).scores.tolist() == [[3.0]]


# --- every search ends ------------------------------------------------------------------------------------------------


@patch("genalign.search.strategy._MOST", 2**8)  # counting thousands of candidates takes a second
@settings(max_examples=30, deadline=None)
@given(
    nfe=st.one_of(st.integers(1, 200), st.floats(1e-300, 1e300), st.just(math.inf)),
    strategy=st.sampled_from(["best", "prune", "fk", "beam", "zero"]),
    keep=st.floats(0.01, 1.0),
)
def test_every_budget_is_planned_or_refused(nfe: float, strategy: str, keep: float) -> None:
    from tests.genalign.search.tiny_searches import Gauss, plan

    strategies: dict[str, Strategy] = {
        "best": BestOfN(),
        "prune": Prune((0, 2), (keep, keep)),
        "fk": FKSteering(None, lam=1.0),
        "beam": Beam(1, None),
        "zero": ZeroOrder(),
    }
    if strategy == "zero":
        nfe = min(nfe, 400.0)  # its rounds are counted one by one, 2 ms each
    try:
        ledger = plan(Gauss(), strategies[strategy], Budget(nfe=nfe))
    except ValueError as error:
        assert "budget" in str(error)
    else:
        assert 0 < ledger.nfe <= nfe
