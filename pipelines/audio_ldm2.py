"""AudioLDM 2: latent diffusion of mel spectrograms, with a vocoder from these to waveforms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from diffusers import AudioLDM2Pipeline, DiffusionPipeline, Transformer2DModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from genalign.diffusion.hypernetwork import GatedBlock
from pipelines.audio_base import AudioPipeline
from pipelines.noise_schedules import ScheduledPipeline, VPSchedule
from pipelines.options import Options


class AudioLDM2(AudioPipeline, ScheduledPipeline):
    """An ``AudioLDM2Pipeline`` for sound and music; latents (B, C, frames, bands) are of mel spectrograms.

    The language model extends a text by tokens whose places depend on the padding of its batch, and diffusers cuts and
    pads the negative prompt to the length of the prompt: so each prompt is encoded alone, together with what guidance
    leads away from, as diffusers does for one prompt. A sample is the same alone and in any batch. Adapters are in the
    format of PEFT, since the pipeline of diffusers has no loader.
    """

    kind = AudioLDM2Pipeline
    denoiser_name = "unet"
    guidance_default = 3.5
    encoders = ("text_encoder", "text_encoder_2", "projection_model", "language_model")
    decoders = ("vae", "vocoder")
    lora_in_diffusers = False
    unconditional = None

    def __init__(self, pipe: DiffusionPipeline, **options: Unpack[Options]) -> None:
        super().__init__(pipe, **options)
        if self.memory.checkpointing:
            self.denoiser.enable_gradient_checkpointing(_checkpointed)

    @property
    def schedule(self) -> VPSchedule:
        """The noise schedule of the checkpoint's scheduler."""
        return VPSchedule(self.pipe.scheduler)

    @property
    def text_tokens(self) -> int:
        """The number of T5 tokens at most."""
        return int(self.pipe.tokenizer_2.model_max_length)

    @property
    def hop_seconds(self) -> float:
        """The duration in seconds of one frame of the mel spectrogram."""
        return int(math.prod(self.pipe.vocoder.config.upsample_rates)) / self.sample_rate

    @property
    def own_seconds(self) -> float:
        """The duration in seconds of the network's own number of frames."""
        return float(self.denoiser.config.sample_size * self.pipe.vae_scale_factor * self.hop_seconds)

    @property
    def frames(self) -> int:
        """The number of latent frames of ``seconds``, rounded up from whole frames of the mel spectrogram."""
        return math.ceil(int(self.seconds / self.hop_seconds) / int(self.pipe.vae_scale_factor))

    @property
    def sample_rate(self) -> int:
        """The sample rate of the waveforms in Hz."""
        return int(self.pipe.vocoder.config.sampling_rate)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape (C, frames, bands) of one sample's latents."""
        bands = int(self.pipe.vocoder.config.model_in_dim) // int(self.pipe.vae_scale_factor)
        return self.latent_channels, self.frames, bands

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape (1, L) of a waveform that is cut to ``seconds``."""
        whole = self.frames * int(self.pipe.vae_scale_factor) * math.prod(self.pipe.vocoder.config.upsample_rates)
        return 1, min(whole, int(self.seconds * self.sample_rate))

    def longest_conditioning(self, count: int) -> dict[str, Tensor]:
        """Return zeros for T5's tokens and those of the language model, and for what guidance leads away from."""
        language = self.pipe.language_model.config
        generated = self.zeros(count, language.max_new_tokens, language.n_embd)
        context = self.zeros(count, self.text_tokens, self.pipe.text_encoder_2.config.d_model)
        mask = torch.ones(context.shape[:2], dtype=torch.long, device=self.device)
        own = {"context": context, "mask": mask, "generated": generated}
        return {**own, **{f"negative_{name}": tensor for name, tensor in own.items()}}

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Encode texts one by one: T5's tokens (P, tokens, d), their mask, and tokens of the language model (P, 8, e).

        The same for the negative prompt, cut and padded to the length of each text.
        """
        rows: dict[str, list[Tensor]] = {}
        negative = [self.negative_prompt] if self.negative_prompt else None
        for text in texts:
            both = self.pipe.encode_prompt([text], self.device, 1, True, negative_prompt=negative)
            for name, (away, own) in zip(("context", "mask", "generated"), both, strict=True):
                rows.setdefault(name, []).append(own)
                rows.setdefault(f"negative_{name}", []).append(away)
        return {name: pad_sequence(parts, batch_first=True) for name, parts in rows.items()}

    def encoding_settings(self) -> dict[str, Any]:
        """Return what embeddings depend on beside the text and the weights: the negative prompt, too."""
        return super().encoding_settings() | {"negative_prompt": self.negative_prompt}

    def unconditional_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the conditioning of the negative prompt, which was encoded with each prompt."""
        return {name: tensors[f"negative_{name.removeprefix('negative_')}"] for name in tensors}

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Predict noise or v (B, C, frames, bands)."""
        return self.call_denoiser(
            x,
            timestep,
            encoder_hidden_states=tensors["generated"],
            encoder_hidden_states_1=tensors["context"],
            encoder_attention_mask_1=tensors["mask"],
        )

    def run_vae(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, frames, bands) to a spectrogram, and this by the vocoder to waveforms (B, 1, L)."""
        return decode_spectrogram(self.pipe, latents)

    def run_encoder(self, samples: Tensor) -> Tensor:
        """Raise ValueError: waveforms would have to be spectrograms, of a vocoder that does not say how."""
        raise ValueError("AudioLDM 2 decodes spectrograms, and has no way back from waveforms: sample the pool from it")

    def postprocess(self, decoded: Tensor) -> Tensor:
        """Cut waveforms to ``seconds``, and clip them to [-1, 1]."""
        return decoded[..., : self.sample_shape[1]].clamp(-1, 1)


def _checkpointed(module: nn.Module | GatedBlock, *inputs: Any) -> Any:
    """Call a block of the network, whose activations are computed again in the backward pass.

    The network itself leaves out an argument of its transformers, added_cond_kwargs, so the mask of the text would
    be that of the samples; their own blocks are checkpointed.
    """
    if not isinstance(module.block if isinstance(module, GatedBlock) else module, Transformer2DModel):
        return checkpoint(module, *inputs, use_reentrant=False)
    x, context, timestep, *rest = inputs
    return module(x, context, timestep, None, *rest, return_dict=False)


def decode_spectrogram(pipe: AudioLDM2Pipeline, latents: Tensor) -> Tensor:
    """Decode latents (B, C, frames, bands) of a pipeline by its autoencoder and its vocoder to waveforms (B, 1, L)."""
    scaled = (latents / float(pipe.vae.config.scaling_factor)).to(pipe.vae.dtype)
    spectrogram = pipe.vae.decode(scaled, return_dict=False)[0][:, 0]
    waveforms: Tensor = pipe.vocoder(spectrogram)
    return waveforms.view(len(latents), 1, -1)
