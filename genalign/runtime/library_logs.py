"""What other libraries log, once and in words that help."""

from __future__ import annotations

import logging
import re


class _Truncation(logging.Filter):
    """Replaces the warnings of prompts that are cut, which quote the padding of each, by one for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the first warning about a length pass, in other words; pass every other record as it is."""
        match = re.search(r"part of your input was truncated because .*?(\d+) tokens", record.getMessage(), re.DOTALL)
        if match is None:
            return True
        first = match[1] not in self.lengths
        self.lengths.add(match[1])
        record.msg, record.args = (
            "a text encoder reads %s tokens of a prompt: the rest of longer ones is cut",
            (match[1],),
        )
        return first


def _is_helpful(record: logging.LogRecord) -> bool:
    """Whether a record of a tokenizer is not about indexing errors, which cannot come: prompts are cut."""
    return not record.getMessage().startswith("Token indices sequence length is longer")


def quiet_libraries() -> None:
    """Hide the progress bars of diffusers and transformers, and warnings that mislead or repeat themselves."""
    from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

    disable_diffusers_bars()
    disable_transformers_bars()
    tokenizers = logging.getLogger("transformers.tokenization_utils_base")
    if _is_helpful not in tokenizers.filters:
        tokenizers.addFilter(_is_helpful)
    for handler in logging.getLogger("diffusers").handlers:
        if not any(isinstance(one, _Truncation) for one in handler.filters):
            handler.addFilter(_Truncation())
