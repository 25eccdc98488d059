"""Stable Diffusion 3 and 3.5, and every folder of the same layout, such as the embedded shapes model."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from pipelines.flows import FlowPipeline


class SD3(FlowPipeline):
    """A ``StableDiffusion3Pipeline``; ``max_sequence_length`` is the number of T5 tokens."""

    kind = StableDiffusion3Pipeline

    @property
    def guidance_default(self) -> float:
        """The guidance scale of the model cards: 7 for SD3, 4.5 for SD3.5 medium and 3.5 for SD3.5 large."""
        config = self.denoiser.config
        if config.qk_norm is None:
            return 7.0
        return 4.5 if config.dual_attention_layers else 3.5

    @property
    def text_tokens(self) -> int:
        """The number of T5 tokens by default: the tokenizer's own maximum, at most diffusers' 256."""
        tokenizer, longest = self.pipe.tokenizer_3, 256
        return longest if tokenizer is None else min(longest, int(tokenizer.model_max_length))

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for CLIP's tokens and T5's together, and for CLIP's pooled text."""
        tokens = self.pipe.tokenizer.model_max_length + self.max_sequence_length
        context = self.zeros(count, tokens, self.denoiser.config.joint_attention_dim)
        return {"context": context, "pooled": self.zeros(count, self.denoiser.config.pooled_projection_dim)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts by CLIP and T5 (P, tokens, d), and pooled by CLIP (P, d)."""
        length = self.max_sequence_length
        context, _, pooled, _ = self.pipe.encode_prompt(
            texts, None, None, self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"context": context, "pooled": pooled}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity (B, C, h, w)."""
        context, pooled = tensors["context"], tensors["pooled"]
        return self.call_denoiser(x, context, pooled_projections=pooled, timestep=timestep)
