"""The small T5 of the worlds: a tokenizer that knows a grammar's words, and an encoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 128


def word_tokenizer(words: Sequence[str], length: int) -> T5Tokenizer:
    """Build a unigram tokenizer of at most ``length`` tokens.

    Its pieces are ``words``, and single letters for other words.
    """
    letters = [(letter, -10.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    pieces = [(f"▁{word}", -1.0) for word in words if len(word) > 1] + [("▁a", -1.0)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=special + pieces + letters, extra_ids=0, model_max_length=length)


def hide_words(ids: Tensor, hidden: Tensor, tokenizer: T5Tokenizer) -> Tensor:
    """Replace the words of ids (N, length) that a mask (N, length) bool hides by the unknown token."""
    words = (ids != tokenizer.pad_token_id) & (ids != tokenizer.eos_token_id)
    return ids.masked_fill(hidden & words, tokenizer.unk_token_id)


def build_t5(vocabulary_size: int, position_bias: float | None = None) -> T5EncoderModel:
    """A T5 encoder of two layers, ``WIDTH`` wide.

    Args:
        vocabulary_size: The number of tokens.
        position_bias: The standard deviation of the initial biases of attention by relative position, which are all
            that tells the order of words; None leaves T5's, 0.1. So small, a model that has no other text encoder
            learns to read a bag of words, and stays there.
    """
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary_size,
            d_model=WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    if position_bias is not None:
        nn.init.normal_(
            encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=position_bias
        )
    return encoder
