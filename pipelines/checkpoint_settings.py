"""Every configuration key that diffusers' pipelines and schedulers read: what honors it here, or why it is refused.

``SCHEDULERS`` names the schedulers of each pipeline, ``SCHEDULER_KEYS`` and ``SOLVER_KEYS`` their keys,
``COMPONENT_KEYS`` the keys of networks and autoencoders, and ``PIPELINE_KEYS`` the plain entries of model_index.json. A
key of none of them is refused with its name, unless it is off or at its default.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import SchedulerMixin

SchedulePath = Literal["vp", "edm", "flow"]


@dataclass(frozen=True)
class Key:
    """A configuration key: what honors it or why it has no effect, and the values for which this holds, or all."""

    by: str
    only: tuple[object, ...] | None = None


_DISCRETE = "DDIM DDPM PNDM LCM TCD"
_ON_SIGMAS = "EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete KDPM2Discrete KDPM2AncestralDiscrete"
_SOLVERS = "DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver"
_FLOWS = "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM"


def _schedulers(names: str, path: SchedulePath) -> dict[str, SchedulePath]:
    return dict.fromkeys((f"{name}Scheduler" for name in names.split()), path)


_VP = _schedulers(f"{_DISCRETE} {_ON_SIGMAS} {_SOLVERS} DPMSolverSDE", "vp")
_DIFFUSION = {
    **_VP,
    **_schedulers("EDMEuler EDMDPMSolverMultistep", "edm"),
}
_FLOW = _schedulers(f"{_FLOWS} {_SOLVERS}", "flow")
SCHEDULERS: Mapping[str, Mapping[str, SchedulePath]] = {
    "StableDiffusionPipeline": _DIFFUSION,
    "StableDiffusionXLPipeline": _DIFFUSION,
    "StableDiffusion3Pipeline": _FLOW,
    "FluxPipeline": _FLOW,
    "Flux2KleinPipeline": _FLOW,
    "SanaPipeline": _FLOW,
    "QwenImagePipeline": _FLOW,
    "QwenImage21Pipeline": _FLOW,
    "ZImagePipeline": _FLOW,
    "StableAudioPipeline": _schedulers("CosineDPMSolverMultistep", "edm"),
    "AceStepPipeline": _FLOW,
    "AudioLDM2Pipeline": _VP,
}
"""The schedulers whose noise levels are honored, and their paths, by pipeline class."""

_GRID = Key("honored by the grid")
_UNREAD = Key("diffusers does not read it on this path")
_UNCLIPPED = Key("predictions are not clipped")
_NO_CLIPPING = Key("predictions are not clipped: clipped ones have no density", (False,))
_FINAL_ZERO = Key("the grid ends at sigma = 0", ("zero",))
_OFF, _NONE = Key("the grid has no such levels", (False,)), Key("the grid has no such levels", (None,))
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_SPACING = ("timestep_spacing", "steps_offset")
_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_CLIPPING = {
    "thresholding": _NO_CLIPPING,
    **dict.fromkeys(("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio"), _UNCLIPPED),
}

SCHEDULER_KEYS: Mapping[SchedulePath, Mapping[str, Key]] = {
    "vp": {
        **dict.fromkeys(("num_train_timesteps", "set_alpha_to_one", *_BETAS, *_SPACING, *_SIGMAS), _GRID),
        **dict.fromkeys(("sigma_min", "sigma_max", "interpolation_type", "final_sigmas_type"), _GRID),
        "prediction_type": Key("honored by VPPath", ("epsilon", "v_prediction", "sample")),
        "timestep_type": Key("the network takes training timesteps", ("discrete",)),
        "variance_type": Key(
            "the variance is the kernel's", (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
        ),
        "clip_sample": _NO_CLIPPING,
        **_CLIPPING,
        **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting", "use_lu_lambdas"), _OFF),
        "lambda_min_clipped": Key("the grid has no such levels", (-float("inf"),)),
        "shift_terminal": _NONE,
        **dict.fromkeys(("flow_shift", "time_shift_type"), _UNREAD),
    },
    "edm": {
        **dict.fromkeys(("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho"), _GRID),
        "prediction_type": Key("honored by EDMPath", ("epsilon", "v_prediction")),
        "num_train_timesteps": _UNREAD,
        "final_sigmas_type": _FINAL_ZERO,
        **_CLIPPING,
    },
    "flow": {
        **dict.fromkeys(("num_train_timesteps", "shift", "flow_shift", "shift_terminal", *_SIGMAS), _GRID),
        **dict.fromkeys(("use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift"), _GRID),
        **dict.fromkeys(("base_image_seq_len", "max_image_seq_len"), _GRID),
        "prediction_type": Key("honored by FlowPath", ("flow_prediction",)),
        "use_flow_sigmas": Key("honored by the grid", (True,)),
        "final_sigmas_type": _FINAL_ZERO,
        **_CLIPPING,
        **dict.fromkeys(("invert_sigmas", "use_lu_lambdas"), _OFF),
        **dict.fromkeys(("sigma_min", "sigma_max", "scale_factors"), _NONE),
        "variance_type": Key("the variance is the kernel's", (None,)),
        **dict.fromkeys((*_BETAS, *_SPACING, "lambda_min_clipped", "upscale_mode"), _UNREAD),
    },
}
"""The keys of schedulers by the path of the network, beside those of ``SOLVER_KEYS``."""

SOLVER_KEYS = frozenset(
    (
        *("algorithm_type", "solver_order", "solver_type", "solver_p", "lower_order_final", "euler_at_final"),
        *("predict_x0", "disable_corrector", "predictor_order", "corrector_order", "tau_func", "skip_prk_steps"),
        *("noise_sampler_seed", "original_inference_steps", "timestep_scaling", "stochastic_sampling"),
    )
)
"""The keys of schedulers that concern their solver: genalign samples by first-order steps of its own in its place."""

_SIZE, _INPUT = Key("honored by the size of samples"), Key("honored by the network's input")
_SCALING, _TEXT = Key("honored by the decoder"), Key("read by diffusers' encoder of prompts, which encodes here too")
_UNET = {
    **dict.fromkeys(("sample_size", "_diffusers_version"), _SIZE),
    "in_channels": Key("honored by the latents; must be the channels of the VAE"),
    "time_cond_proj_dim": Key("honored by model.distilled_guidance"),
}
_SHIFTED = {"block_out_channels": _SIZE, "scaling_factor": _SCALING, "shift_factor": _SCALING}
COMPONENT_KEYS: Mapping[str, Mapping[str, Mapping[str, Key]]] = {
    "StableDiffusionPipeline": {
        "unet": _UNET,
        "vae": {"block_out_channels": _SIZE, "scaling_factor": _SCALING},
        "text_encoder": {"use_attention_mask": _TEXT},
    },
    "StableDiffusionXLPipeline": {
        "unet": {**_UNET, "addition_time_embed_dim": _INPUT, "time_embedding_type": _INPUT},
        "vae": {
            "block_out_channels": _SIZE,
            **dict.fromkeys(("scaling_factor", "latents_mean", "latents_std"), _SCALING),
            "force_upcast": Key("honored: a float16 VAE is moved to float32"),
        },
        "text_encoder_2": {"projection_dim": _TEXT},
    },
    "StableDiffusion3Pipeline": {
        "transformer": {
            **dict.fromkeys(("sample_size", "patch_size"), _SIZE),
            "in_channels": _INPUT,
            "joint_attention_dim": _TEXT,
        },
        "vae": _SHIFTED,
    },
    "FluxPipeline": {
        "transformer": {"in_channels": _INPUT, "guidance_embeds": Key("honored by model.distilled_guidance")},
        "vae": _SHIFTED,
    },
    "Flux2KleinPipeline": {
        "transformer": {"in_channels": _INPUT},
        "vae": {"block_out_channels": _SIZE, "batch_norm_eps": _SCALING},
    },
    "SanaPipeline": {
        "transformer": {
            "sample_size": _SIZE,
            **dict.fromkeys(("in_channels", "out_channels", "timestep_scale"), _INPUT),
        },
        "vae": {"encoder_block_out_channels": _SIZE, "scaling_factor": _SCALING},
    },
    "QwenImagePipeline": {
        "transformer": {
            "in_channels": _INPUT,
            "guidance_embeds": Key("the network of diffusers itself fails with it", (False,)),
        },
        "vae": dict.fromkeys(("latents_mean", "latents_std", "z_dim"), _SCALING),
    },
    "QwenImage21Pipeline": {
        "transformer": {
            "in_channels": _INPUT,
            "causal_condition": Key("honored by the network, which is called without diffusers' cache"),
        },
        "vae": dict.fromkeys(("latents_mean", "latents_std", "z_dim"), _SCALING),
    },
    "ZImagePipeline": {
        "transformer": {
            "in_channels": _INPUT,
            "siglip_feat_dim": Key("a network that takes images starts from one", (None,)),
        },
        "vae": _SHIFTED,
    },
    "StableAudioPipeline": {
        "transformer": {"sample_size": _SIZE, **dict.fromkeys(("in_channels", "attention_head_dim"), _INPUT)},
        "vae": dict.fromkeys(("audio_channels", "sampling_rate"), _SIZE),
        "projection_model": dict.fromkeys(("min_value", "max_value"), Key("honored by the encoder of durations")),
        "text_encoder": {"model_type": _TEXT},
    },
    "AceStepPipeline": {
        "transformer": {
            "audio_acoustic_hidden_dim": _INPUT,
            **dict.fromkeys(("is_turbo", "model_version"), Key("honored by the default of guidance")),
        },
        "vae": dict.fromkeys(("downsampling_ratios", "sampling_rate"), _SIZE),
        "audio_tokenizer": {"fsq_input_num_quantizers": Key("read for reference recordings alone")},
        "audio_token_detokenizer": {"pool_window_size": Key("read for reference recordings alone")},
    },
    "AudioLDM2Pipeline": {
        "unet": {"sample_size": _SIZE, "in_channels": _INPUT},
        "vae": {"block_out_channels": _SIZE, "scaling_factor": _SCALING},
        "vocoder": dict.fromkeys(("model_in_dim", "sampling_rate", "upsample_rates"), _SIZE),
        "text_encoder": {"model_type": _TEXT, "hidden_size": Key("read for speech alone")},
        "text_encoder_2": {
            "model_type": Key("checkpoints of speech need a transcript of every prompt", ("t5",)),
            "hidden_size": Key("read for speech alone"),
        },
        "language_model": {"max_new_tokens": _TEXT},
    },
}
"""The keys of networks and autoencoders by pipeline class and component."""

PIPELINE_KEYS: Mapping[str, Key] = {
    "force_zeros_for_empty_prompt": Key("honored by SDXL's encoder of prompts"),
    "is_distilled": Key("honored by the default of guidance"),
    "sample_sigmas": Key("honored by the grid"),
    "requires_safety_checker": Key("samples are not filtered"),
    "requires_aesthetics_score": Key("a refiner starts from an image", (False, None)),
}
"""The entries of model_index.json that are no component."""


def is_component(entry: object) -> bool:
    """Return whether an entry of model_index.json names a component, by library and class: no list of numbers."""
    return isinstance(entry, list) and all(isinstance(part, str | None) for part in entry)


def check_settings(components: Mapping[str, Any], name: str) -> None:
    """Raise ValueError, naming the key, for a setting that diffusers' own pipeline honors and genalign does not.

    ``name`` is the pipeline's class. A class without an entry in the tables, a family of your own, is not checked.
    """
    if name not in SCHEDULERS:
        return
    scheduler = components["scheduler"]
    kind = type(scheduler).__name__
    if kind not in SCHEDULERS[name]:
        raise ValueError(
            f"this {name} has a {kind}, whose noise levels genalign does not know for it: use one of"
            f" {', '.join(SCHEDULERS[name])}"
        )
    _check_scheduler(scheduler, SCHEDULERS[name][kind])

    for part, keys in COMPONENT_KEYS[name].items():
        config = getattr(components.get(part), "config", None)
        for key, setting in keys.items():
            if setting.only is not None:
                _require(setting, key, getattr(config, key, setting.only[0]), f"{part}/config.json")

    # The scalings of latents that some pipelines of diffusers read and others do not
    read = COMPONENT_KEYS[name]["vae"]
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if key not in read and components["vae"].config.get(key) is not None:
            raise ValueError(
                f"vae/config.json sets {key}, which {name} does not read, so its samples do not fit this VAE:"
                " use the VAE of this family, or set the key to null"
            )


def check_index(index: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry of model_index.json that is set and that genalign does not know."""
    for key, value in index.items():
        if not key.startswith("_") and not is_component(value):
            _require(
                PIPELINE_KEYS.get(key, Key("genalign does not know it", (False, None))), key, value, "model_index.json"
            )


def _check_scheduler(scheduler: SchedulerMixin, path: SchedulePath) -> None:
    table, kind = SCHEDULER_KEYS[path], type(scheduler).__name__
    read = inspect.signature(type(scheduler).__init__).parameters
    all_keys = SOLVER_KEYS.union(*SCHEDULER_KEYS.values())
    for key, value in scheduler.config.items():
        if key in SOLVER_KEYS or key.startswith("_") or (key in all_keys and key not in read):
            continue  # what another scheduler would read
        default = (read[key].default,) if key in read else (False, None)
        _require(table.get(key, Key("genalign does not know it", default)), key, value, f"the {kind}")


def _require(setting: Key, key: str, value: object, place: str) -> None:
    """Raise ValueError if the value is none of those for which ``setting`` holds."""
    if setting.only is not None and value not in setting.only:
        raise ValueError(
            f"{place} has {key} {value!r}, which is not supported ({setting.by}): use a checkpoint with"
            f" {key} {' or '.join(map(repr, setting.only))}, or set it so if this one was not trained for it"
        )
