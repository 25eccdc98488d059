"""Every family against diffusers itself, on a tiny random checkpoint, and through the loops."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.pipelines.ace_step import pipeline_ace_step
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

import pipelines
from genalign.algorithms import matching_losses
from genalign.algorithms.interfaces import MetricSums, TermScales, UpdateBatch, UpdateContext
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipes import dense_grpo, dragon, flow_grpo, nft, prdp
from genalign.diffusion.lora import save_peft
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import DDIM, ODE, FlowSDE, Kernel
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward
from genalign.search import BestOfN, FKSteering, Prune, search
from genalign.search.strategy import Strategy
from genalign.training.memory_estimate import estimate_memory
from genalign.training.settings import FittedSettings, TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines import AudioLDM2, Flux2Klein, QwenImage21
from pipelines.base import DiffusersPipeline
from pipelines.flows import FlowPipeline, pack
from pipelines.meta_device import outline
from pipelines.qwen_image21 import on_white
from pipelines.steering.latent_scores import decode_latents
from tests.pipelines.tiny_checkpoints import FAMILIES, Family, FolderOf

# What diffusers itself does: its EulerDiscreteScheduler turns a tensor into an array in a way that numpy 2 deprecates,
# and its AutoencoderOobleck uses torch's older weight_norm.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]

PROMPTS = ["a red circle", "two big blue squares"]
STEPS = 4


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _open(family: str, folder: Path, **options: Any) -> DiffusersPipeline:
    return pipelines.load(folder, **{**FAMILIES[family].options, **options})


def _diffusers(family: Family, folder: Path, noise: Tensor, guidance: float, negative: str = "") -> list[Tensor]:
    """The latents after every step of the diffusers pipeline, and its samples, made one by one where it pads texts."""
    if not family.pads_texts:
        return _called(family, folder, noise, guidance, PROMPTS, negative)
    each = [
        _called(family, folder, noise[i : i + 1], guidance, PROMPTS[i : i + 1], negative) for i in range(len(PROMPTS))
    ]
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def _called(
    family: Family, folder: Path, noise: Tensor, guidance: float, prompts: list[str], negative: str = ""
) -> list[Tensor]:
    vanilla = family.ours.kind.from_pretrained(folder)
    vanilla.set_progress_bar_config(disable=True)
    first_order: Any = family.ours(vanilla, **family.options).first_order
    vanilla.scheduler = first_order.from_config(vanilla.scheduler.config, **family.scheduler)
    options = {name: value for name, value in family.options.items() if name != "seconds"} | family.extra
    if negative:
        options["negative_prompt"] = [negative] * len(prompts)
    if negative and family.ours is Flux2Klein:  # which takes no text
        texts = options.pop("negative_prompt")
        options["negative_prompt_embeds"] = vanilla.encode_prompt(texts, max_sequence_length=8)[0]
    seen: list[Tensor] = []

    def note(pipe: object, step: int, timestep: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    noted: dict[str, Any] = {"callback_on_step_end": note}
    if family.ours is AudioLDM2:
        noted = {"callback": lambda step, timestep, latents: seen.append(latents)}
    samples, *_ = vanilla(
        prompt=prompts,
        latents=noise,
        num_inference_steps=STEPS,
        output_type="pt",
        return_dict=False,
        **noted,
        **{family.guidance: family.scale(guidance), **options},
    )
    if family.ours is AudioLDM2:
        return [*seen, samples[:, None]]
    return [*seen, on_white(samples) if family.ours is QwenImage21 else samples]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "stable_audio"])  # it has no ODE: test_audio
def test_the_ode_equals_diffusers(
    family: str, folder_of: FolderOf, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ACE-Step's guidance as here: by the state of a step alone
    monkeypatch.setattr(pipeline_ace_step, "MomentumBuffer", lambda momentum: MomentumBuffer(0.0))
    folder, spec = folder_of(family), FAMILIES[family]
    ours = _open(family, folder)
    used = 1.0 if ours.is_distilled else guidance
    start = RolloutInputs(ours.encode(PROMPTS), torch.arange(2), (1, 2), (1, 2))
    grid = ours.grid(STEPS)
    sampled = rollout(ours, start, grid, [ODE()] * STEPS, used, store=range(STEPS))
    *latents, samples = _diffusers(spec, folder, spec.noise(ours.initial_noise([1, 2])), guidance)
    for i, theirs in enumerate(latents):
        expected = spec.latents(theirs, sampled.final, float(grid.alpha[i + 1]))
        torch.testing.assert_close(sampled.x_next[:, i], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(sampled.final), samples, rtol=0, atol=1e-4)


NEGATIVE = ["sd3", "sd15", "sdxl", "sana", "qwen_image", "qwen_image21", "z_image", "flux2_klein", "audio_ldm2"]


@pytest.mark.parametrize("family", NEGATIVE)
def test_a_negative_prompt_equals_diffusers(family: str, folder_of: FolderOf) -> None:
    folder, spec = folder_of(family), FAMILIES[family]
    ours = _open(family, folder, negative_prompt="three green rings")
    scale = 60.0  # the tiny networks hardly depend on texts
    start = RolloutInputs(ours.encode(PROMPTS), torch.arange(2), (1, 2), (1, 2))
    final = rollout(ours, start, ours.grid(STEPS), [ODE()] * STEPS, scale).final
    noise = spec.noise(ours.initial_noise([1, 2]))
    with torch.no_grad():
        samples = ours.decode(final)
    with_negative, without = (_diffusers(spec, folder, noise, scale, text)[-1] for text in ("three green rings", ""))
    torch.testing.assert_close(samples, with_negative, rtol=0, atol=5e-5)
    assert float((with_negative - without).abs().max()) > 3e-4


def test_a_negative_prompt_without_effect_is_refused(folder_of: FolderOf) -> None:
    for family in ("flux", "ace_step"):
        with pytest.raises(ValueError, match=r"this model takes no negative prompt: leave model\.negative_prompt out"):
            _open(family, folder_of(family), negative_prompt="dark")
    ours = _open("sd3", folder_of("sd3"), negative_prompt="dark")
    assert ours.guidance_scale(None) == 3.5
    with pytest.raises(ValueError, match=r"'dark' has no effect at guidance 1: set sampling\.guidance above 1"):
        Sampling(STEPS, guidance=1.0).guidance_scale(ours)


DEFAULTS = {
    "sd3": 3.5,
    "flux": 1.0,
    "flux2_klein": 4.0,
    "sd15": 7.5,
    "sd21": 7.5,
    "sdxl": 5.0,
    "sana": 4.5,
    "qwen_image": 4.0,
    "qwen_image21": 1.0,
    "z_image": 5.0,
    "stable_audio": 7.0,
    "ace_step": 7.0,
    "audio_ldm2": 3.5,
}


def test_the_default_of_guidance_is_that_of_the_family(family: str, folder_of: FolderOf) -> None:
    ours = _open(family, folder_of(family))
    assert ours.guidance == DEFAULTS[family] == Sampling(STEPS).guidance_scale(ours)
    assert Sampling(STEPS, guidance=0.0).guidance_scale(ours) == 0.0
    own = inspect.signature(type(ours).kind.__call__).parameters[FAMILIES[family].guidance].default
    assert own == DEFAULTS[family] or family == "sd3"  # which has that of its model card, as SD3.5 large
    ours.denoiser.register_to_config(_guidance_scale=2.5)
    assert ours.guidance == 2.5


def test_sd3_has_the_guidance_of_its_model_cards(folder_of: FolderOf) -> None:
    ours = _open("sd3", folder_of("sd3"))
    medium, first = {"dual_attention_layers": (0,)}, {"qk_norm": None, "dual_attention_layers": ()}
    for settings, scale in ((medium, 4.5), (first, 7.0)):
        ours.denoiser.register_to_config(**settings)
        assert ours.guidance == scale


def _prediction(pipeline: DiffusersPipeline) -> Tensor:
    """The prediction for both prompts from the same noise, without guidance."""
    return pipeline.predict(pipeline.initial_noise([1, 2]), pipeline.grid(STEPS)[1], pipeline.encode(PROMPTS), 1.0)


def _policy(pipeline: DiffusersPipeline) -> Policy:
    policy = Policy(pipeline.denoiser, Lora(rank=4, alpha=6))
    for i, parameter in enumerate(policy.parameters):
        torch.manual_seed(i)
        torch.nn.init.normal_(parameter, std=0.1)
    return policy


def test_a_sample_is_the_same_alone_and_in_a_batch(family: str, folder_of: FolderOf) -> None:
    ours = _open(family, folder_of(family))
    x, step, both = ours.initial_noise([1, 2]), ours.grid(STEPS)[1], ours.encode(PROMPTS)
    scale = 1.0 if ours.is_distilled else 3.0
    with torch.no_grad():
        together = ours.predict(x, step, both, scale)
        for i in range(2):
            alone = ours.predict(x[i : i + 1], step, ours.encode(PROMPTS[i : i + 1]), scale)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


def test_steer_decodes_as_the_wrapper_does(family: str, folder_of: FolderOf) -> None:
    ours, spec = _open(family, folder_of(family)), FAMILIES[family]
    latents = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    moved = pack(latents) if spec.ours is Flux2Klein else spec.noise(latents)  # as the scheduler moves them
    with torch.no_grad():
        expected = ours.decode(latents)
        decoded = decode_latents(ours.pipe, moved, (ours.resolution[0], ours.resolution[-1]))
    torch.testing.assert_close(decoded[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5)


def test_an_outline_has_the_shapes_of_the_checkpoint(family: str, folder_of: FolderOf) -> None:
    ours, options = _open(family, folder_of(family)), FAMILIES[family].options
    meta = outline(folder_of(family), **options)
    assert meta.pipeline.latent_shape == ours.latent_shape and meta.pipeline.sample_shape == ours.sample_shape
    longest, encoded = meta.pipeline.longest_conditioning(2), ours.encode(PROMPTS).tensors
    assert longest.keys() == encoded.keys()
    for name, tensor in encoded.items():
        assert tensor.ndim == longest[name].ndim and tensor.dtype == longest[name].dtype
        assert all(own <= most for own, most in zip(tensor.shape, longest[name].shape, strict=True)), name


def test_the_memory_of_a_run_is_counted_without_values(family: str, folder_of: FolderOf) -> None:
    if family == "qwen_image21":
        pytest.skip("its network repeats rows as often as values say")
    meta = outline(folder_of(family), **FAMILIES[family].options)
    policy = Policy(meta.pipeline.denoiser, Lora(rank=2))
    settings = FittedSettings(prompts_per_round=2, group_size=2, batch_size=2, micro_batch=1, updates_per_round=1)
    rewards = [NamedReward("first", lambda samples, _: samples.flatten(1)[:, 0])]
    (estimate,) = estimate_memory(meta, policy, flow_grpo(window=1), settings, Sampling(3), rewards).values()
    phases = estimate.phases
    assert phases["sampling beside decoding"]["tensors"] > phases["decoding"]["tensors"] > 0
    assert phases["learning"]["tensors"] > 0


@pytest.mark.parametrize("family", [name for name, spec in FAMILIES.items() if spec.ours.lora_in_diffusers])
def test_a_lora_goes_through_diffusers_unchanged(family: str, folder_of: FolderOf, tmp_path: Path) -> None:
    ours = _open(family, folder_of(family))
    policy = _policy(ours)
    ours.save_lora(tmp_path, policy.adapter_state(), policy.config)  # it has one
    vanilla = FAMILIES[family].ours.kind.from_pretrained(folder_of(family))
    vanilla.load_lora_weights(tmp_path)
    loaded = get_peft_model_state_dict(vanilla.components[ours.denoiser_name], adapter_name="default_0")
    assert loaded.keys() == policy.adapter_state().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in policy.adapter_state().items())
    theirs = type(ours)(vanilla, **FAMILIES[family].options)
    with torch.no_grad():
        tuned, again = _prediction(ours), _prediction(theirs)
        # a product's last bit depends on how its memory is aligned
        torch.testing.assert_close(tuned, again, rtol=0, atol=3e-7 * float(tuned.abs().max()))
        with policy.reference():
            assert not torch.allclose(tuned, _prediction(ours))


@pytest.mark.parametrize("family", ["sd3", "stable_audio", "ace_step", "audio_ldm2"])
def test_an_adapter_goes_through_peft_and_into_the_weights(family: str, folder_of: FolderOf, tmp_path: Path) -> None:
    ours, again = _open(family, folder_of(family)), _open(family, folder_of(family))
    policy = _policy(ours)
    with torch.no_grad():
        tuned = _prediction(ours)
        assert policy.config is not None
        save_peft(tmp_path / "peft", policy.adapter_state(), policy.config)
        theirs = PeftModel.from_pretrained(_open(family, folder_of(family)).denoiser, str(tmp_path / "peft"))
        prefix = "base_model.model."
        loaded = {name.removeprefix(prefix): tensor for name, tensor in get_peft_model_state_dict(theirs).items()}
        assert loaded.keys() == policy.adapter_state().keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in policy.adapter_state().items())
        ours.save_lora(tmp_path / "lora", policy.adapter_state(), policy.config)
        for folder in ("peft", "lora"):
            other = _open(family, folder_of(family))
            other.load_lora(tmp_path / folder)
            torch.testing.assert_close(_prediction(other), tuned, rtol=0, atol=1e-6)
        assert not torch.allclose(_prediction(again), tuned, rtol=0, atol=1e-5)
        other.save_merged(tmp_path / "merged", whole=True)
        merged = _open(family, tmp_path / "merged")
        assert not any("lora" in name for name in merged.denoiser.state_dict())
        torch.testing.assert_close(_prediction(merged), tuned, rtol=0, atol=1e-5)


def brightness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


RECIPES: dict[str, Callable[[Kernel], Recipe]] = {
    "flow_grpo": lambda kernel: flow_grpo(kernel, window=2, clip_range=0.1),
    "dense_grpo": lambda kernel: dense_grpo(kernel, window=2, clip_range=0.1),
    "prdp": lambda kernel: prdp(kernel, window=2, clip_range=0.1, beta=1.0),
    "dragon": lambda kernel: dragon(),
    "nft": lambda kernel: nft(),
}


def _kernel(pipeline: DiffusersPipeline) -> Kernel:
    return FlowSDE(0.7) if isinstance(pipeline, FlowPipeline) else DDIM(1.0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_step_of_training_lowers_the_loss(
    family: str, recipe: str, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _open(family, folder_of(family))
    rate = 1e-3 if isinstance(ours, FlowPipeline) else 3e-3  # little of the tiny UNets is attention
    settings = TrainerSettings(prompts_per_round=2, group_size=4, batch_size=8, updates_per_round=1, learning_rate=rate)
    policy, prompts = Policy(ours.denoiser, Lora(rank=4)), PromptSet.of(PROMPTS)
    rewards, own = [NamedReward("bright", brightness)], RECIPES[recipe](_kernel(ours))
    trainer = Trainer(ours, policy, rewards, prompts, own, settings, Sampling(STEPS, guidance=1.0))
    parts = trainer.sample(0, prompts.prompts)
    outcome = trainer.gather_scores(parts, prompts.prompts)
    batch = UpdateBatch(parts[0].rollout, own.credit(outcome), outcome.group, False)
    sizes: list[Tensor] = []

    def by_own_size(difference: Tensor) -> Tensor:
        sizes.append(difference.double().flatten(1).detach().abs().mean(1))
        return difference.double().flatten(1).square().mean(1) / sizes[-1]

    def by_first_size(difference: Tensor) -> Tensor:
        return difference.double().flatten(1).square().mean(1) / sizes.pop(0)

    # NFT divides its errors by sizes that change in training; its steps descend the errors divided by the first sizes
    monkeypatch.setattr(matching_losses, "normalized_error", by_own_size)
    before = _metrics(trainer, batch)
    assert before.log_ratio_max == 0.0
    monkeypatch.undo()
    trainer.learner.learn(0, prompts.prompts, parts, outcome, trainer.kernel)
    monkeypatch.setattr(matching_losses, "normalized_error", by_first_size)
    assert _metrics(trainer, batch).mean("loss") < before.mean("loss")


def _metrics(trainer: Trainer, batch: UpdateBatch) -> MetricSums:
    """The metrics of the first batch of ``learn``, without an update."""
    metrics = MetricSums()
    context = UpdateContext(
        trainer.pipeline, trainer.policy, trainer.grid, trainer.kernel, 1.0, trainer.learner.old, metrics
    )
    trainer.recipe.objective.backward(
        context, batch, TermScales(1.0, 1.0), derived_seed(trainer.settings.seed, 0, "l", 0)
    )
    for parameter in trainer.policy.parameters:
        parameter.grad = None
    return metrics


@pytest.mark.parametrize("strategy", [BestOfN(3), Prune((0, 1), (0.5, 0.5), 4), "fk"], ids=str)
def test_searches_run(family: str, strategy: Strategy | str, folder_of: FolderOf) -> None:
    ours = _open(family, folder_of(family))
    own = FKSteering(particles=3, kernel=_kernel(ours)) if isinstance(strategy, str) else strategy
    result = search(ours, PROMPTS, brightness, own, sampling=Sampling(STEPS, guidance=1.0))
    assert result.samples.shape == (2, *ours.sample_shape)
    assert torch.equal(result.scores[:, 0], brightness(result.samples, []))


def test_the_log_names_the_scheduler_that_is_not_used(
    family: str, folder_of: FolderOf, caplog: pytest.LogCaptureFixture
) -> None:
    _open(family, folder_of(family))
    others = {"sd15": "PNDM", "sana": "DPMSolverMultistep", "stable_audio": "CosineDPMSolverMultistep"}
    shipped = others.get(family)
    lines = [record.message for record in caplog.records if record.name == "pipelines.base"]
    assert len(lines) == (1 if shipped else 0)
    assert all(f"comes with {shipped}Scheduler. Genalign samples by first-order" in line for line in lines)


def test_memory_options_work_together(family: str, folder_of: FolderOf) -> None:
    plain = _open(family, folder_of(family))
    memory = Memory(offload="all", checkpointing=True, decode_batch=1)
    lean = _open(family, folder_of(family), memory=memory)
    conditioning = plain.encode(PROMPTS)
    assert all(torch.equal(tensor, conditioning.tensors[name]) for name, tensor in lean.encode(PROMPTS).tensors.items())
    policies = _policy(plain), _policy(lean)
    calls: list[str] = []
    for name, pipeline in (("plain", plain), ("lean", lean)):
        layer = next(module for path, module in pipeline.denoiser.named_modules() if path.endswith("to_q"))
        layer.register_forward_hook(lambda *args, name=name: calls.append(name))
        _prediction(pipeline).square().sum().backward()
    gradients = [torch.cat([_gradient(parameter).flatten() for parameter in policy.parameters]) for policy in policies]
    assert calls.count("lean") == 2 * calls.count("plain") > 0  # activations were computed again
    torch.testing.assert_close(gradients[0], gradients[1])
    with torch.no_grad():
        noise = plain.initial_noise([1, 2])
        latents = noise / noise.std()
        torch.testing.assert_close(plain.decode(latents), lean.decode(latents))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zero for what the output does not depend on: the last block's text."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_trains_a_float32_lora(family: str, dtype: torch.dtype, folder_of: FolderOf) -> None:
    ours = _open(family, folder_of(family), dtype=dtype)
    policy = _policy(ours)
    assert {parameter.dtype for parameter in policy.parameters} == {torch.float32}
    output = _prediction(ours)
    output.square().mean().backward()
    assert output.dtype == torch.float32 and bool(output.isfinite().all())
    gradients = [_gradient(parameter) for parameter in policy.parameters]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients) and any(map(torch.any, gradients))


def test_guidance_on_a_distilled_network_is_refused(folder_of: FolderOf) -> None:
    ours = _open("flux", folder_of("flux"), distilled_guidance=2.0)
    x, step = ours.initial_noise([1]), ours.grid(STEPS)[0]
    with pytest.raises(ValueError, match=r"guidance distilled into it: set sampling\.guidance to 1, not 4"):
        ours.predict(x, step, ours.encode(PROMPTS[:1]), 4.0)
    with pytest.raises(ValueError, match="max_sequence_length must be at least 1 text token, not 0"):
        _open("flux", folder_of("flux"), max_sequence_length=0)
    with torch.no_grad():
        none, default = (_open("flux", folder_of("flux"), distilled_guidance=scale) for scale in (0.0, None))
        first, second = (pipe.predict(x, step, pipe.encode(PROMPTS[:1]), 1.0) for pipe in (none, default))
        assert not torch.allclose(first, second, rtol=0, atol=1e-5)


def test_a_klein_that_is_distilled_takes_no_guidance(folder_of: FolderOf) -> None:
    ours = _open("flux2_klein", folder_of("flux2_klein"))
    ours.pipe.register_to_config(is_distilled=True)
    assert ours.guidance_scale(None) == 1.0 and not ours.takes_negative
    with pytest.raises(ValueError, match=r"is distilled to a few steps: set sampling\.guidance to 1, not 4"):
        ours.require_guidance(4.0)


def test_the_shift_of_klein_falls_with_the_steps(folder_of: FolderOf) -> None:
    ours = _open("flux2_klein", folder_of("flux2_klein"))
    first = [float(ours.grid(steps).sigma[steps // 2]) for steps in (4, 50, 200)]
    assert first == sorted(first, reverse=True) and first[0] - first[2] > 0.1
    assert float(ours.level(torch.tensor([0.5])).sigma) == pytest.approx(first[1], abs=0.02)


def test_the_sigmas_of_a_checkpoint_are_its_grid(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("qwen_image21"), tmp_path / "turbo"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": [1.0, 0.9, 0.5, 0.2]}))
    ours, spec = _open("qwen_image21", folder), FAMILIES["qwen_image21"]
    assert outline(folder).pipeline.sample_shape == (3, 1024, 1024)
    start = RolloutInputs(ours.encode(PROMPTS), torch.arange(2), (1, 2), (1, 2))
    *_, theirs, _ = _diffusers(spec, folder, spec.noise(ours.initial_noise([1, 2])), 1.0)
    final = rollout(ours, start, ours.grid(4), [ODE()] * 4, 1.0).final
    torch.testing.assert_close(final, spec.latents(theirs, final, 1.0), rtol=0, atol=1e-5)
    assert float(ours.grid(4).sigma[1] - _open("qwen_image21", folder_of("qwen_image21")).grid(4).sigma[1]) > 0.05
    with pytest.raises(ValueError, match=r"sampled in 4 steps, at the sample_sigmas .* not 8, or sampling\.sigmas"):
        ours.grid(8)


def test_training_goes_on_from_a_published_lora(folder_of: FolderOf, tmp_path: Path) -> None:
    first, second = _open("sd3", folder_of("sd3")), _open("sd3", folder_of("sd3"))
    old = _policy(first)
    first.save_lora(tmp_path, old.adapter_state(), old.config)  # it has one
    second.load_lora(tmp_path)
    new = Policy(second.denoiser, None, has_adapter=True)
    assert new.config is not None and (new.config.r, new.config.lora_alpha) == (4, 6)
    for mine, theirs in zip(new.parameters, old.parameters, strict=True):
        assert mine.requires_grad and torch.equal(mine, theirs)
    with torch.no_grad(), old.reference(), new.reference():
        assert torch.equal(_prediction(first), _prediction(second))
