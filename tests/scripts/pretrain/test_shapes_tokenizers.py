"""Every word of the grammar is one token, and no prompt is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from genalign.worlds import shapes
from genalign.worlds.grammar import vocabulary
from scripts.pretrain.shapes_tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer

MADE = [(clip_tokenizer, CLIPTokenizer, CLIP_LENGTH), (t5_tokenizer, T5Tokenizer, T5_LENGTH)]


@pytest.mark.parametrize(("make", "kind", "length"), MADE)
def test_words_are_tokens_and_prompts_fit(make, kind, length: int, tmp_path: Path) -> None:
    tokenizer = make()
    assert [word for word in vocabulary(shapes.prompts) if len(tokenizer.tokenize(word)) != 1] == []
    texts = [prompt.text for suite in shapes.SUITES for prompt in shapes.prompts(suite).prompts]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= length
    tokenizer.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path)(texts).input_ids == tokenizer(texts).input_ids


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_the_numbering_is_always_the_same(make: Callable[[], Any]) -> None:
    assert make().get_vocab() == make().get_vocab()  # a trainer's hash order is another one in every map


def test_an_unknown_word_does_not_end_the_prompt() -> None:
    tokenizer = clip_tokenizer()
    ids = tokenizer("a zebra ☃").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id != tokenizer.eos_token_id
