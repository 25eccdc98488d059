"""Prompt files and the order of training."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from genalign.prompts import PromptSampler
from genalign.runtime.prompt_files import load_prompts
from genalign.types import Prompt, PromptSet
from genalign.worlds import shapes


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a cat\n\n  a dog \n")
    loaded = load_prompts(tmp_path / "mine.txt")
    assert loaded.name == "mine" and [prompt.text for prompt in loaded.prompts] == ["a cat", "a dog"]
    assert loaded.prompts[0].task == "all"


def test_geneval_files(tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text('{"tag": "counting", "include": [], "prompt": "two cats"}\n')
    (prompt,) = load_prompts(tmp_path / "g.jsonl").prompts
    assert prompt.text == "two cats" and prompt.task == "counting"


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*none\.txt: give a \.txt \(one prompt a line\)"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompts: write one a line"):
        load_prompts(tmp_path / "empty.txt")
    for line in ("not json", '{"text": "a"}', '{"prompt": 1}'):
        (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(ValueError, match=f'line 2: expected an object with "prompt", found .{line}'):
            load_prompts(tmp_path / "bad.jsonl")


def test_tasks_are_met_in_turn() -> None:
    rounds = list(islice(PromptSampler(shapes.prompts("train"), 12, seed=0).rounds(), 10))
    assert all(len({prompt.text for prompt in chosen}) == 12 for chosen in rounds)
    tasks = Counter(prompt.task for chosen in rounds for prompt in chosen)
    assert set(tasks.values()) == {20}


def test_every_prompt_is_met_before_any_again() -> None:
    prompts = PromptSet("p", tuple(Prompt(str(i)) for i in range(10)))
    rounds = list(islice(PromptSampler(prompts, 5, seed=3).rounds(), 2))
    assert len({prompt.text for chosen in rounds for prompt in chosen}) == 10
    assert rounds == list(islice(PromptSampler(prompts, 5, seed=3).rounds(), 2))
    assert rounds != list(islice(PromptSampler(prompts, 5, seed=4).rounds(), 2))


def test_more_prompts_than_there_are() -> None:
    with pytest.raises(ValueError, match="prompts_per_round is 3, but the prompt set 'p' has 2"):
        PromptSampler(PromptSet("p", (Prompt("a"), Prompt("b"))), 3, 0)
