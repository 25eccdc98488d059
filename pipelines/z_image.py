"""Z-Image: a single stream of image and text tokens, and prompts of any length from a chat model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import ZImagePipeline
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipelines.flows import FlowPipeline, even_sigmas


class ZImage(FlowPipeline):
    """A ``ZImagePipeline``.

    Guidance s is that of diffusers and of the model card, p + s (p - n) for predictions p of the prompt and n of the
    negative prompt, which is 1 + s for other families; 1 and less is none. Turbo checkpoints are sampled without.
    """

    kind = ZImagePipeline
    takes_users = False
    guidance_default = 5.0
    text_tokens = 512

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latent pixels of images of 1024 pixels."""
        side = 1024 // int(self.pipe.vae_scale_factor)
        return side, side

    def default_sigmas(self, num_steps: int) -> list[float]:
        """Return T sigmas at equal distances, from 1 to 1 / T."""
        return even_sigmas(num_steps)

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for texts of the greatest length, of which no token is masked."""
        context = self.zeros(count, self.max_sequence_length, self.denoiser.config.cap_feat_dim)
        return {"context": context, "mask": torch.ones(context.shape[:2], dtype=torch.long)}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts (P, tokens, d), with a mask (P, tokens) that is 0 after a text's end."""
        rows, _ = self.pipe.encode_prompt(  # which changes the list that it is given
            list(texts), self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        masks = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
        return {"context": pad_sequence(rows, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity (B, C, h, w); the network predicts its negative, and its time runs from 0 to 1."""
        lengths = tensors["mask"].sum(1).tolist()
        texts = [row[:length] for row, length in zip(tensors["context"], lengths, strict=True)]
        images = self.denoiser(list(x[:, :, None]), (1000 - timestep) / 1000, texts, return_dict=False)[0]
        return -torch.stack(images)[:, :, 0]

    def apply_guidance(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Lead the conditional prediction (B, C, h, w) on by ``guidance`` times its difference from the other."""
        return conditional + guidance * (conditional - unconditional)
