"""Stable Diffusion 3 and 3.5, and every folder of the same layout, such as the embedded shapes model."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from pipelines.flows import FlowPipeline

_DIFFUSERS_T5_LENGTH = 256


class SD3(FlowPipeline):
    """A ``StableDiffusion3Pipeline``. ``max_sequence_length`` is the number of T5 tokens: the tokenizer's own maximum,
    at most diffusers' 256, unless given.
    """

    kind = StableDiffusion3Pipeline

    def _default_max_tokens(self) -> int:
        tokenizer = self.pipe.tokenizer_3
        return _DIFFUSERS_T5_LENGTH if tokenizer is None else min(_DIFFUSERS_T5_LENGTH, int(tokenizer.model_max_length))

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """CLIP's tokens, then T5's."""
        tokens, config = self.pipe.tokenizer.model_max_length + self.max_sequence_length, self._config
        context = self.zeros(count, tokens, config.joint_attention_dim)
        return {"context": context, "pooled": self.zeros(count, config.pooled_projection_dim)}

    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        context, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"context": context, "pooled": pooled}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        velocity: Tensor = self.denoiser(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=tensors["context"],
            pooled_projections=tensors["pooled"],
            return_dict=False,
        )[0]
        return velocity
