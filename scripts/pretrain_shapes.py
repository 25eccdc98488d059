"""Train the embedded image model from nothing: an ordinary ``StableDiffusion3Pipeline`` folder.

    python scripts/pretrain_shapes.py --output genalign/assets/shapes-sd3 --work runs/pretrain-shapes

Every stage is seeded and resumes from ``--work``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from genalign.worlds.pretraining import Fit, fit
from genalign.worlds.shapes.dataset import CaptionedScenes, captioned_scenes, corrupted
from genalign.worlds.shapes.tokenizers import CLIP_LENGTH, T5_LENGTH, clip_tokenizer, t5_tokenizer

SCENES = 60_000
VAE = Fit(steps=4000, learning_rate=2e-3)
VAE_BATCH = 32
KL_WEIGHT = 1e-3
TRANSFORMER = Fit(steps=7500, learning_rate=2e-3, muon=0.03)
BATCH = 64
LAYERS, WIDTH = 6, 128
CORRUPTED = 0.35


def build_vae() -> AutoencoderKL:
    """f = 4, four channels, no attention: 0.65M parameters."""
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


def train_vae(data: CaptionedScenes, work: Path, device: str) -> AutoencoderKL:
    """L1 + L2 + KL; the latents' mean and standard deviation become the shift and scaling factors."""
    torch.manual_seed(0)
    vae = build_vae().to(device)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(data.images), (VAE_BATCH,), generator=generator)
        images = (data.images[index].to(device).float() / 127.5) - 1
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        latents = mean + std * torch.randn(mean.shape, generator=generator).to(device)
        with torch.autocast(device, torch.bfloat16):
            decoded = vae.decode(latents).sample.float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return (decoded - images).abs().mean() + (decoded - images).pow(2).mean() + KL_WEIGHT * kl

    fit(vae, loss, VAE, work / "vae.safetensors")
    return vae.eval()


def encode_latents(vae: AutoencoderKL, data: CaptionedScenes, device: str) -> Tensor:
    """Posterior means (N, 4, 16, 16), normalised by the shift and scaling factors that this sets."""
    parts = []
    for images in data.images.split(250):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            parts.append(vae.encode(images.to(device).float() / 127.5 - 1).latent_dist.mean.float().cpu())
    latents = torch.cat(parts)
    shift, scale = float(latents.mean()), float(1 / latents.std())
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (latents - shift) * scale


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


def build_t5(vocabulary_size: int) -> T5EncoderModel:
    """A T5 encoder of two layers; its width is the transformer's context width."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary_size,
            d_model=128,
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


def build_transformer() -> SD3Transformer2DModel:
    """64 image tokens, six joint blocks with normalised queries and keys."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=128,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


class TextToVelocity(nn.Module):
    """The three text encoders and the transformer, wired as ``StableDiffusion3Pipeline`` wires them."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer(), t5_tokenizer()
        self.text_encoder = build_text_encoder(self.clip_tokenizer)
        self.text_encoder_2 = build_text_encoder(self.clip_tokenizer)
        self.text_encoder_3 = build_t5(len(self.t5_tokenizer))
        self.transformer = build_transformer()

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (N, 12) for both CLIP encoders and (N, 8) for T5."""
        clip, t5 = (
            tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            for tokenizer, length in ((self.clip_tokenizer, CLIP_LENGTH), (self.t5_tokenizer, T5_LENGTH))
        )
        return clip.input_ids, t5.input_ids

    def forward(self, x: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity at ``x`` (B, 4, 16, 16) and ``sigma`` (B,)."""
        outputs = [encoder(clip_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        words = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        context = torch.cat([words, self.text_encoder_3(t5_ids).last_hidden_state], dim=1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return self.transformer(x, context, pooled, sigma * 1000).sample

    def matrices(self) -> tuple[nn.Parameter, ...]:
        """Weights of the joint blocks' linear layers."""
        return tuple(
            parameter
            for name, parameter in self.transformer.transformer_blocks.named_parameters()
            if parameter.ndim == 2 and ".norm" not in f".{name}".replace("norm_", ".norm")
        )


def train_transformer(
    data: CaptionedScenes, latents: Tensor, work: Path, settings: Fit, device: str
) -> TextToVelocity:
    """Flow matching with logit-normal noise levels; a part of the captions is wrong, and a tenth is empty."""
    torch.manual_seed(1)
    model = TextToVelocity().to(device)
    rng = np.random.default_rng(2)
    captions = [corrupted(prompt, rng) if rng.random() < CORRUPTED else prompt for prompt in data.prompts]
    clip_ids, t5_ids = model.tokens([caption.text for caption in captions])
    empty_clip, empty_t5 = model.tokens([""])

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        x0 = latents[index]
        eps = torch.randn(x0.shape, generator=generator)
        sigma = torch.sigmoid(0.2 + 1.2 * torch.randn(BATCH, generator=generator))
        drop = torch.rand(BATCH, 1, generator=generator) < 0.1
        clip, t5 = torch.where(drop, empty_clip, clip_ids[index]), torch.where(drop, empty_t5, t5_ids[index])
        x = x0 + sigma.view(-1, 1, 1, 1) * (eps - x0)
        with torch.autocast(device, torch.bfloat16):
            velocity = model(x.to(device), sigma.to(device), clip.to(device), t5.to(device))
        return (velocity.float() - (eps - x0).to(device)).pow(2).mean()

    fit(model, loss, settings, work / "transformer.safetensors", model.matrices())
    return model.eval()


def assemble(model: TextToVelocity, vae: AutoencoderKL, output: Path) -> None:
    """Write an ordinary pipeline folder; transformer and VAE in float16, text encoders in float32."""
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.half(),
        text_encoder=model.text_encoder,
        tokenizer=model.clip_tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.clip_tokenizer,
        text_encoder_3=model.text_encoder_3,
        tokenizer_3=model.t5_tokenizer,
    )
    pipeline.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("genalign/assets/shapes-sd3"))
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain-shapes"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    data = captioned_scenes(SCENES, seed=0)
    vae = train_vae(data, options.work, options.device)
    latents = encode_latents(vae, data, options.device)
    model = train_transformer(data, latents, options.work, TRANSFORMER, options.device)
    assemble(model, vae, options.output)


if __name__ == "__main__":
    main()
