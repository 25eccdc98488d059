"""BLIP's visual question answering (arXiv:2201.12086), which judges attributes in T2I-CompBench (arXiv:2307.06350)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genalign.types import Precision
from rewards.backbones.pixels import pictures
from rewards.backbones.weight_files import load_frozen

_LONGEST_QUESTION = 35  # tokens, as in the original


@dataclass(frozen=True)
class BlipVqa:
    """A ``QuestionJudge``: P(yes) / (P(yes) + P(no)) of the first token of BLIP's answer, as in T2I-CompBench.

    ``model`` is a folder or Hub id of transformers' BlipForQuestionAnswering and its processor. The original has the
    authors' own checkpoint of ViT-B at 480 pixels; "Salesforce/blip-vqa-base" is that of transformers. Questions of one
    length form a batch, so an answer does not depend on its batch. Loaded at the first call, with weights of
    ``dtype``; then follows the images' device.
    """

    model: str = "Salesforce/blip-vqa-base"
    batch_size: int = 16
    dtype: Precision = "float32"

    @torch.no_grad()
    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Answer questions (n) about images (n, 3, H, W) in [0, 1] as (n,) in float32; NaN for an image with NaN."""
        network, processor = load_frozen(self.model, "BlipForQuestionAnswering", "BlipProcessor", self.dtype)
        network.to(images.device)
        tokens, by_length = list[list[int]](), dict[int, list[int]]()
        listed = pictures(images)
        for row, (picture, question) in enumerate(zip(listed, questions, strict=True)):
            ids = processor.tokenizer(question, truncation=True, max_length=_LONGEST_QUESTION).input_ids
            tokens.append([network.config.text_config.bos_token_id + 1, *ids[1:]])  # [ENC] begins a question
            if picture is not None:
                by_length.setdefault(len(ids), []).append(row)
        answered, size = list[Tensor](), self.batch_size
        batches = [rows[i : i + size] for _, rows in sorted(by_length.items()) for i in range(0, len(rows), size)]
        for rows in batches:
            pixels = processor.image_processor([listed[row] for row in rows], return_tensors="pt").pixel_values
            texts = torch.tensor([tokens[row] for row in rows])
            pixels, texts = (part.to(images.device, non_blocking=True) for part in (pixels, texts))
            answered.append(_probability_of_yes(network, processor, pixels.to(network.dtype), texts))
        answers = torch.full((len(images),), torch.nan)
        if batches:
            answers[[row for rows in batches for row in rows]] = torch.cat(answered).cpu()
        return answers.to(images.device, non_blocking=True)


def _probability_of_yes(network: Any, processor: Any, pixels: Tensor, questions: Tensor) -> Tensor:
    """Compute P(yes) / (P(yes) + P(no)), (b,), for preprocessed pixels and tokens (b, L) of questions."""
    image = network.vision_model(pixel_values=pixels).last_hidden_state
    mask = torch.ones_like(questions)
    states = network.text_encoder(questions, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
    start = questions.new_full((len(questions), 1), network.decoder_start_token_id)
    output = network.text_decoder(start, encoder_hidden_states=states, encoder_attention_mask=mask)
    words = [processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    probabilities: Tensor = output.logits[:, 0].float()[:, words].softmax(-1)[:, 0]
    return probabilities
