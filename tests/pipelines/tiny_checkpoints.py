"""A tiny random checkpoint of every family, whole: text encoders, tokenizers, scheduler as its checkpoints ship it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import T5Tokenizer

from pipelines import (
    SD3,
    SDXL,
    AceStep,
    AudioLDM2,
    Flux,
    Flux2Klein,
    QwenImage,
    QwenImage21,
    Sana,
    StableAudio,
    StableDiffusion,
    ZImage,
)
from pipelines.base import DiffusersPipeline
from pipelines.flows import PackedFlowPipeline, pack, unpack
from scripts.pretrain.shapes_models import ShapesTextToImage, build_t5, build_text_encoder, build_vae
from scripts.pretrain.shapes_tokenizers import clip_tokenizer, t5_tokenizer

_TEXT = {  # of language models
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_MESSAGES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"
_CLAP_TEXT = {**_TEXT, "projection_dim": 12}
_CLAP_AUDIO = {
    "num_mel_bins": 32,
    "spec_size": 64,
    "window_size": 4,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "patch_embeds_hidden_size": 8,
    "hidden_size": 16,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "num_hidden_layers": 2,
}
HEADS, CHANNELS = {"num_layers": 1, "num_attention_heads": 2}, {"in_channels": 4, "out_channels": 4}
_LATENT_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Family:
    """How a checkpoint is built, opened by us, and run by diffusers with its family's first-order scheduler."""

    build: Callable[[], DiffusionPipeline]
    ours: type[DiffusersPipeline]
    options: dict[str, Any] = field(default_factory=dict)  # of ours, by which diffusers is called too
    extra: dict[str, Any] = field(default_factory=dict)  # of diffusers alone
    scheduler: dict[str, Any] = field(default_factory=dict)  # of the first-order scheduler, beside the shipped settings
    guidance: str = "guidance_scale"  # the name that diffusers has for it

    def scale(self, guidance: float) -> float:
        """Our guidance as diffusers takes it, of which Z-Image's is 0 for none."""
        return 0.0 if self.ours is ZImage and guidance <= 1 else guidance

    def noise(self, noise: Tensor) -> Tensor:
        """Our initial noise as diffusers takes it."""
        if self.ours is AceStep:
            return noise.transpose(1, 2)
        if self.ours is QwenImage21:
            return noise.flatten(2).transpose(1, 2)
        if self.ours is Flux2Klein:  # in patches that are not yet a sequence
            return pack(noise).transpose(1, 2).unflatten(2, (noise.shape[2] // 2, noise.shape[3] // 2))
        return pack(noise) if issubclass(self.ours, PackedFlowPipeline) else noise

    def latents(self, theirs: Tensor, like: Tensor, alpha: float) -> Tensor:
        """Latents that diffusers showed at a level of ``alpha``, in our layout."""
        if self.ours is AceStep:
            return theirs.transpose(1, 2)
        if self.ours is QwenImage21:
            return theirs.transpose(1, 2).unflatten(2, like.shape[-2:])
        if issubclass(self.ours, PackedFlowPipeline):
            return unpack(theirs, *like.shape[-2:])
        return theirs * alpha if self.ours is SDXL else theirs

    @property
    def pads_texts(self) -> bool:
        """Whether diffusers pads the prompts of a batch to one length, which changes its samples."""
        return self.ours in (AceStep, AudioLDM2, QwenImage21)

    def save(self, folder: Path) -> Path:
        """Build it with random weights, the output layers included, and save it."""
        torch.manual_seed(0)
        pipe = self.build()
        for parameter in pipe.components[self.ours.denoiser_name].parameters():
            nn.init.normal_(parameter, std=0.05)  # output layers start at zero, which would hide mistakes
        pipe.save_pretrained(folder)
        return folder


def kl(channels: int, **options: Any) -> diffusers.AutoencoderKL:
    """An autoencoder of factor two with random weights."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=channels,
        mid_block_add_attention=False,
        **options,
    )


def _clip_text() -> transformers.CLIPTextModel:
    return transformers.CLIPTextModel(build_text_encoder(clip_tokenizer()).config)


def unet(context: int, **options: Any) -> diffusers.UNet2DConditionModel:
    """A UNet with two levels for latents (B, 4, 8, 8) and texts of width ``context``."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=2,
        cross_attention_dim=context,
        **options,
    )


def unet_xl(context: int, pooled: int) -> diffusers.UNet2DConditionModel:
    """The same, with SDXL's additional input of ``pooled`` numbers and six sizes."""
    return unet(
        context,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=pooled + 6 * 4,
    )


def flux_transformer(context: int, pooled: int) -> diffusers.FluxTransformer2DModel:
    """A guidance-distilled network for packed latents of four channels."""
    return diffusers.FluxTransformer2DModel(
        **HEADS,
        in_channels=16,
        num_single_layers=1,
        attention_head_dim=16,
        joint_attention_dim=context,
        pooled_projection_dim=pooled,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


def audio_transformer() -> diffusers.StableAudioDiTModel:
    """Stable Audio's network, for 16 frames and texts of width 16."""
    return diffusers.StableAudioDiTModel(
        **CHANNELS,
        sample_size=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        global_states_input_dim=32,
        time_proj_dim=8,
    )


def oobleck() -> diffusers.AutoencoderOobleck:
    """An autoencoder of stereo at 16 Hz, with four audio samples a frame."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 1],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=16,
    )


def sd3() -> DiffusionPipeline:
    model = ShapesTextToImage(layers=2, width=64)
    return diffusers.StableDiffusion3Pipeline(
        model.transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        build_vae(),
        model.text_encoder,
        model.clip_tokenizer,
        model.text_encoder_2,
        model.clip_tokenizer,
        model.text_encoder_3,
        model.t5_tokenizer,
    )


def flux() -> DiffusionPipeline:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokenizer = t5_tokenizer()
    t5 = build_t5(len(tokenizer))
    return diffusers.FluxPipeline(
        scheduler, kl(4, shift_factor=0.1), _clip_text(), clip_tokenizer(), t5, tokenizer, flux_transformer(128, 64)
    )


def sd15() -> DiffusionPipeline:
    scheduler = diffusers.PNDMScheduler(**_LATENT_DIFFUSION, skip_prk_steps=True, set_alpha_to_one=False)
    scheduler.register_to_config(clip_sample=False)  # not PNDM's, and in the file of the published checkpoints
    return diffusers.StableDiffusionPipeline(
        kl(4), _clip_text(), clip_tokenizer(), unet(64), scheduler, None, None, requires_safety_checker=False
    )


def sd21() -> DiffusionPipeline:
    pipe = sd15()
    pipe.scheduler = diffusers.DDIMScheduler(
        **_LATENT_DIFFUSION, set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction"
    )
    return pipe


def sdxl() -> DiffusionPipeline:
    scheduler = diffusers.EulerDiscreteScheduler(**_LATENT_DIFFUSION, timestep_spacing="leading")
    projected = transformers.CLIPTextModelWithProjection(build_text_encoder(clip_tokenizer()).config)
    texts = _clip_text(), projected, clip_tokenizer(), clip_tokenizer()
    return diffusers.StableDiffusionXLPipeline(kl(4), *texts, unet_xl(128, 64), scheduler, add_watermarker=False)


def sana() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    gemma = transformers.Gemma2Config(vocab_size=len(tokenizer), head_dim=8, **_TEXT)
    network = diffusers.SanaTransformer2DModel(
        **HEADS,
        **CHANNELS,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
    )
    ends = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1),
    }
    coders = {f"{end}_{name}": value for end in ("encoder", "decoder") for name, value in ends.items()}
    vae = diffusers.AutoencoderDC(3, 4, attention_head_dim=2, scaling_factor=0.41407, **coders)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(tokenizer, transformers.Gemma2Model(gemma), vae, network, scheduler)


def qwen_image() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {**_TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {"depth": 1, "num_heads": 2, "fullatt_block_indexes": [0]}
    vision |= dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), 16)
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    network = diffusers.QwenImageTransformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        attention_head_dim=16,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return diffusers.QwenImagePipeline(scheduler, vae, encoder, tokenizer, network)


def _chat_tokenizer() -> T5Tokenizer:
    """A tokenizer with the template of a chat model, which only adds a word at the front."""
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}a {{ message.content }}{% endfor %}"
    return tokenizer


def z_image() -> DiffusionPipeline:
    tokenizer = _chat_tokenizer()
    text = transformers.Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **_TEXT)
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    vae = kl(4, shift_factor=0.1, scaling_factor=0.36)
    return diffusers.ZImagePipeline(scheduler, vae, transformers.Qwen3Model(text), tokenizer, network)


def flux2_klein() -> DiffusionPipeline:
    tokenizer = _chat_tokenizer()
    layers = {**_TEXT, "num_hidden_layers": 27}  # of which diffusers takes the 9th, the 18th and the 27th
    text = transformers.Qwen3Config(vocab_size=len(tokenizer), head_dim=8, **layers)
    network = diffusers.Flux2Transformer2DModel(
        **HEADS,
        in_channels=16,
        num_single_layers=1,
        attention_head_dim=16,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    nn.init.normal_(vae.bn.running_mean)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.Flux2KleinPipeline(scheduler, vae, transformers.Qwen3ForCausalLM(text), tokenizer, network)


def qwen_image21() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    tokens = [f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")]
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, "<|im_start|>", "<|im_end|>"]})
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(),
        chat_template=_MESSAGES,
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {**_TEXT, "head_dim": 8, "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {"depth": 1, "num_heads": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    vision |= dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), 16)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    network = diffusers.QwenImage21Transformer2DModel(
        **HEADS, **CHANNELS, attention_head_dim=16, context_in_dim=16, axes_dims_rope=(4, 6, 6)
    )
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    encoder = transformers.Qwen3VLForConditionalGeneration(config)
    return diffusers.QwenImage21Pipeline(scheduler, vae, encoder, processor, network)


def stable_audio() -> DiffusionPipeline:
    """Stable Audio for clips of 4 s at most."""
    tokenizer = t5_tokenizer()
    t5 = build_t5(len(tokenizer))
    projection = diffusers.StableAudioProjectionModel(t5.config.d_model, 16, min_value=0, max_value=8)
    scheduler = diffusers.CosineDPMSolverMultistepScheduler()
    return diffusers.StableAudioPipeline(oobleck(), t5, projection, tokenizer, audio_transformer(), scheduler)


def ace_step() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    options = {**_TEXT, "head_dim": 8, "sliding_window": 4}
    text = transformers.Qwen3Config(vocab_size=len(tokenizer), **options)
    layers = {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1}
    del options["num_hidden_layers"]
    network = diffusers.AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4, **options
    )
    conditions = diffusers.AceStepConditionEncoder(text_hidden_dim=16, timbre_hidden_dim=4, **layers, **options)
    nn.init.normal_(conditions.silence_latent)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    return diffusers.AceStepPipeline(
        oobleck(), transformers.Qwen3Model(text), tokenizer, network, conditions, scheduler
    )


def audio_ldm2() -> DiffusionPipeline:
    """AudioLDM 2 at 16 Hz, with four audio samples a frame and eight bands."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: place for place, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    roberta = transformers.RobertaTokenizer(words, [], model_max_length=32)
    t5_words = t5_tokenizer()
    t5 = build_t5(len(t5_words))
    clap_text = {"vocab_size": len(words), "max_position_embeddings": 40, **_CLAP_TEXT}
    clap = transformers.ClapModel(
        transformers.ClapConfig(text_config=clap_text, audio_config=_CLAP_AUDIO, projection_dim=12)
    )
    language = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=10, n_positions=64)
    language.max_new_tokens = 8
    projection = AudioLDM2ProjectionModel(12, t5.config.d_model, 16)
    network = AudioLDM2UNet2DConditionModel(
        **CHANNELS,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),  # without attention, for speed
        attention_head_dim=2,
        norm_num_groups=2,
        cross_attention_dim=((None, 16, t5.config.d_model),) * 2,
    )
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
        initializer_range=0.3,
    )
    return diffusers.AudioLDM2Pipeline(
        kl(4, in_channels=1, out_channels=1),
        clap,
        t5,
        projection,
        transformers.GPT2LMHeadModel(language),
        roberta,
        t5_words,
        transformers.ClapFeatureExtractor(),
        network,
        diffusers.DDIMScheduler(**_LATENT_DIFFUSION, set_alpha_to_one=False, clip_sample=False),
        transformers.SpeechT5HifiGan(vocoder),
    )


FolderOf = Callable[[str], Path]
"""The fixture ``folder_of``: from a family's name to the folder of its checkpoint."""

_SHORT, _SIZE = {"max_sequence_length": 8}, {"height": 16, "width": 16}
_QWEN = {"max_sequence_length": 256, **_SIZE}  # the prompt comes after an instruction of some 160 tokens
FAMILIES: dict[str, Family] = {
    "sd3": Family(sd3, SD3, _SHORT),
    "flux": Family(flux, Flux, {**_SHORT, **_SIZE}, {"guidance_scale": 3.5}, guidance="true_cfg_scale"),
    "flux2_klein": Family(flux2_klein, Flux2Klein, {**_SHORT, **_SIZE}),
    "sd15": Family(sd15, StableDiffusion),
    "sd21": Family(sd21, StableDiffusion),
    "sdxl": Family(sdxl, SDXL),
    "sana": Family(
        sana, Sana, {**_SHORT, "height": 32, "width": 32}, {"use_resolution_binning": False}, scheduler={"shift": 3.0}
    ),
    "qwen_image": Family(qwen_image, QwenImage, _QWEN, {"negative_prompt": [" ", " "]}, guidance="true_cfg_scale"),
    "qwen_image21": Family(
        qwen_image21,
        QwenImage21,
        {"height": 64, "width": 64},
        {"negative_prompt": [" "]},
        guidance="true_cfg_scale",
    ),
    "z_image": Family(z_image, ZImage, {**_SHORT, **_SIZE}),
    "stable_audio": Family(stable_audio, StableAudio, {"seconds": 3.0}, {"audio_end_in_s": 3.0}),
    "ace_step": Family(ace_step, AceStep, {"seconds": 3.1}, {"audio_duration": 3.1}),
    "audio_ldm2": Family(audio_ldm2, AudioLDM2, {"seconds": 3.1}, {"audio_length_in_s": 3.1}),
}
