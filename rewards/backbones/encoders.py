"""What encoders of text and samples into one space share: CLIP for images, CLAP for sound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """What a network sees: ``global_`` (B, d) of the sample, and ``patches`` (B, n, d) of its parts: an image's
    patches in reading order, or the frames of a clip in order of time."""

    global_: Tensor
    patches: Tensor


class TwoTowers(nn.Module, ABC):
    """A frozen text and sample encoder in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self._texts: dict[str, Tensor] = {}

    @abstractmethod
    def _encode(self, texts: list[str]) -> Tensor:
        """Projected embeddings (n, d) of texts, which are cut to the context length."""

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (B, d), float32; each distinct text is encoded once, and alone: in a batch its last bits
        would depend on the others, and on which of them were known before."""
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                self._texts[text] = F.normalize(self._encode([text])[0], dim=-1).cpu()
        return torch.stack([self._texts[text] for text in texts]).to(self.device)

    def reference(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (m, d) of a reference set in words. Raises ValueError for fewer than 2 texts: one has no
        covariance."""
        if len(texts) < 2:
            raise ValueError(f"a reference set in words needs 2 texts or more, got {len(texts)}")
        return self.text(texts)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def projected_text(network: Any, tokenizer: Any, texts: list[str], context: int) -> Tensor:
    """Projected embeddings (n, d) of texts by a transformers CLIP or CLAP, cut to ``context`` tokens."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=context, return_tensors="pt").to(network.device)
    found: Tensor = network.text_projection(network.text_model(tokens.input_ids, tokens.attention_mask).pooler_output)
    return found


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosines (B,) of rows of (B, d) in float32."""
    if left.shape != right.shape or left.ndim != 2:
        raise ValueError(
            f"there must be one prompt per sample: found embeddings {tuple(left.shape)} and {tuple(right.shape)}"
        )
    return F.cosine_similarity(left.float(), right.float(), dim=-1)
