"""Pairs, votes and truth as judgments state them, and items found by hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from genalign.reward_learning.examples import Examples, examples, prompt_numbers
from genalign.reward_learning.judged_pairs import (
    annotator_votes,
    item_grades,
    judged_pairs,
    training_items,
    win_shares,
    wins_over_several,
)
from genalign.reward_learning.preferences import JudgedSample, Judgment
from genalign.types import Prompt


@pytest.fixture
def samples(tmp_path: Path) -> list[JudgedSample]:
    for number in range(4):
        Image.new("RGB", (4, 4), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return [JudgedSample(tmp_path / f"{number}.png") for number in range(4)]


def _pair(two: tuple[JudgedSample, JudgedSample], first: float, name: str, dimension: str = "overall") -> Judgment:
    return Judgment(Prompt("a"), two, "pair", {dimension: (first, 1 - first)}, name)


def test_judgments_of_a_pair_are_one_pair_whichever_was_first(samples: list[JudgedSample]) -> None:
    one, two, three, _ = samples
    said = [_pair((one, two), 1.0, "ada"), _pair((two, one), 1.0, "bob"), _pair((one, two), 1.0, "cy")]
    said += [_pair((three, one), 0.5, "ada"), _pair((two, three), 0.0, "ada", "quality")]
    data = examples(said)
    pairs = judged_pairs(data, "overall")
    assert pairs.rows.tolist() == [[0, 1], [0, 2]]
    assert pairs.preferred.tolist() == pytest.approx([2 / 3, 0.5]) and pairs.margin.tolist() == pytest.approx(
        [1 / 3, 0]
    )
    assert judged_pairs(data, "quality").rows.tolist() == [[1, 2]]
    votes = annotator_votes(data, "overall", pairs)
    assert votes.annotators == ("ada", "bob", "cy", "ada") and votes.pair.tolist() == [0, 0, 0, 1]
    assert votes.preferred.tolist() == [1.0, 0.0, 1.0, 0.5]


def _rated(samples: list[JudgedSample]) -> Examples:
    def rating(name: str | None, text: str, *grades: float) -> Judgment:
        return Judgment(Prompt(text), tuple(samples[: len(grades)]), "rating", {"overall": grades}, name)

    said = [rating("ada", "a", 1.0, 3.0, 3.0), rating("bob", "a", 5.0, 4.0), rating(None, "b", 2.0, 2.0)]
    return examples(said)


def test_ratings_become_pairs_of_mean_grades_and_votes_of_each_annotators_own(samples: list[JudgedSample]) -> None:
    data = _rated(samples)
    assert item_grades(data, "overall").tolist() == [3.0, 3.5, 3.0, 2.0, 2.0]
    assert prompt_numbers(data.items).tolist() == [0, 0, 0, 1, 1]
    pairs = judged_pairs(data, "overall")
    assert pairs.rows.tolist() == [[0, 1], [0, 2], [1, 2], [3, 4]]
    assert pairs.preferred.tolist() == [0.0, 0.5, 1.0, 0.5] and pairs.margin.tolist() == [0.5, 0.0, 0.5, 0.0]
    votes = annotator_votes(data, "overall", pairs)
    said = dict(zip(zip(votes.annotators, votes.pair.tolist(), strict=True), votes.preferred.tolist(), strict=True))
    assert said == {("ada", 0): 0.0, ("ada", 1): 0.0, ("ada", 2): 0.5, ("bob", 0): 1.0}


def test_complete_rankings_say_what_samples_are_worth(samples: list[JudgedSample]) -> None:
    ranking = Judgment(Prompt("a"), tuple(samples[:3]), "ranking", {"overall": (1.0, 5.0, 1.0)})
    partial = [
        Judgment(Prompt("b"), (samples[i], samples[j]), "pair", {"overall": (1.0, 0.0)}) for i, j in ((0, 1), (1, 2))
    ]
    data = examples([ranking, *partial])
    pairs = judged_pairs(data, "overall")
    shares = win_shares(pairs, prompt_numbers(data.items))
    assert shares[:3].tolist() == [0.25, 1.0, 0.25] and bool(shares[3:].isnan().all())
    assert pairs.margin[:3].tolist() == [4.0, 0.0, 4.0]


def test_a_winner_stands_against_several_where_not_all_were_compared(samples: list[JudgedSample]) -> None:
    one, two, three, four = samples
    said = [_pair((two, one), 0.0, "ada"), _pair((one, three), 1.0, "ada"), _pair((one, four), 0.5, "ada")]
    said += [Judgment(Prompt("b"), (two, three), "pair", {"overall": (1.0, 0.0)}, "ada")]  # one against one
    said += [Judgment(Prompt("c"), (one, two, three), "ranking", {"overall": (3.0, 2.0, 1.0)})]  # complete
    data = examples(said)
    pairs = judged_pairs(data, "overall")
    (places,) = wins_over_several(pairs, prompt_numbers(data.items))
    won = [{data.items[row].sample for row in pairs.rows[place].tolist()} for place in places]
    assert won == [{one, two}, {one, three}]


def test_a_ranking_without_a_dimension_is_no_tie_in_it(samples: list[JudgedSample]) -> None:
    said = [Judgment(Prompt("a"), tuple(samples[:2]), "ranking", {name: (1.0, 2.0)}) for name in ("overall", "quality")]
    preferred = examples(said).pairs.preferred
    assert preferred.isnan().tolist() == [[False, True], [True, False]]
    assert judged_pairs(examples(said), "overall").preferred.tolist() == [0.0]


def test_the_list_of_training_items(tmp_path: Path) -> None:
    (tmp_path / "training_items.json").write_text(json.dumps([{"digest": "ab", "prompt": "a"}, {"digest": "cd"}]))
    for path in (tmp_path, tmp_path / "reward.safetensors", tmp_path / "training_items.json"):
        assert training_items(path) == {"ab", "cd"}
    (tmp_path / "other.json").write_text('{"digest": "ab"}')
    with pytest.raises(ValueError, match="lists no items"):
        training_items(tmp_path / "other.json")
