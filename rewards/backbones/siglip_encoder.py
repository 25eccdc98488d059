"""SigLIP checkpoints of transformers as frozen encoders of images and texts.

transformers is imported when a checkpoint is opened, not before.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from genalign.types import Precision
from rewards.backbones.clip_encoder import read_preprocessor
from rewards.backbones.encoders import DualEncoder, Features, read_config


class SiglipEncoder(DualEncoder):
    """A SigLIP or SigLIP 2 checkpoint with fixed image size, a folder or Hub id, with its processor beside the weights.

    Images are squashed to the checkpoint's size, as its processor does. Texts are lowered in case and padded to the
    context length, as in its training.
    """

    def __init__(self, model: str, dtype: Precision = "float32") -> None:
        from transformers import AutoTokenizer, SiglipModel

        config = read_config(model, "SigLIP")
        super().__init__(SiglipModel.from_pretrained(model, dtype=torch.float32), dtype)
        self.prepare = read_preprocessor(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.context = int(config.text_config.max_position_embeddings)

    def forward(self, images: Tensor) -> Tensor:
        """Compute embeddings (B, d) of images (B, 3, H, W) in [0, 1], not normalized; differentiable."""
        return self.features(images).global_

    def features(self, images: Tensor) -> Features:
        """Compute embeddings (B, d), and patch tokens (B, n, d) after the last norm; differentiable."""
        output = self.model.vision_model(self.prepare(images).to(self.dtype))
        return Features(output.pooler_output.float(), output.last_hidden_state.float())

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Compute embeddings (n, d) of texts."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        tokens = self.tokenizer([text.lower() for text in texts], **options).to(self.device, non_blocking=True)
        embeddings: Tensor = self.model.text_model(tokens.input_ids).pooler_output
        return embeddings

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the visual transformer, first to last."""
        blocks: nn.ModuleList = self.model.vision_model.encoder.layers
        return blocks

    @property
    def sample_tower(self) -> tuple[nn.Module, ...]:
        return (self.model.vision_model,)


@functools.cache
def load_siglip(model: str, dtype: Precision = "float32") -> SiglipEncoder:
    """Load the SigLIP encoder of a transformers folder or Hub id, once per process and ``dtype``, and shared.

    Raises ValueError for a folder of another kind.
    """
    with torch.random.fork_rng(devices=[]):  # opening draws random numbers, and only the first call opens
        return SiglipEncoder(model, dtype)
