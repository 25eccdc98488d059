"""The networks of the embedded image model, and the pipeline folder that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from scripts.pretrain.shapes_tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer
from scripts.pretrain.t5 import build_t5, hide_words

HEAD = 64
SHIFT = 3.0  # of the noise levels of sampling, as in Stable Diffusion 3: ten steps draw better than even ones


def build_vae() -> AutoencoderKL:
    """F = 4, four channels, no attention: 0.65M parameters."""
    blocks = 3
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A causal CLIP text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_transformer(layers: int = 6, width: int = 128) -> SD3Transformer2DModel:
    """64 image tokens, joint blocks with normalized queries and keys, and heads as wide as CPUs are fast with."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=128,
        caption_projection_dim=width,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


class ShapesTextToImage(nn.Module):
    """The three text encoders and the transformer, wired as ``StableDiffusion3Pipeline`` wires them."""

    def __init__(self, layers: int = 6, width: int = 128) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer(), t5_tokenizer()
        self.text_encoder = build_text_encoder(self.clip_tokenizer)
        self.text_encoder_2 = build_text_encoder(self.clip_tokenizer)
        self.text_encoder_3 = build_t5(len(self.t5_tokenizer))
        self.transformer = build_transformer(layers, width)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (N, 12) for both CLIP encoders and (N, 8) for T5."""
        clip, t5 = (
            tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            for tokenizer, length in ((self.clip_tokenizer, CLIP_LENGTH), (self.t5_tokenizer, T5_LENGTH))
        )
        return clip.input_ids, t5.input_ids

    def hide(self, clip_ids: Tensor, t5_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the words that a mask (N, 8) bool hides by the unknown token, in ids (N, 12) and (N, 8)."""
        t5 = hide_words(t5_ids, hidden, self.t5_tokenizer)
        in_clip = F.pad(t5 != t5_ids, (1, CLIP_LENGTH - T5_LENGTH - 1))  # after the start token; both have one a word
        return clip_ids.masked_fill(in_clip, self.clip_tokenizer.unk_token_id), t5

    def forward(self, x: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity at ``x`` (B, 4, 16, 16) and ``sigma`` (B,)."""
        outputs = [encoder(clip_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        words = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        context = torch.cat([words, self.text_encoder_3(t5_ids).last_hidden_state], dim=1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        velocity: Tensor = self.transformer(x, context, pooled, sigma * 1000).sample
        return velocity

    def matrices(self) -> tuple[nn.Parameter, ...]:
        """Weights of the joint blocks' linear layers."""
        return tuple(
            parameter
            for name, parameter in self.transformer.transformer_blocks.named_parameters()
            if parameter.ndim == 2 and ".norm" not in f".{name}".replace("norm_", ".norm")
        )


def assemble(model: ShapesTextToImage, vae: AutoencoderKL, output: Path) -> None:
    """Write an ordinary pipeline folder; transformer and VAE in float16, text encoders in float32."""
    model.transformer.register_to_config(_guidance_scale=1.0)  # genalign's default for it
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.half(),
        text_encoder=model.text_encoder,
        tokenizer=model.clip_tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.clip_tokenizer,
        text_encoder_3=model.text_encoder_3,
        tokenizer_3=model.t5_tokenizer,
    )
    pipeline.save_pretrained(output)
