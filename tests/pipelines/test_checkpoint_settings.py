"""The settings of checkpoints: every key that diffusers reads is in the table, and is honored or refused by name."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from genalign.algorithms.recipes import ddpo, flow_grpo
from genalign.diffusion.paths import EDMPath, VPPath
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import DPMSDE, ODE
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from pipelines import SD3, SDXL, StableDiffusion
from pipelines.auto import FAMILIES
from pipelines.base import DiffusersPipeline
from pipelines.checkpoint_settings import (
    COMPONENT_KEYS,
    PIPELINE_KEYS,
    SCHEDULER_KEYS,
    SCHEDULERS,
    SOLVER_KEYS,
    check_index,
)
from tests.pipelines import tiny_checkpoints

# What diffusers itself does: its EulerDiscreteScheduler turns a tensor into an array in a way that numpy 2 deprecates,
# its AutoencoderOobleck uses torch's older weight_norm, and its Stable Diffusion warns of the offset that it corrects.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

PROMPTS = ["a red circle", "two big blue squares"]
STEPS = 4
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@functools.cache
def _pipe(family: str) -> Any:
    """A tiny checkpoint of random weights, the same one in every call."""
    spec = tiny_checkpoints.FAMILIES[family]
    torch.manual_seed(0)
    pipe: Any = spec.build()
    for parameter in pipe.components[spec.ours.denoiser_name].parameters():
        nn.init.normal_(parameter, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _with(family: str, **components: Any) -> Any:
    """The checkpoint with other components."""
    pipe = _pipe(family)
    return type(pipe)(**{**pipe.components, **components})


def _scheduler_class(name: str) -> Any:
    return getattr(diffusers, name)


def test_the_tables_have_every_family() -> None:
    assert FAMILIES.keys() == SCHEDULERS.keys() == COMPONENT_KEYS.keys()


@pytest.mark.parametrize("pipeline", SCHEDULERS)
def test_the_table_has_every_key_of_every_scheduler(pipeline: str) -> None:
    for name, path in SCHEDULERS[pipeline].items():
        signature = inspect.signature(_scheduler_class(name).__init__)
        unknown = {*signature.parameters} - {"self"} - SCHEDULER_KEYS[path].keys() - SOLVER_KEYS
        assert not unknown, f"{name} has keys that SCHEDULER_KEYS[{path!r}] lacks"


def _keys_read(pipeline: type[DiffusionPipeline]) -> set[tuple[str, str]]:
    """Components and their configuration keys that the source of a diffusers pipeline reads."""
    source = inspect.getsource(inspect.getmodule(pipeline) or pipeline)
    source = source[source.index(f"class {pipeline.__name__}") :]
    # "self." is the code's; the docstrings name unet.config.sample_size also where there is none
    patterns = (
        r"(?<!`self\.)\b(\w+?)(?:\.|_)config\.(?:get\(\s*\")?(\w+)",
        r"(?:has|get)attr\((?:self\.)?(\w+?)(?:\.|_)config, \"(\w+)\"",
    )
    return {(part, key) for pattern in patterns for part, key in re.findall(pattern, source)}


@pytest.mark.parametrize("pipeline", COMPONENT_KEYS)
def test_the_table_has_every_key_that_a_pipeline_reads(pipeline: str) -> None:
    family, tables = FAMILIES[pipeline], COMPONENT_KEYS[pipeline]
    components = {*inspect.signature(family.kind.__init__).parameters} - {"self", "scheduler"}
    read = {(part, key) for part, key in _keys_read(family.kind) if part in components}
    assert {(part, key) for part, keys in tables.items() for key in keys} >= read
    flags = {
        name
        for name, parameter in inspect.signature(family.kind.__init__).parameters.items()
        if isinstance(parameter.default, bool) and name != "add_watermarker"  # not written to model_index.json
    }
    assert flags <= PIPELINE_KEYS.keys()


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("sd15", "DDIMScheduler", {"thresholding": True, "clip_sample": False}, "DDIMScheduler has thresholding True"),
    ("sdxl", "DDIMScheduler", {"clip_sample": True}, "DDIMScheduler has clip_sample True"),
    ("sdxl", "DPMSolverMultistepScheduler", {"thresholding": True}, "has thresholding True"),
    ("sdxl", "DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "has lambda_min_clipped -5.1"),
    ("sdxl", "DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "has use_lu_lambdas True"),
    ("sdxl", "DPMSolverMultistepScheduler", {"variance_type": "learned_range"}, "has variance_type 'learned_range'"),
    (
        "sd15",
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        "has prediction_type 'flow_prediction'",
    ),
    ("sdxl", "EulerDiscreteScheduler", {"timestep_type": "continuous"}, "has timestep_type 'continuous'"),
    ("sdxl", "EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}, "has final_sigmas_type 'sigma_min'"),
    ("sdxl", "EDMDPMSolverMultistepScheduler", {"thresholding": True}, "has thresholding True"),
    ("sdxl", "FlowMatchEulerDiscreteScheduler", {}, "has a FlowMatchEulerDiscreteScheduler, whose noise levels"),
    ("sd15", "CMStochasticIterativeScheduler", {}, "has a CMStochasticIterativeScheduler, whose noise levels"),
    ("stable_audio", "EDMEulerScheduler", {}, "use one of CosineDPMSolverMultistepScheduler"),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "has invert_sigmas True"),
    ("sd3", "EulerDiscreteScheduler", {}, "has a EulerDiscreteScheduler, whose noise levels"),
    ("sana", "DPMSolverMultistepScheduler", {}, "has prediction_type 'epsilon'"),
    ("sana", "UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "has use_flow_sigmas False"),
]


@pytest.mark.parametrize(
    ("family", "scheduler", "settings", "message"),
    REFUSED,
    ids=[f"{row[0]}-{row[3][:40]}" for row in REFUSED],
)
def test_settings_of_a_scheduler_that_are_not_honored_are_refused(
    family: str, scheduler: str, settings: dict[str, Any], message: str
) -> None:
    pipe = _with(family, scheduler=_scheduler_class(scheduler)(**settings))
    with pytest.raises(ValueError, match=message):
        tiny_checkpoints.FAMILIES[family].ours(pipe)


def test_unknown_settings_are_refused_unless_they_are_off() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    scheduler.register_to_config(frobnicate=False, skip_prk_steps=True, clip_sample=True)  # Euler reads none of them
    SDXL(_with("sdxl", scheduler=scheduler))
    scheduler.register_to_config(frobnicate=0.5)
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler has frobnicate 0\.5, which is not supported"):
        SDXL(_with("sdxl", scheduler=scheduler))
    check_index({"_class_name": "X", "unet": ["diffusers", "U"], "force_zeros_for_empty_prompt": True})
    for key in ("requires_aesthetics_score", "frobnicate"):
        with pytest.raises(ValueError, match=f"model_index.json has {key} True"):
            check_index({key: True})


FIRST_ORDER: dict[str, Any] = {
    "LCMScheduler": diffusers.DDIMScheduler,
    "HeunDiscreteScheduler": diffusers.EulerDiscreteScheduler,
    "EulerAncestralDiscreteScheduler": diffusers.EulerDiscreteScheduler,
    "EDMDPMSolverMultistepScheduler": diffusers.EDMEulerScheduler,
}
"""The scheduler that samples by first-order steps at the noise levels of another; any other samples so itself."""


def _images(ours: DiffusersPipeline, noise: Tensor, guidance: float, **call: Any) -> Tensor:
    """What diffusers itself makes, with the first-order scheduler of the one that the checkpoint ships."""
    pipe = ours.pipe
    first_order: Any = FIRST_ORDER.get(type(pipe.scheduler).__name__, type(pipe.scheduler))
    options: dict[str, Any] = {"clip_sample": False} if first_order is diffusers.DDIMScheduler else {}  # as LCM has it
    if "solver_order" in inspect.signature(first_order).parameters:
        options = {"solver_order": 1}
    if first_order is diffusers.UniPCMultistepScheduler:
        options["disable_corrector"] = [*range(STEPS)]
    shipped, pipe.scheduler = pipe.scheduler, first_order.from_config(pipe.scheduler.config, **options)
    try:
        images: Tensor = pipe(
            PROMPTS,
            latents=noise,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            return_dict=False,
            **{"output_type": "pt", **call},
        )[0]
    finally:
        pipe.scheduler = shipped
    return images


def _ours(ours: DiffusersPipeline, guidance: float) -> Tensor:
    return ours.decode(_latents(ours, guidance))


def _latents(ours: DiffusersPipeline, guidance: float) -> Tensor:
    start = RolloutInputs(ours.encode(PROMPTS), torch.arange(2), (1, 2), (1, 2))
    with torch.no_grad():
        return rollout(ours, start, ours.grid(STEPS), [ODE()] * STEPS, guidance).final


def _require_equal(ours: DiffusersPipeline, guidance: float) -> None:
    """Compare latents, as images are clamped to [0, 1]; at a last sigma of 0.03 they differ by its scale, 4e-4."""
    theirs = _images(ours, _plain_noise(ours), guidance, output_type="latent")
    torch.testing.assert_close(_latents(ours, guidance), theirs, rtol=5e-4, atol=5e-4)


def _plain_noise(ours: DiffusersPipeline) -> Tensor:
    """Noise of variance 1, which the pipelines of diffusers scale by themselves."""
    return DiffusersPipeline.initial_noise(ours, [1, 2])


HONORED: dict[str, Callable[[], Any]] = {
    "karras": lambda: diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    "exponential": lambda: diffusers.EulerDiscreteScheduler(**BETAS, use_exponential_sigmas=True),
    "beta": lambda: diffusers.EulerDiscreteScheduler(**BETAS, use_beta_sigmas=True),
    "linspace": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
    "trailing": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "offset": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    "log-linear": lambda: diffusers.EulerDiscreteScheduler(**BETAS, interpolation_type="log_linear"),
    "range": lambda: diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, sigma_min=0.1, sigma_max=9.0),
    "sigma_min": lambda: diffusers.EulerDiscreteScheduler(**BETAS, final_sigmas_type="sigma_min"),
    "zero-snr": lambda: diffusers.EulerDiscreteScheduler(**BETAS, **ZERO_SNR),
    "squaredcos": lambda: diffusers.EulerDiscreteScheduler(beta_schedule="squaredcos_cap_v2"),
    "few": lambda: diffusers.EulerDiscreteScheduler(**BETAS, num_train_timesteps=200),
    "dpm-karras": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    "deis": lambda: diffusers.DEISMultistepScheduler(**BETAS, use_exponential_sigmas=True),
    "dpm-sigma-min": lambda: diffusers.DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="sigma_min"),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "ddim": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddim-sample": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, prediction_type="sample"),
    "ddim-zero-snr": lambda: diffusers.DDIMScheduler(**BETAS, **ZERO_SNR, clip_sample=False),
    "lcm": lambda: diffusers.LCMScheduler(**BETAS),
    "playground": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
    "cosxl": lambda: diffusers.EDMEulerScheduler(
        prediction_type="v_prediction", sigma_schedule="exponential", sigma_data=1.0
    ),
    "edm-narrow": lambda: diffusers.EDMEulerScheduler(sigma_max=20.0, sigma_min=0.02, rho=5.0),
}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("settings", HONORED)
def test_honored_settings_of_a_scheduler_equal_diffusers(settings: str, guidance: float) -> None:
    _require_equal(SDXL(_with("sdxl", scheduler=HONORED[settings]())), guidance)


@pytest.mark.parametrize("settings", ["karras", "trailing", "ddim", "dpm-karras", "cosxl"])
def test_honored_settings_equal_diffusers_without_sdxls_conditioning(settings: str) -> None:
    _require_equal(StableDiffusion(_with("sd15", scheduler=HONORED[settings]())), 3.0)


@pytest.mark.parametrize("zeros", [True, False])
def test_empty_prompts_are_zeros_if_the_checkpoint_says_so(zeros: bool) -> None:
    ours = SDXL(_with("sdxl", force_zeros_for_empty_prompt=zeros))
    assert bool(ours.encode([""]).tensors["context"].any()) != zeros
    _require_equal(ours, 3.0)


FLOWS: dict[str, Any] = {
    "shift": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0, "base_image_seq_len": 4},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_image_seq_len": 512},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "few": {"num_train_timesteps": 200},
}


@pytest.mark.parametrize("settings", FLOWS)
def test_honored_settings_of_a_flow_equal_diffusers(settings: str) -> None:
    shipped = diffusers.FlowMatchEulerDiscreteScheduler(**FLOWS[settings])
    ours = SD3(_with("sd3", scheduler=shipped), max_sequence_length=8)
    theirs = _images(ours, _plain_noise(ours), 3.0, max_sequence_length=8)
    torch.testing.assert_close(_ours(ours, 3.0), theirs, rtol=0, atol=5e-4)


def test_defaults_are_those_of_the_scheduler_that_a_checkpoint_ships() -> None:
    shipped = diffusers.PNDMScheduler.from_config({**BETAS, "skip_prk_steps": True})  # says nothing of set_alpha_to_one
    ours = StableDiffusion(_with("sd15", scheduler=shipped))
    assert float(ours.grid(STEPS).alpha[-1]) == pytest.approx(float(shipped.final_alpha_cumprod) ** 0.5)


def test_noise_levels_of_a_record_are_taken_where_they_are_the_schedulers_own() -> None:
    ours = StableDiffusion(_pipe("sd15"))
    own = ours.grid(STEPS)
    again = ours.grid(STEPS, [round(sigma, 9) for sigma in own.sigma[:-1].tolist()])
    assert torch.equal(again.sigma, own.sigma) and torch.equal(again.timestep, own.timestep)
    for wrong in (own.sigma[:-2].tolist(), (0.9 * own.sigma[:-1]).tolist()):
        with pytest.raises(ValueError, match="takes only integer timesteps"):
            ours.grid(STEPS, wrong)


def test_each_step_of_an_uneven_ddim_grid_ends_at_the_next_timestep() -> None:
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="linspace")
    grid = SDXL(_with("sdxl", scheduler=scheduler)).grid(STEPS)  # diffusers' own step ends 250 timesteps below
    assert grid.timestep.tolist() == [999, 666, 333, 0]
    expected = scheduler.alphas_cumprod[grid.timestep.long()].double()
    torch.testing.assert_close(grid.alpha.square(), torch.cat([expected, torch.ones(1, dtype=torch.float64)]))


def test_ddim_trains_on_a_grid_whose_last_step_stays_at_its_level() -> None:
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)  # its last step is at t = 0
    grid = SDXL(_with("sdxl", scheduler=scheduler)).grid(STEPS)
    assert float(grid.sigma[-1]) == float(grid.sigma[-2]) > 0
    assert ddpo().steps(VPPath(), grid, 0, 0) == (0, 1, 2)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_guidance_embedding_of_a_distilled_network_equals_diffusers(family: str) -> None:
    context, pooled = (64, None) if family == "sd15" else (128, 64)
    torch.manual_seed(0)
    options = {"time_cond_proj_dim": 8}
    network = tiny_checkpoints.unet(context, **options) if pooled is None else _distilled_xl(context, pooled, options)
    nn.init.normal_(network.conv_out.weight, std=0.05)
    shared = _with(family, unet=network, scheduler=diffusers.LCMScheduler(**BETAS, steps_offset=1))
    kind = tiny_checkpoints.FAMILIES[family].ours
    ours = kind(shared, distilled_guidance=3.0)
    torch.testing.assert_close(_ours(ours, 1.0), _images(ours, _plain_noise(ours), 3.0), rtol=0, atol=5e-4)
    assert ours.guidance == 1.0 and kind(shared).network_guidance == ours.distilled_default
    assert not torch.allclose(_ours(ours, 1.0), _ours(kind(shared), 1.0), atol=1e-4)
    with pytest.raises(ValueError, match=r"guidance distilled into it: set sampling\.guidance to 1, not 2"):
        ours.guidance_scale(2.0)


def _distilled_xl(context: int, pooled: int, options: dict[str, Any]) -> diffusers.UNet2DConditionModel:
    return tiny_checkpoints.unet(
        context,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=pooled + 6 * 4,
        **options,
    )


def _vae(**options: Any) -> diffusers.AutoencoderKL:
    torch.manual_seed(1)
    return tiny_checkpoints.kl(4, **options)


def test_the_scalings_of_an_autoencoder_are_honored_or_refused() -> None:
    statistics = {"latents_mean": [0.5, -0.5, 0.1, 0.0], "latents_std": [2.0, 1.0, 0.5, 3.0], "scaling_factor": 0.5}
    ours = SDXL(_with("sdxl", vae=_vae(**statistics), scheduler=HONORED["playground"]()))  # as Playground v2.5 has them
    torch.testing.assert_close(_ours(ours, 3.0), _images(ours, _plain_noise(ours), 3.0), rtol=0, atol=5e-4)
    for family, options in (("sd15", statistics), ("sd15", {"shift_factor": 0.1}), ("sdxl", {"shift_factor": 0.1})):
        pipe = _with(family, vae=_vae(**options))
        with pytest.raises(ValueError, match=rf"sets {next(iter(options))}, which {type(pipe).__name__} does not read"):
            tiny_checkpoints.FAMILIES[family].ours(pipe)


def test_a_float16_autoencoder_is_moved_to_float32_if_it_says_so() -> None:
    for upcast in (True, False):
        ours = SDXL(_with("sdxl", vae=_vae(force_upcast=upcast).half()))
        assert ours.pipe.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert StableDiffusion(_with("sd15", vae=_vae(force_upcast=True).half())).pipe.vae.dtype == torch.float16


def test_networks_that_take_more_than_a_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="the network has in_channels 9 for latents of 4 channels"):
        StableDiffusion(_with("sd15", unet=tiny_checkpoints.unet(64, in_channels=9)))


def test_a_size_of_height_and_width_is_the_default_of_both() -> None:
    network = _pipe("sd15").unet
    network.register_to_config(sample_size=[8, 12])
    try:
        assert StableDiffusion(_pipe("sd15")).resolution == (16, 24)
    finally:
        network.register_to_config(sample_size=8)


def test_an_edm_checkpoint_is_trained_by_the_default_recipe() -> None:
    def brightness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return samples.flatten(1).mean(1)

    torch.manual_seed(0)
    network = tiny_checkpoints.unet_xl(128, 64)
    ours = SDXL(_with("sdxl", unet=network, scheduler=diffusers.EDMEulerScheduler()))
    settings = TrainerSettings(rounds=1, prompts_per_round=2, group_size=2, batch_size=4, updates_per_round=1)
    policy = Policy(ours.denoiser, Lora(rank=2))
    trainer = Trainer(ours, policy, brightness, PROMPTS, flow_grpo(clip_range=0.1), settings, Sampling(STEPS))
    assert trainer.kernel == DPMSDE() and trainer.guidance == 5.0
    before = [parameter.detach().clone() for parameter in policy.parameters]
    (result,) = trainer.rounds()
    assert result.log_ratio_max == 0.0 and result.reward == result.reward
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters, strict=True))
    again = ours.grid(STEPS, ours.grid(STEPS).sigma[:-1].tolist())  # as evaluations take the levels of a protocol
    torch.testing.assert_close(again.timestep, ours.grid(STEPS).timestep, rtol=0, atol=1e-6)


def test_training_levels_of_an_edm_scheduler_are_on_its_path() -> None:
    ours = SDXL(_with("sdxl", scheduler=diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)))
    level = ours.level(torch.tensor([0.0, 0.5, 1.0]))
    assert isinstance(ours.path, EDMPath)
    torch.testing.assert_close(level.sigma, torch.tensor([0.01, (0.01 * 50) ** 0.5, 50.0], dtype=torch.float64))
    torch.testing.assert_close(level.timestep, 0.25 * level.sigma.log())
    explicit = ours.grid(2, [50.0, 1.0])
    assert explicit.sigma.tolist() == [50.0, 1.0, 0.0] and float(explicit.timestep[1]) == 0.0


def _network(family: str, **settings: Any) -> Any:
    """The denoiser of a tiny checkpoint with other settings and random weights."""
    own = tiny_checkpoints.FAMILIES[family]
    shared = _pipe(family).components[own.ours.denoiser_name]
    torch.manual_seed(0)
    network = type(shared).from_config(shared.config, **settings)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


def _compared(family: str, network: Any, guidance: float, options: dict[str, Any], call: dict[str, Any]) -> Tensor:
    """Our samples with a network, which must equal those of diffusers when it is called with ``call``."""
    spec = tiny_checkpoints.FAMILIES[family]
    ours = spec.ours(_with(family, transformer=network), **{**spec.options, **options})
    samples = _ours(ours, guidance)
    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    ours.pipe.scheduler = euler.from_config(ours.pipe.scheduler.config, **spec.scheduler)
    named = {"num_inference_steps": STEPS, "output_type": "pt", "return_dict": False, **spec.options, **spec.extra}
    theirs = ours.pipe(PROMPTS, latents=spec.noise(_plain_noise(ours)), **{**named, **call})[0]
    torch.testing.assert_close(samples, theirs, rtol=0, atol=5e-4)
    return samples


def test_a_network_that_learned_a_variance_equals_diffusers() -> None:
    _compared("sana", _network("sana", out_channels=8), 3.0, {}, {"guidance_scale": 3.0})


def test_flux_without_distilled_guidance_takes_a_negative_prompt() -> None:
    network, options = _network("flux", guidance_embeds=False), {"negative_prompt": "two blue squares"}
    call = {"true_cfg_scale": 40.0, "negative_prompt": ["two blue squares"] * 2}
    guided = _compared("flux", network, 40.0, options, call)
    plain = _compared("flux", network, 1.0, {}, {"true_cfg_scale": 1.0})
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_a_guidance_distilled_qwen_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer/config\.json has guidance_embeds True, which is not supported"):
        tiny_checkpoints.FAMILIES["qwen_image"].ours(
            _with("qwen_image", transformer=_network("qwen_image", guidance_embeds=True))
        )
