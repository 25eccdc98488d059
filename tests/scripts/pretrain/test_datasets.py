"""Tokenizers and captioned data sets of both worlds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from genalign.worlds import shapes, tones
from genalign.worlds.grammar import SUITES, vocabulary
from genalign.worlds.shapes.verifier import verify as verify_shapes
from genalign.worlds.tones.verifier import verify as verify_tones
from scripts.pretrain import shapes_dataset, shapes_tokenizers, tones_dataset, tones_models
from scripts.pretrain.captions import require_metadata
from scripts.pretrain.tones_audio import crops
from scripts.pretrain.tones_dataset import CaptionedClips

TOKENIZERS = [
    (shapes_tokenizers.clip_tokenizer, CLIPTokenizer, shapes, shapes_tokenizers.CLIP_LENGTH),
    (shapes_tokenizers.t5_tokenizer, T5Tokenizer, shapes, shapes_tokenizers.T5_LENGTH),
    (tones_models.tokenizer, T5Tokenizer, tones, tones_models.T5_LENGTH),
]


@pytest.mark.parametrize(("make", "kind", "world", "length"), TOKENIZERS)
def test_words_are_tokens_and_prompts_fit(
    make: Callable[[], Any], kind: Any, world: Any, length: int, tmp_path: Path
) -> None:
    tokenizer = make()
    assert [word for word in vocabulary(world.prompts) if len(tokenizer.tokenize(word)) != 1] == []
    texts = [prompt.text for suite in SUITES for prompt in world.prompts(suite).prompts]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= length
    tokenizer.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path)(texts).input_ids == tokenizer(texts).input_ids
    assert make().get_vocab() == tokenizer.get_vocab()  # a trainer's hash order is another one in every map


def test_an_unknown_word_does_not_end_the_prompt() -> None:
    tokenizer = shapes_tokenizers.clip_tokenizer()
    ids = tokenizer("a zebra ☃").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id != tokenizer.eos_token_id


@pytest.mark.slow
def test_captions_of_scenes_are_true_and_do_not_depend_on_the_number_of_workers() -> None:
    one, two = (shapes_dataset.captioned_scenes(64, seed=3, workers=workers) for workers in (1, 2))
    assert torch.equal(one.images, two.images) and one.prompts == two.prompts
    verdicts = verify_shapes(one.images / 255, [require_metadata(prompt) for prompt in one.prompts])
    assert sum(verdict.strict for verdict in verdicts) >= 63


def test_captions_of_clips_are_true_and_crops_are_pieces_of_clips() -> None:
    samples, prompts = tones_dataset._chunk((0, 64, 3))
    data = CaptionedClips(torch.from_numpy(samples), tuple(prompts))
    verdicts = verify_tones(data.floats(torch.arange(64)), [require_metadata(prompt) for prompt in data.prompts])
    assert sum(verdict.strict for verdict in verdicts) >= 63
    one = CaptionedClips(data.waveforms[:1], data.prompts[:1])
    whole = one.floats(torch.tensor([0]))[0, 0].unfold(0, 1920, 1)
    assert all((whole == piece).all(1).any() for piece in crops(one, torch.Generator().manual_seed(0))[:, 0])


@pytest.mark.parametrize(
    ("world", "corrupted", "tasks"),
    [
        (shapes, shapes_dataset.corrupted, {"counting", "colors", "position", "color_attr"}),
        (tones, tones_dataset.corrupted, {"counting", "pitch", "relation", "attribution", "loudness"}),
    ],
)
def test_corruption_never_spells_a_held_out_composition(world: Any, corrupted: Any, tasks: set[str]) -> None:
    rng = np.random.default_rng(0)
    prompts = world.prompts("iid").prompts
    pairs = [(prompt, corrupted(prompt, rng)) for prompt in prompts]
    assert {wrong.text for _, wrong in pairs} <= {prompt.text for prompt in prompts}
    assert all(wrong.task == prompt.task for prompt, wrong in pairs)
    assert {prompt.task for prompt, wrong in pairs if wrong != prompt} == tasks
