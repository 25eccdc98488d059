"""Whatever answers are missing, a headline is that of the images with all their answers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genalign.evaluation.benchmarks import BENCHMARKS, Judges
from genalign.types import Prompt, PromptSet
from tests.genalign.evaluation.benchmarks.table_judges import TableJudge, score_images

TEXTS = [["a?", "b?"], ["c?"], ["d?", "e?", "f?"]]
PER_PROMPT = 2
KEYS = [(image, text) for image in range(PER_PROMPT * len(TEXTS)) for text in TEXTS[image // PER_PROMPT]]


def prompts(name: str) -> PromptSet:
    rows = []
    for n, texts in enumerate(TEXTS):
        metadata = {
            "questions": texts,
            "parents": [[i - 1] if i else [] for i in range(len(texts))],
            "categories": [f"part {i}" for i in range(len(texts))],
            "vqa_list": [[text, "Yes"] for text in texts],
            "skills": ["object"] * len(texts),
            "phrases": [text.rstrip("?") for text in texts],
        }
        tag = {"compbench": "color", "geneval2": f"{n + 3} atoms"}.get(name, name)
        rows.append(Prompt(f"prompt {n}", {"tag": tag, "prompt": f"prompt {n}", **metadata}))
    return PromptSet(name, tuple(rows))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=len(KEYS), max_size=len(KEYS)))
@pytest.mark.parametrize("name", ["compbench", "conceptmix", "dpg", "geneval2"])
def test_incomplete_images_change_no_headline(name: str, answers: list[float | None]) -> None:
    table = {key: answer for key, answer in zip(KEYS, answers, strict=True) if answer is not None}
    judge = TableJudge(table)
    judges = Judges(questions=judge, answers=lambda images, texts, words: judge(images, texts))
    records, numbers = score_images(BENCHMARKS[name], prompts(name), judges, PER_PROMPT)
    complete = [record for record in records if all(key in table for key in KEYS if key[0] == record.seed)]
    assert [record for record in records if math.isfinite(next(iter(record.scores.values())))] == complete
    headline = next(iter(numbers))
    expected = BENCHMARKS[name].aggregate(complete, prompts(name))[headline]
    assert numbers[headline] == pytest.approx(expected, nan_ok=True)
    assert numbers["images left out"] == len(records) - len(complete)
    assert numbers["missing answers"] == answers.count(None)
