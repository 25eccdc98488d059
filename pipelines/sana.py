"""Sana: a linear transformer on a strongly compressing autoencoder, with a language model for its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from torch import Tensor

from pipelines.flows import FlowPipeline

_GEMMA_LENGTH = 300


class Sana(FlowPipeline):
    """A ``SanaPipeline``. Its checkpoints ship DPM++ 2M; here their shift moves the first-order grid."""

    kind = SanaPipeline
    patch = 1

    def _scheduler(self) -> Any:
        config = self.pipe.scheduler.config
        return FlowMatchEulerDiscreteScheduler.from_config(
            config, shift=config.get("flow_shift", config.get("shift", 1.0))
        )

    def _default_max_tokens(self) -> int:
        return _GEMMA_LENGTH

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """As every family."""
        context = self.zeros(count, self.max_sequence_length, self._config.caption_channels)
        return {"context": context, "mask": torch.ones(context.shape[:2], dtype=torch.long, device=self.device)}

    def _encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """The empty prompt is encoded without the instruction that goes before the others, as diffusers does it."""
        rows = [self._encoded_one(text) for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _encoded_one(self, text: str) -> dict[str, Tensor]:
        context, mask, *_ = self.pipe.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=_instruction() if text else None,
        )
        return {"context": context, "mask": mask}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        velocity: Tensor = self.denoiser(
            x,
            encoder_hidden_states=tensors["context"],
            encoder_attention_mask=tensors["mask"],
            timestep=timestep * self.pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return velocity


def _instruction() -> list[str]:
    """The words that diffusers puts before a prompt."""
    words: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return words
