"""Labels by rewards with every kind of noise, and by judges in one order and both."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genalign.reward_learning.annotators import side_choices
from genalign.reward_learning.labeling import (
    JudgeLabeler,
    LabelNoise,
    RewardLabeler,
    SimulatedAnnotator,
    missing_dimensions,
    sample_rate,
    task_key,
    unlabeled,
)
from genalign.reward_learning.preferences import JudgedSample, Judgment, Kind
from genalign.runtime.media import AudioMedium, save_images
from genalign.scoring.judge_orders import OneOrder
from genalign.types import Prompt

LEVELS = 16


@pytest.fixture(scope="module")
def grays(tmp_path_factory: pytest.TempPathFactory) -> list[JudgedSample]:
    """Images of 2 x 2 pixels whose level is n / 15."""
    folder = tmp_path_factory.mktemp("grays")
    paths = [folder / f"{level:02d}.png" for level in range(LEVELS)]
    save_images(torch.linspace(0, 1, LEVELS).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), paths)
    return [JudgedSample(path) for path in paths]


def level(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


def darkness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return 1 - level(samples, prompts)


def only_dark(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    scores = level(samples, prompts)
    return torch.where(scores < 0.5, scores, torch.nan)


def _pairs(grays: list[JudgedSample], prompts: int, annotator: str = "reward") -> list[Judgment]:
    """All pairs of neighbors, the darker first, of some prompts."""
    return [
        Judgment(Prompt(f"prompt {number}"), (darker, brighter), annotator=annotator)
        for number in range(prompts)
        for darker, brighter in itertools.pairwise(grays)
    ]


def _first(judgments: Sequence[Judgment | None]) -> list[float]:
    """The shares of the preference for the first sample."""
    return [judgment.scores["overall"][0] for judgment in judgments if judgment is not None]


def test_the_better_sample_is_preferred_in_each_dimension(grays: list[JudgedSample]) -> None:
    labeler = RewardLabeler({"light": level, "dark": darkness, "half": only_dark})
    first, last = labeler.label([_pairs(grays, 1)[0], _pairs(grays, 1)[-1]])
    assert first is not None and last is not None and first.annotator == "reward"
    assert first.scores == {"light": (0, 1), "dark": (1, 0), "half": (0, 1)}
    assert last.scores == {"light": (0, 1), "dark": (1, 0)}  # the third has no score of bright images
    assert RewardLabeler({"half": only_dark}).label(_pairs(grays, 1)[-1:]) == [None]
    (dark,) = labeler.label([_pairs(grays, 1)[0]], dimensions=("dark",))
    assert dark is not None and dark.scores == {"dark": (1, 0)}
    assert labeler.dimensions == ("light", "dark", "half")


def test_noise_has_its_rates_and_is_the_same_in_any_order(grays: list[JudgedSample]) -> None:
    pairs = _pairs(grays, 40)  # 600
    flipped = _first(RewardLabeler({"overall": level}, LabelNoise(flips=0.2)).label(pairs))
    assert sum(flipped) / len(pairs) == pytest.approx(0.2, abs=0.06)
    tied = _first(RewardLabeler({"overall": level}, LabelNoise(ties=0.3)).label(pairs))
    assert set(tied) == {0.0, 0.5} and tied.count(0.5) / len(pairs) == pytest.approx(0.3, abs=0.06)
    biased = RewardLabeler({"overall": level, "dark": darkness}, LabelNoise(position_bias=0.4)).label(pairs)
    chosen_first = [one.scores["dark"][0] == 1 and one.scores["overall"][0] == 1 for one in biased if one is not None]
    assert sum(chosen_first) / len(pairs) == pytest.approx(0.4, abs=0.06)
    assert _first(RewardLabeler({"overall": level}, LabelNoise(tie_margin=0.1)).label(pairs[:2])) == [0.5, 0.5]

    labeler = RewardLabeler({"overall": level}, LabelNoise(flips=0.2))
    backwards = labeler.label(pairs[::-1])[::-1]
    assert _first(backwards) == flipped and _first(labeler.label(pairs[7:9])) == flipped[7:9]
    assert _first(RewardLabeler({"overall": level}, LabelNoise(flips=0.2, seed=1)).label(pairs)) != flipped


def test_annotators_differ_in_taste_and_errors(grays: list[JudgedSample]) -> None:
    annotators = {
        "ada": SimulatedAnnotator(),
        "bob": SimulatedAnnotator(taste=darkness, weight=3.0),
        "cy": SimulatedAnnotator(noise=LabelNoise(position_bias=1.0)),
    }
    labeler = RewardLabeler({"overall": level}, annotators=annotators)
    comparisons = [Judgment(one.prompt, one.samples) for one in _pairs(grays, 2)]
    tasks = unlabeled(comparisons, labeler.annotator_names)
    judgments = [one for one in labeler.label(tasks) if one is not None]
    assert len(judgments) == len(tasks) == 3 * len(comparisons)
    by_name = {name: {one.scores["overall"] for one in judgments if one.annotator == name} for name in annotators}
    assert by_name == {"ada": {(0, 1)}, "bob": {(1, 0)}, "cy": {(1, 0)}}
    assert [one.annotator for one in side_choices(judgments) if one.one_sided] == ["ada", "bob", "cy"]  # darker first


def test_ratings_labels_and_rankings(grays: list[JudgedSample]) -> None:
    labeler = RewardLabeler({"overall": level}, grades=4, low=0.2, high=1.0, threshold=0.5)

    def asked(kind: Kind, samples: Sequence[JudgedSample]) -> Judgment:
        (judgment,) = labeler.label([Judgment(Prompt("a"), tuple(samples), kind, annotator="reward")])
        assert judgment is not None
        return judgment

    assert asked("rating", grays[::5]).scores["overall"] == (1, 1, 3, 4)  # levels 0, 1/3, 2/3, 1
    assert asked("label", grays[::5]).scores["overall"] == (0, 0, 1, 1)
    assert asked("ranking", grays[::5]).scores["overall"] == pytest.approx((0, 1 / 3, 2 / 3, 1))
    noisy = RewardLabeler({"overall": level}, LabelNoise(flips=1.0), grades=3)
    (rated,) = noisy.label([Judgment(Prompt("a"), tuple(grays), "rating", annotator="reward")])
    assert rated is not None and all(grade in (1, 2, 3) for grade in rated.scores["overall"])
    assert rated.scores["overall"][0] != 1 and rated.scores["overall"][-1] != 3
    with pytest.raises(ValueError, match="label noise is of pairs, ratings and labels"):
        noisy.label([Judgment(Prompt("a"), tuple(grays), "ranking", annotator="reward")])


def test_what_is_to_be_judged(grays: list[JudgedSample]) -> None:
    comparison = Judgment(Prompt("a"), tuple(grays[:3]), "ranking")
    names = ("ada", "bob", "cy")
    assert [len(one.samples) for one in unlabeled([comparison], names[:1])] == [3]
    pairs = unlabeled([comparison], names[:1], "pair")
    assert [one.samples for one in pairs] == [(grays[0], grays[1]), (grays[0], grays[2]), (grays[1], grays[2])]
    overlapping = [comparison, Judgment(Prompt("a"), (grays[2], grays[1]))]
    assert len(unlabeled(overlapping, names[:1], "pair")) == 3 and len(unlabeled(overlapping, names, "rating")) == 9
    drawn = [unlabeled(_pairs(grays, 20), names, per_comparison=1, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 20 * (LEVELS - 1)
    assert min([one.annotator for one in drawn[0]].count(name) for name in names) > 60
    assert task_key(pairs[0]) == task_key(Judgment(Prompt("a"), (grays[1], grays[0]), annotator="ada"))


def test_what_is_missing_is_grouped_by_its_dimensions(grays: list[JudgedSample]) -> None:
    first, second, third, fourth = _pairs(grays, 1, "ada")[:4]
    judged = [
        replace(first, scores={"overall": (1, 0)}),
        replace(first, samples=first.samples[::-1], scores={"style": (0, 1)}),  # another judgment, sides swapped
        replace(second, scores={"overall": (1, 0)}),
        replace(third, annotator="bob", scores={"overall": (1, 0), "style": (1, 0)}),
    ]
    missing = missing_dimensions([first, second, third, fourth], judged, ("overall", "style"))
    assert missing == {("style",): [second], ("overall", "style"): [third, fourth]}


@dataclass
class Written:
    """A judge that prefers the brighter sample unless they are near, when it prefers the first; it says what it saw."""

    def __call__(self, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise AssertionError("it would ask in both orders")

    def in_one_order(self, left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> OneOrder:
        gap = level(left, prompts) - level(right, prompts)
        written = tuple(None if value == 0 else f"gap {value:+.2f}" for value in gap.tolist())
        return OneOrder(torch.where(gap.abs() < 0.1, 0.9, (gap > 0).float()), written)


def test_a_judge_is_asked_in_both_orders_and_its_reasons_are_kept(
    grays: list[JudgedSample], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    samples = [(grays[0], grays[9]), (grays[3], grays[4])]
    pairs = [Judgment(Prompt("a"), pair, annotator="vlm") for pair in samples]
    clear, near = JudgeLabeler({"overall": Written()}, annotator="vlm").label(pairs)
    assert clear is not None and near is not None
    assert clear.scores["overall"] == (0, 1) and near.scores["overall"] == (0.5, 0.5)
    assert clear.reason == "in this order: gap -0.60\n\nin the other order: gap +0.60"
    assert "in 1 of 2 pairs, the others are ties; position bias +0.200" in caplog.text
    once = JudgeLabeler({"overall": Written()}, both_orders=False, annotator="vlm").label(pairs)[1]
    assert once is not None and once.scores["overall"] == pytest.approx((0.9, 0.1)) and once.reason == "gap -0.07"
    both = JudgeLabeler({"overall": Written(), "style": Written()}, both_orders=False, annotator="vlm")
    (style,) = both.label(pairs[:1], dimensions=("style",))
    assert style is not None and style.scores == {"style": (0, 1)} and style.reason == "style: gap -0.60"


def test_any_comparison_is_a_judge(grays: list[JudgedSample]) -> None:
    def brighter(left: Tensor, right: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        sure = level(left, prompts) > 0.1
        return torch.where(sure, (level(left, prompts) > level(right, prompts)).float(), torch.nan)

    pairs = [Judgment(Prompt("a"), (grays[a], grays[b]), annotator="judge") for a, b in ((9, 3), (0, 3))]
    labeled, unanswered = JudgeLabeler({"overall": brighter}).label(pairs)
    assert labeled is not None and labeled.scores == {"overall": (1, 0)} and labeled.reason is None
    assert unanswered is None
    with pytest.raises(ValueError, match="a judge of pairs gives no rating"):
        JudgeLabeler({"overall": brighter}).label([Judgment(Prompt("a"), (grays[0],), "rating", annotator="judge")])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"flips is a probability, in \[0, 1\], not 2"):
        LabelNoise(flips=2)
    with pytest.raises(ValueError, match="tie_margin must be a finite difference"):
        LabelNoise(tie_margin=-1)
    with pytest.raises(ValueError, match="labels need one reward or more"):
        RewardLabeler({})
    with pytest.raises(ValueError, match="low below high"):
        RewardLabeler({"overall": level}, low=1, high=0)
    with pytest.raises(ValueError, match="labels need one judge"):
        JudgeLabeler({})


def test_sounds_have_one_sample_rate(tmp_path: Path, grays: list[JudgedSample]) -> None:
    clips = []
    for rate in (8000, 16000):
        (tmp_path / f"{rate}.wav").write_bytes(AudioMedium(rate).encode(torch.zeros(1, 100)))
        clips.append(JudgedSample(tmp_path / f"{rate}.wav"))
    assert sample_rate([Judgment(Prompt("a"), tuple(grays[:2]))]) is None
    assert sample_rate([Judgment(Prompt("a"), (clips[0],), "rating")]) == 8000
    with pytest.raises(ValueError, match=r"8000\.wav at 8000 Hz, .*16000\.wav at 16000 Hz: give sounds of one"):
        sample_rate([Judgment(Prompt("a"), tuple(clips))])
    with pytest.raises(ValueError, match="and images"):
        sample_rate([Judgment(Prompt("a"), (clips[0], grays[0]))])
