"""Word-level tokenizers of the shapes world, in the formats of CLIP and T5."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from genalign.worlds.grammar import vocabulary
from genalign.worlds.shapes.prompts import prompts
from scripts.pretrain.t5 import word_tokenizer

CLIP_LENGTH = 12
T5_LENGTH = 8
_CLIP_SPECIAL = ("<|unk|>", "<|pad|>", "<|startoftext|>", "<|endoftext|>")
_LAST_LETTERS = tuple(f"{letter}</w>" for letter in sorted({word[-1] for word in vocabulary(prompts)}))


def clip_tokenizer() -> CLIPTokenizer:
    """Build a byte-level BPE tokenizer with merges for every word of the grammar.

    Its unknown token differs from the end token, and it is the same in every process.
    """
    bpe = Tokenizer(models.BPE(unk_token=_CLIP_SPECIAL[0], end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=[*_CLIP_SPECIAL, *_LAST_LETTERS],  # else the trainer numbers the latter in hash order
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    texts = [prompt.text for suite in ("iid", "comp", "len") for prompt in prompts(suite).prompts]
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    unknown, pad, start, end = _CLIP_SPECIAL
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        model_max_length=CLIP_LENGTH,
    )


def t5_tokenizer() -> T5Tokenizer:
    """A unigram model whose pieces are the words of the grammar and the letters, for words it does not know."""
    return word_tokenizer(vocabulary(prompts), T5_LENGTH)
