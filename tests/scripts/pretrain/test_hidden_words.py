"""Words that are hidden in pretraining: the same ones for every text encoder, and never a special token."""

from __future__ import annotations

import pytest
import torch

from genalign.worlds import shapes, tones
from scripts.pretrain.captions import hidden_words
from scripts.pretrain.shapes_models import ShapesTextToImage
from scripts.pretrain.shapes_tokenizers import T5_LENGTH
from scripts.pretrain.t5 import hide_words
from scripts.pretrain.tones_models import tokenizer


def test_clip_and_t5_miss_the_same_words() -> None:
    model = ShapesTextToImage()
    texts = [prompt.text for suite in ("iid", "comp", "len") for prompt in shapes.prompts(suite).prompts[::5]]
    clip, t5 = model.tokens(texts)
    for place in range(T5_LENGTH):
        hidden = torch.zeros(len(texts), T5_LENGTH, dtype=torch.bool)
        hidden[:, place] = True
        clip_without, t5_without = model.hide(clip, t5, hidden)
        for row, text in enumerate(texts):
            words = text.split()
            known = [word for number, word in enumerate(words) if number != place]
            for tokens, ids in ((model.clip_tokenizer, clip_without), (model.t5_tokenizer, t5_without)):
                unknown = (ids[row] == tokens.unk_token_id).nonzero()[:, 0].tolist()
                first = int(tokens is model.clip_tokenizer)  # CLIP's start token
                assert unknown == ([place + first] if place < len(words) else [])
                assert tokens.decode(ids[row], skip_special_tokens=True).split() == known


def test_tones_lose_words_and_no_end() -> None:
    tokens = tokenizer()
    text = tones.prompts("comp").by_task()["attribution"][0].text
    ids = tokens([text], padding="max_length", return_tensors="pt").input_ids
    everything = hide_words(ids, torch.ones_like(ids, dtype=torch.bool), tokens)
    assert int((everything == tokens.unk_token_id).sum()) == len(text.split())
    assert tokens.eos_token_id in everything


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_third_of_the_words_of_a_share_of_the_captions_is_hidden(share: float) -> None:
    hidden = hidden_words(4000, 8, torch.Generator().manual_seed(0), share)
    rows = hidden.any(1)
    assert abs(float(rows.float().mean()) - share * (1 - (2 / 3) ** 8)) < 0.02
    assert abs(float(hidden[rows].float().mean()) - 1 / 3 / (1 - (2 / 3) ** 8)) < 0.02
