"""The networks of the embedded audio model, and the pipeline folder that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm, weight_norm
from transformers import T5Tokenizer

from genalign.worlds import tones
from genalign.worlds.grammar import vocabulary
from genalign.worlds.tones.instruments import LENGTH, SAMPLE_RATE
from scripts.pretrain.t5 import WIDTH, build_t5, word_tokenizer

T5_LENGTH = 10
LATENT_CHANNELS = 8
HOP = 160  # samples: 20 ms
FRAMES = LENGTH // HOP
HEAD = 64
POSITION_BIAS = 3.0
START_LOGIT = 8.0
SECONDS = LENGTH / SAMPLE_RATE


def tokenizer() -> T5Tokenizer:
    """One token for every word of the grammar."""
    return word_tokenizer(vocabulary(tones.prompts), T5_LENGTH)


def build_vae() -> AutoencoderOobleck:
    """75 frames of 8 channels for a clip: 0.65M parameters.

    Nearly all the time goes into the layers at full rate, so they are 16 wide, and the depth is below: 32 wide at a
    quarter of the rate, 64 at a sixteenth, 128 at the frames'. The encoder's width is twice the latent channels.
    """
    return AutoencoderOobleck(
        encoder_hidden_size=2 * LATENT_CHANNELS,
        downsampling_ratios=[4, 4, 10],
        channel_multiples=[2, 4, 8],
        decoder_channels=16,
        decoder_input_channels=LATENT_CHANNELS,
        audio_channels=1,
        sampling_rate=SAMPLE_RATE,
    )


def scale_latents(vae: AutoencoderOobleck, scale: Tensor) -> None:
    """Fold ``scale`` (channels,) into the weights, so that the latents are multiplied by it and decode as before.

    ``StableAudioPipeline`` has no scaling factor: its scheduler takes latents of unit variance. The posterior's
    softplus(s) is about exp(s) where it is small, hence its shift by log(scale).
    """
    out, into = vae.encoder.conv2, vae.decoder.conv1
    for layer in (out, into):
        remove_weight_norm(layer)
    channels = len(scale)
    with torch.no_grad():
        out.weight[:channels] *= scale.view(-1, 1, 1)
        out.bias[:channels] *= scale
        out.bias[channels:] += scale.log()
        into.weight /= scale.view(1, -1, 1)
    for layer in (out, into):
        weight_norm(layer)


def build_transformer(layers: int = 6, width: int = WIDTH) -> StableAudioDiTModel:
    """A token for every frame, cross-attention to the words, and one token of noise level and duration."""
    return StableAudioDiTModel(
        sample_size=FRAMES,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        num_key_value_attention_heads=width // HEAD,
        cross_attention_dim=WIDTH,
        cross_attention_input_dim=WIDTH,
        time_proj_dim=128,
        global_states_input_dim=2 * WIDTH,
    )


@torch.no_grad()
def attend_to_start(transformer: StableAudioDiTModel) -> None:
    """Initialize a head of the first block so that every frame knows how far it is from the start of the clip.

    ``StableAudioDiTModel`` has only rotary embeddings: what a frame sees does not depend on its position, except
    through the one token before the frames, and training does not discover that path. Without it, either of the two
    events of a prompt may be played first. The logit of this head for that token is ``START_LOGIT`` cos(distance *
    frequency), with the highest rotary frequency that turns by at most pi over a clip. Channel 0 marks the token;
    channel 1 is constant.
    """
    half = HEAD // 4  # half of the rotated dimensions, which are half of a head
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    pair = int((frequencies * FRAMES > torch.pi).sum())
    block = transformer.transformer_blocks[0]
    transformer.proj_in.weight[:2] = 0
    transformer.timestep_proj[2].bias[0] = 4
    block.norm1.bias[1] = 1
    marked = 8.6  # the value of channel 0 at that token, after normalization
    size = (START_LOGIT * HEAD**0.5 / marked) ** 0.5
    for weight, channel in ((block.attn1.to_q.weight, 1), (block.attn1.to_k.weight, 0)):
        weight[[pair, pair + half]] = 0
        weight[pair, channel] = size


def build_scheduler() -> CosineDPMSolverMultistepScheduler:
    """Stable Audio's, with an end that suits latents which hold phases: the last step leaves from sigma 0.03."""
    return CosineDPMSolverMultistepScheduler(sigma_min=0.03, sigma_max=30.0, sigma_data=1.0)


class TonesTextToAudio(nn.Module):
    """Text encoder, projection and transformer, wired as ``StableAudioPipeline`` wires them."""

    def __init__(self, layers: int = 6, width: int = WIDTH) -> None:
        super().__init__()
        self.tokenizer = tokenizer()
        self.text_encoder = build_t5(len(self.tokenizer), POSITION_BIAS)
        self.projection_model = StableAudioProjectionModel(WIDTH, WIDTH, min_value=0, max_value=2)
        self.transformer = build_transformer(layers, width)
        attend_to_start(self.transformer)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and their mask, (N, 10) each."""
        output = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return output.input_ids, output.attention_mask

    def forward(self, z: Tensor, time: Tensor, ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        """Predict v = cos(pi t / 2) eps - sin(pi t / 2) x0 at z = cos(pi t / 2) x0 + sin(pi t / 2) eps.

        Args:
            z: Latents (B, 8, 75) of unit variance.
            time: Times t (B,) in (0, 1).
            ids: Token ids (B, 10) of the prompts.
            mask: Attention mask (B, 10) of the prompts.
            keep: Mask (B,) bool; False for samples without a text, as in classifier-free guidance.
        """
        words = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        words = self.projection_model(text_hidden_states=words).text_hidden_states * mask.unsqueeze(-1)
        span = torch.tensor([0.0, SECONDS], device=z.device).expand(len(z), 2)
        output = self.projection_model(start_seconds=span[:, 0], end_seconds=span[:, 1])
        seconds = [output.seconds_start_hidden_states, output.seconds_end_hidden_states]
        velocity: Tensor = self.transformer(
            z,
            time,
            encoder_hidden_states=torch.cat([words, *seconds], dim=1) * keep.view(-1, 1, 1),
            global_hidden_states=torch.cat(seconds, dim=2),
            rotary_embedding=get_1d_rotary_pos_embed(
                HEAD // 2, FRAMES + 1, use_real=True, repeat_interleave_real=False
            ),
        ).sample
        return velocity

    def matrices(self) -> tuple[nn.Parameter, ...]:
        """Weights of the transformer blocks' linear layers, except those that ``attend_to_start`` initializes.

        Muon changes all directions of a matrix equally fast and would erase that initialization.
        """
        blocks = self.transformer.transformer_blocks
        initialized = {id(blocks[0].attn1.to_q.weight), id(blocks[0].attn1.to_k.weight)}
        matrices = (parameter for parameter in blocks.parameters() if parameter.ndim == 2)
        return tuple(parameter for parameter in matrices if id(parameter) not in initialized)


def assemble(model: TonesTextToAudio, vae: AutoencoderOobleck, output: Path) -> None:
    """Write an ordinary pipeline folder; transformer in float16, the rest in float32."""
    model.transformer.register_to_config(_guidance_scale=1.0)  # genalign's default for it
    pipeline = StableAudioPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        projection_model=model.projection_model,
        tokenizer=model.tokenizer,
        transformer=model.transformer.half(),
        scheduler=build_scheduler(),
    )
    pipeline.save_pretrained(output)
