"""Published models on a CUDA device without one: devices, dtypes, waits for the device, copies to it and its memory."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from genalign import search
from genalign.algorithms import few_step_recipes, pathwise_recipes, preference_recipes, recipes
from genalign.algorithms import recipe_changes as changes
from genalign.algorithms.credit import GroupRelative, NormalizedSum
from genalign.algorithms.matching import MatchingObjective
from genalign.algorithms.matching_losses import RewardWeightedLoss
from genalign.algorithms.pathwise import Ascent
from genalign.algorithms.recipe import Recipe
from genalign.algorithms.step_schedules import LastSteps
from genalign.algorithms.tails import Chain
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import generate
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import CPS, DDIM, DPMSDE
from genalign.runtime.distributed import own_device
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward, score
from genalign.search import run_search
from genalign.training.sampler import in_thread
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from pipelines import steer
from pipelines.base import DiffusersPipeline
from rewards.adversarial.adversary import DiscriminatorSettings
from rewards.adversarial.discriminator_heads import AdversarialReward
from rewards.adversarial.tuned_clip import TunedClipReward
from rewards.adversarial.update_rules import Ratio
from rewards.backbones.image_features import ClipFeatures
from rewards.backbones.reference_images import ImageTensor, ReferencePool
from rewards.clip import ClipReward
from rewards.pairwise import BradleyTerry, WinRateReward
from rewards.set_rewards import FrechetReward, PerSampleFrechetReward, VendiReward
from rewards.similarity import ReferenceSimilarity
from scripts.benchmarks.published_sizes import MODELS, default_dtype
from scripts.pretrain.shapes_tokenizers import clip_tokenizer
from tests.fake_cuda import Event, FakeCuda, _Backward, by_place

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers, in schedulers
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),  # diffusers, in the autoencoder of audio
]
PROMPTS = ["red circle", "blue square"]
SETTINGS = TrainerSettings(
    rounds=1, prompts_per_round=2, group_size=2, batch_size=4, updates_per_round=1, overlap_scoring=False
)
STEPS = Sampling(num_steps=3)
LARGE = 1 << 12  # bytes: more than the noise levels and positions that a network call takes, less than any text


def sharpness(samples: Tensor, prompts: object) -> Tensor:
    return samples.diff(dim=-1).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class Round:
    """The events of a training round, and the memory at its highest while sampling and while learning."""

    waits: list[Event]
    copies: list[Event]
    sampling_peak: int
    learning_peak: int
    micro_batches: int

    def steps(self, events: list[Event]) -> list[Event]:
        """Those of the rollout and of completions that come after the first network call."""
        return [event for event in events if {"rollout", "complete"} & {*event.functions} and event.mark > 0]

    def learning(self, events: list[Event]) -> list[Event]:
        return [event for event in events if "_accumulate" in event.functions]


@dataclass(frozen=True)
class Model:
    """A published model on a device, and its trainable weights."""

    cuda: FakeCuda
    pipeline: DiffusersPipeline
    policy: Policy

    @classmethod
    def open(
        cls,
        name: str,
        blocks: int | None = 1,  # of each kind
        weights: torch.dtype = torch.bfloat16,
        autocast: torch.dtype | None = torch.bfloat16,
        lora: Lora | None = Lora(rank=32),  # it is frozen
        **memory: Any,
    ) -> Model:
        """Build a model, which marks each of its network calls; ``memory`` are the fields of ``Memory``."""
        build, family, options = MODELS[name]
        with FakeCuda() as cuda:
            with torch.device("cuda"), default_dtype(weights):
                pipe = build(blocks)
            if memory.get("offload", "none") != "none":
                pipe.to("cpu")
            pipeline = family(pipe, device="cuda", autocast=autocast, memory=Memory(**memory), **options)
            predict = pipeline.predict

            def marked(*arguments: Any) -> Tensor:
                cuda.mark()
                return predict(*arguments)

            pipeline.predict = marked  # type: ignore[method-assign]
            return cls(cuda, pipeline, Policy(pipeline.denoiser, lora))

    def train(self, recipe: Recipe, settings: TrainerSettings = SETTINGS, reward: Any = sharpness) -> Round:
        with self.cuda as cuda:
            rewards = [NamedReward("reward", reward), *([NamedReward("again", reward)] if recipe.balance else [])]
            trainer = Trainer(self.pipeline, self.policy, rewards, PROMPTS, recipe, settings, STEPS)
            cuda.reset_peak()
            sample, peaks = trainer.sample, []

            def measured(*arguments: Any) -> Any:
                batches = sample(*arguments)
                peaks.append(cuda.peak)
                cuda.reset_peak()
                return batches

            trainer.sample = measured  # type: ignore[method-assign]
            (result,) = trainer.rounds()
            assert result.skipped_updates == 0 and result.failed_rewards == 0
            passes = 1 + len(rewards) if recipe.balance else 1  # one for each reward, and the update's own
            micro_batches = passes * len(PROMPTS) * settings.group_size // trainer.learner.micro_batch
            return Round(cuda.waits, cuda.copies, peaks[0], cuda.peak, micro_batches)


shared = functools.cache(Model.open)
"""A model that tests may train one after the other, opened once."""


def check(trained: Round, conditionings: int = 1) -> None:
    """The limits are two waits in a step and four in a micro-batch, and none is left today.

    Args:
        trained: The round.
        conditionings: How often a micro-batch may copy its conditioning.
    """
    assert by_place(trained.steps(trained.waits)) == {}
    assert by_place(trained.learning(trained.waits)) == {}
    numbers = [event for event in trained.steps(trained.copies) if "expand" in event.functions and event.size <= 4]
    assert by_place(numbers) == {}
    for events in (trained.steps(trained.copies), trained.learning(trained.copies)):
        # noise of a step, or of a noise hypernetwork; the negative prompt, once a run
        expected = {"seeded_noise", "initial_noise", "unconditional_tensors"}
        large = [event for event in events if event.size > LARGE and not expected & {*event.functions}]
        elsewhere = [event for event in large if "to" not in event.functions or "predict" in event.functions]
        assert by_place(elsewhere) == {}  # all others are by Conditioning.to and Rollout.to
    assert sum("unconditional_tensors" in event.functions for event in trained.copies) <= 2
    copied = [event for event in trained.learning(trained.copies) if event.functions[-2:-1] == ("to",)]
    assert 0 < len(copied) <= 3 * conditionings * trained.micro_batches  # three tensors


def channels(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "flow_grpo": lambda: recipes.flow_grpo(window=1, kl=0.01),
    "dense_grpo": lambda: recipes.dense_grpo(window=1),
    "ngrpo": lambda: recipes.ngrpo(window=1, best=10.0),
    "guard_grpo": lambda: recipes.guard_grpo(window=1),
    "mix_grpo": lambda: recipes.mix_grpo(CPS(), window=1),
    "tempflow_grpo": recipes.tempflow_grpo,
    "vgpo": lambda: recipes.vgpo(window=1),
    "turning_point": lambda: recipes.turning_point(window=1),
    "flow_dppo": lambda: recipes.flow_dppo(window=1),
    "ddpo": lambda: recipes.ddpo(window=1),
    "adv_grpo": lambda: recipes.adv_grpo(window=1),
    "prdp": lambda: recipes.prdp(window=1),
    "dragon": lambda: recipes.dragon(anchor=0.1, draws=1),
    "dragon_set": lambda: recipes.dragon_set(VendiReward(), channels, quality=0.5, loss="kto", draws=1),
    "nft": lambda: recipes.nft(draws=1),
    "awm": lambda: recipes.awm(draws=1),
    "align_prop": pathwise_recipes.align_prop,
    "direct_align": lambda: pathwise_recipes.direct_align(high=0.8, inversion=0.5),
    "draft": lambda: pathwise_recipes.draft(
        2, Ascent(ceiling=9.0, normalize_gradients=True, limit=1.0, anchor=0.1, weight_distance=0.1)
    ),
    "draft_lv": pathwise_recipes.draft_lv,
    "drtune": pathwise_recipes.drtune,
    "flow_bp": lambda: pathwise_recipes.flow_bp(active=2),
    "instruct_video": lambda: pathwise_recipes.instruct_video(moves=4),
    "refl": pathwise_recipes.refl,
    "noise_hypernetwork": pathwise_recipes.noise_hypernetwork,
    "pathwise": lambda: pathwise_recipes.pathwise(Chain(), LastSteps(1)),
    "crd": lambda: preference_recipes.crd(draws=1, anchor_guidance=3.0),
    "dgpo": lambda: preference_recipes.dgpo(draws=1),
    "dp2o_sr": lambda: preference_recipes.dp2o_sr(count=1, draws=1),
    "dpo": lambda: preference_recipes.dpo(draws=1, sft=0.5),
    "gdro": lambda: preference_recipes.gdro(draws=1),
    "kto": lambda: preference_recipes.kto(threshold=0.0, draws=1),
    "rwr": lambda: preference_recipes.rwr(draws=1),
    "sft": lambda: preference_recipes.sft(draws=1),
    "with_chi_squared": lambda: changes.with_chi_squared(recipes.flow_grpo(window=1, kl=0.01), 50.0),
    "with_credit": lambda: changes.with_credit(recipes.flow_grpo(DPMSDE(), window=1), NormalizedSum()),
    "with_gradient_balance": lambda: changes.with_gradient_balance(recipes.flow_grpo(window=1)),
    "with_dynamic_sampling": lambda: changes.with_dynamic_sampling(recipes.flow_grpo(window=1)),
    "with_adaptive_group_size": lambda: changes.with_adaptive_group_size(recipes.flow_grpo(window=1)),
    "with_recalibration": lambda: changes.with_recalibration(recipes.dense_grpo(window=1)),
    "with_elastic_reset": lambda: changes.with_elastic_reset(recipes.flow_grpo(window=1), every=1),
    "matching": lambda: recipes.matching(GroupRelative(), MatchingObjective(RewardWeightedLoss(), draws=1)),
}
FEW_STEP = {
    "consistency": lambda: few_step_recipes.consistency(steps=4, guidance=2.0),
    "rg_lcd": lambda: few_step_recipes.rg_lcd(steps=4),
    "reward_instruct": few_step_recipes.reward_instruct,
    "distribution_matching": lambda: few_step_recipes.distribution_matching(reward=0.1, fake_steps=1),
}
OBJECTIVES = {  # a recipe of each family
    "flow_grpo": lambda: recipes.flow_grpo(window=1),
    "prdp": lambda: recipes.prdp(window=1),
    "nft": lambda: recipes.nft(draws=1),
    "draft": pathwise_recipes.draft,
}
OTHERS = [name for name in MODELS if name != "sd35_medium"]


def test_every_recipe_is_among_them() -> None:
    own = {
        name: function
        for module in (recipes, pathwise_recipes, preference_recipes, few_step_recipes, changes)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
    }
    names = {name for name, function in own.items() if inspect.signature(function).return_annotation == "Recipe"}
    assert names - {"rpo"} == {*RECIPES, *FEW_STEP}  # rpo, a matching recipe, needs a pool that marks references
    used = {type(make().objective) for make in RECIPES.values()}
    assert {type(make().objective) for make in OBJECTIVES.values()} == used


MARKS_ITS_NETWORK = "noise_hypernetwork"  # no other recipe can train its adapter
_FAST = (*OBJECTIVES, "noise_hypernetwork", "distribution_matching")
"""A recipe of each family, and those whose networks or calls differ."""


@pytest.mark.parametrize(
    "recipe",
    [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in (*RECIPES, *FEW_STEP)],
)
def test_no_recipe_waits_for_the_device_in_a_step(recipe: str) -> None:
    model = (Model.open if recipe == MARKS_ITS_NETWORK else shared)("sd35_medium")
    twice = recipe == "distribution_matching"  # whose direction encodes the prompts of its endpoints
    check(model.train({**RECIPES, **FEW_STEP}[recipe]()), conditionings=2 if twice else 1)


@pytest.mark.parametrize(
    "recipe", [name if name == "flow_grpo" else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "sdxl" else name for name in OTHERS],  # 5 s; as sd15
)
def test_no_model_waits_for_the_device_in_a_step(name: str, recipe: str) -> None:
    check(shared(name).train(OBJECTIVES[recipe]()))


STRATEGIES: dict[str, Callable[[], Any]] = {
    "BestOfN": lambda: search.BestOfN(2, DDIM(1.0)),
    "Prune": lambda: search.Prune((0,), (0.5,), 2),
    "Beam": lambda: search.Beam(2, 2),
    "ZeroOrder": lambda: search.ZeroOrder(neighbors=2, rounds=1),
    "Evolution": lambda: search.Evolution((0, 1), (2, 2), 1),
    "FKSteering": lambda: search.FKSteering(2, start=0.0),
    "ReNO": lambda: search.ReNO(2, recompute=True),
    "DNO": lambda: search.DNO(2, gamma=0.1, permutations=2),
    "NRG": lambda: search.NRG(1.0, 2, search.RewardGradient()),
}
GUIDED = {
    "RewardGradient": lambda: search.FKSteering(2, 1.0, start=0.0, guide=search.RewardGradient()),
    "DoobGuide": lambda: search.FKSteering(2, 1.0, start=0.0, guide=search.DoobGuide(2)),
}
NEEDS_A_SCORER = {"NoiseAwareGradient"}  # of latents of the model: test_guided_sampling has it


def test_every_strategy_is_among_them() -> None:
    classes = inspect.getmembers(search, inspect.isclass)
    calls = {name: [*inspect.signature(kind.__call__).parameters][1:] for name, kind in classes}
    assert {name for name, parameters in calls.items() if parameters == ["run", "budget"]} == {*STRATEGIES}
    assert {name for name, parameters in calls.items() if parameters[:2] == ["run", "batch"]} == {
        *GUIDED,
        *NEEDS_A_SCORER,
    }


def look_for(model: Model, strategy: Any, reward: Any = sharpness) -> None:
    """Search for a sample: at most two waits in a step, and the conditioning on the device once."""
    with model.cuda as cuda, mock.patch.object(run_search, "check_rewards"):  # values are random
        run_search.search(model.pipeline, PROMPTS[:1], NamedReward("reward", reward), strategy, sampling=STEPS)
    calls = len({event.mark for event in cuda.waits if event.mark})
    steps = [event for event in cuda.waits if {"predict", "move"} & {*event.functions}]
    assert len(steps) <= 2 * calls, by_place(steps)
    once = "start", "unconditional_tensors"  # the prompt's, and the negative prompt's
    sent = [event for event in cuda.copies if event.functions[-2:-1] == ("to",) and "search" in event.functions]
    assert all({*once} & {*event.functions} for event in sent), by_place(sent)


@pytest.mark.parametrize("strategy", STRATEGIES | GUIDED)
def test_no_strategy_waits_for_the_device_more_than_twice_in_a_step(strategy: str) -> None:
    look_for(shared("sd35_medium"), (STRATEGIES | GUIDED)[strategy]())


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_is_searched(name: str) -> None:
    look_for(shared(name), search.FKSteering(2, start=0.0))


@pytest.mark.slow  # up to a minute each
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["flow_grpo", "nft"])
def test_a_round_at_full_size(name: str, recipe: str) -> None:
    check(full_size(name).train(OBJECTIVES[recipe]()))


@pytest.mark.slow  # up to half a minute each
@pytest.mark.parametrize("name", MODELS)
def test_a_search_at_full_size(name: str) -> None:
    look_for(full_size(name), search.FKSteering(2, start=0.0))


def full_size(name: str) -> Model:
    """A model with all of its blocks; that of audio has no checkpointing."""
    return shared(name, None, checkpointing=name != "stable_audio_open")


@pytest.mark.fake_cuda_all  # minutes each
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ["one_block", "full_size"])
def test_every_recipe_of_every_model(size: str, name: str, recipe: str) -> None:
    if recipe == MARKS_ITS_NETWORK:
        whole = {"blocks": None, "checkpointing": name != "stable_audio_open"} if size == "full_size" else {}
        model = Model.open(name, **whole)
    else:
        model = shared(name) if size == "one_block" else full_size(name)
    check(model.train(RECIPES[recipe]()))


@pytest.mark.fake_cuda_all
@pytest.mark.parametrize("strategy", STRATEGIES | GUIDED)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ["one_block", "full_size"])
def test_every_strategy_of_every_model(size: str, name: str, strategy: str) -> None:
    look_for(shared(name) if size == "one_block" else full_size(name), (STRATEGIES | GUIDED)[strategy]())


@pytest.mark.slow  # two rounds
def test_checkpointing_takes_less_memory() -> None:
    plain, checkpointed = (
        Model.open("sd35_medium", blocks=2, checkpointing=flag).train(recipes.flow_grpo(window=1))
        for flag in (False, True)
    )
    assert checkpointed.learning_peak < 0.7 * plain.learning_peak
    assert checkpointed.sampling_peak == plain.sampling_peak


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CLIP of the widths of ViT-L/14, two blocks each, that is opened with random weights on the CPU."""
    blocks = {"num_hidden_layers": 2}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12} | blocks,
        vision_config=vision | blocks,
        projection_dim=768,
    )
    config.save_pretrained(tmp_path)
    clip_tokenizer().save_pretrained(str(tmp_path))
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)

    def opened(folder: str, dtype: torch.dtype) -> transformers.CLIPModel:
        with torch.device("cuda"), default_dtype(dtype):
            return transformers.CLIPModel(config)

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", opened)
    return str(tmp_path)


def references() -> ReferencePool:
    return ReferencePool(ImageTensor(torch.rand(3, 3, 64, 64)))


ONCE = DiscriminatorSettings(steps_per_update=1)
REWARDS: dict[str, Callable[[str], Any]] = {
    "per sample": ClipReward,
    "of pairs": lambda clip: WinRateReward(BradleyTerry(ClipReward(clip), scale=100.0)),
    "of patches": lambda clip: PerSampleFrechetReward(ClipFeatures(clip), torch.rand(8, 768)),
    "of references": lambda clip: ReferenceSimilarity(ClipFeatures(clip), references()),
    "trained tower": lambda clip: TunedClipReward(clip, references(), blocks=1, update_rule=Ratio(), learning=ONCE),
    "trained head": lambda clip: AdversarialReward(ClipFeatures(clip), references(), learning=ONCE),
}
SETS = {"vendi": VendiReward(), "frechet": FrechetReward(torch.rand(8, 768))}
GRADIENTS = {
    "noises": lambda: search.DNO(2),
    "guided": lambda: search.FKSteering(2, 1.0, start=0.0, guide=search.RewardGradient()),
}


@pytest.mark.parametrize("scope", REWARDS)
def test_rewards_of_every_scope_train(scope: str, clip: str) -> None:
    model = shared("sd35_medium")
    with model.cuda:
        reward = REWARDS[scope](clip)
    check(model.train(recipes.adv_grpo(window=1), reward=reward))


@pytest.mark.parametrize("name", SETS)
def test_rewards_of_sets_train(name: str, clip: str) -> None:
    recipe = recipes.dragon_set(SETS[name], ClipFeatures(clip), draws=1)
    check(shared("sd35_medium").train(recipe, replace(SETTINGS, prompts_per_round=2, group_size=4, batch_size=8)))


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_a_network_reach_the_noise(kind: str, clip: str) -> None:
    look_for(shared("sd35_medium"), GRADIENTS[kind](), ClipReward(clip))


DTYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16 alone": ("sd35_medium", {"autocast": None}),
    "float16": ("sd35_medium", {"weights": torch.float16, "autocast": torch.float16}),
    "float16 alone": ("sd15", {"weights": torch.float16, "autocast": None}),
    "float32": ("sd35_medium", {"weights": torch.float32, "autocast": None}),
    "float32 under bfloat16": ("stable_audio_open", {"weights": torch.float32}),
    "checkpointing": ("flux_dev", {"checkpointing": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DTYPES)
def test_dtypes_do_not_mix(case: str) -> None:
    name, options = DTYPES[case]
    model = Model.open(name, **options)
    assert {parameter.dtype for parameter in model.policy.parameters} == {torch.float32}
    check(model.train(recipes.flow_grpo(window=1)))


@pytest.mark.slow  # steps on whole networks take 12 seconds
def test_whole_networks_exchange_their_weights_without_waiting() -> None:
    model = Model.open("sd35_medium", weights=torch.float32, lora=None)
    trained = model.train(recipes.flow_grpo(window=1))
    assert by_place(trained.steps(trained.waits)) == {}
    waits = by_place(trained.learning(trained.waits))
    assert sum(waits.values()) == 1 and "synchronize" in next(iter(waits))  # when the reference is first used


@pytest.mark.slow
def test_a_round_that_waits_on_the_cpu_is_copied_once_without_waiting() -> None:
    model = Model.open("sd15", offload="all", decode_batch=2)
    settings = replace(SETTINGS, offload_rollouts=True, micro_batch=2, overlap_scoring=False)
    trained = model.train(recipes.flow_grpo(window=1), settings)
    assert trained.micro_batches == 2
    check(trained)
    assert sum(event.functions[-1] == "on_cpu" for event in trained.waits) <= 3 * trained.micro_batches


@pytest.mark.parametrize("name", ["sd35_medium", "sd15"])
def test_an_evaluation_waits_for_the_device_in_no_step(name: str) -> None:
    model = shared(name)
    with model.cuda as cuda:
        grid = model.pipeline.grid(3)
        batches = list(generate(model.pipeline, PROMPTS, [1, 2], grid, model.pipeline.guidance, 2))
    assert [batch.device.type for batch in batches] == ["cuda"]
    assert [event for event in cuda.waits if "rollout" in event.functions and event.mark] == []


SCHEDULERS: dict[str, Callable[[Any], Any]] = {  # that draw noise, since the levels of kernels would be values
    "sd35_medium": functools.partial(FlowMatchEulerDiscreteScheduler.from_config, stochastic_sampling=True),
    "sdxl": EulerAncestralDiscreteScheduler.from_config,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_diffusers_pipeline_is_steered(name: str) -> None:
    model = shared(name)
    pipe, scheduler = model.pipeline.pipe, model.pipeline.pipe.scheduler
    strategy = search.FKSteering(2, start=0.0, stop=0.2, ess=None, kernel=None)
    pipe.scheduler = SCHEDULERS[name](scheduler.config)
    pipe.scheduler.index_for_timestep = lambda *_: 0  # of the first step, which it would look up by value
    pipe.set_progress_bar_config(disable=True)
    try:
        with model.cuda as cuda, torch.autocast("cuda", torch.bfloat16), steer(pipe, sharpness, strategy) as steering:
            options = {"num_inference_steps": 4, "num_images_per_prompt": 2, "height": 128, "width": 128}
            pipe("red circle", output_type="pt", **options)
    finally:
        pipe.scheduler = scheduler
    assert steering.scores is not None and steering.scores.shape == (2, 1)
    waits = [event for event in cuda.waits if "_on_step" in event.functions]
    assert {event.functions[-1] for event in waits} == {"decode_and_score", "_score_part"}
    assert len(waits) == 2 * 3  # the samples and the scores of the two steps that select, and of the last


def test_waits_and_copies_are_counted() -> None:
    with FakeCuda() as cuda:
        x = torch.ones(4, 3, device="cuda")
        waits: list[Any] = [
            lambda: x[0, 0].item(),
            lambda: bool(x[0, 0]),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x[:, 0] > 0],
            lambda: x[torch.tensor([0, 1])],
            lambda: torch.ones(2).to("cuda"),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.cuda.synchronize(),
        ]
        for number, wait in enumerate(waits, 1):
            wait()
            assert len(cuda.waits) == number, cuda.waits[number - 1 :]
        assert [event.size for event in cuda.copies] == [16, 8, 4]
        torch.ones(2).to("cuda", non_blocking=True)
        assert len(cuda.waits) == len(waits) and len(cuda.copies) == 4
        NamedReward("mean", lambda samples, prompts: samples.mean(1))(x, [Prompt("")] * 4)
        score([NamedReward("mean", lambda samples, prompts: samples.mean(1))], x, [Prompt("")] * 4)
        assert str(cuda.waits[-1]).startswith("copy to the CPU at genalign/scoring/score.py:")
        assert x.isfinite().long().cpu().sum() == x.numel() and not x.isnan().any().cpu()


def test_devices_and_dtypes_do_not_mix() -> None:
    with FakeCuda():
        x = torch.ones(2, 2, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2, 2)
        with pytest.raises(RuntimeError, match="several dtypes"):
            x @ x.half()
        assert (x + torch.tensor(1.0)).device == torch.device("cuda", 0)  # one number is an argument of the kernel


def test_memory_is_that_of_live_tensors() -> None:
    with FakeCuda() as cuda:
        x = torch.empty(1000, 256, device="cuda")
        part = x[:10]
        assert cuda.live == cuda.peak == torch.cuda.memory_allocated() == 1000 * 256 * 4
        del x
        assert cuda.live == 1000 * 256 * 4
        del part
        assert cuda.live == 0 and torch.cuda.max_memory_allocated() == 1000 * 256 * 4


def test_a_result_that_is_made_again_is_like_the_first() -> None:
    with FakeCuda() as cuda:
        for _ in range(2):
            x = torch.ones(4, 6, device="cuda")
            part = x.t()[1:3]
            assert (part.shape, part.stride(), part.storage_offset()) == ((2, 4), (1, 6), 1)
            assert part.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert cuda.live == 512
            assert x.add_(1) is x
            assert [half.shape for half in x.split(2)] == [(2, 6)] * 2
            assert x.sum() and (x.double() + 1).dtype == torch.float64
            assert x.unsqueeze_(0).shape == x.shape == (1, 4, 6)
            assert torch.complex(x, x).conj().is_conj()
            del x, part
        assert cuda.live == 0


def test_a_network_on_the_cpu_is_moved_with_its_optimizer() -> None:
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    with FakeCuda():
        network.to("cuda")
        network(torch.ones(1, 2, device="cuda")).sum().backward()
        optimizer.step()
        (weight, *_) = optimizer.param_groups[0]["params"]
        assert weight is network.weight and weight.device.type == weight.grad.device.type == "cuda"


def test_gradients_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3, requires_grad=True)

    def loss() -> Tensor:
        hidden = network(x)
        return (hidden * hidden[:1]).exp().mean() + network[0](x).square().sum()

    wanted = [x, *network.parameters()]
    expected = torch.autograd.grad(loss(), wanted)
    root = loss()
    for ours, theirs in zip(_Backward(False, False, wanted).run([root], [None]), expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs)
    root = loss()
    _Backward(False, False, (), True, True).run([root], [None])
    torch.testing.assert_close(network[0].weight.grad, expected[1])


def test_everything_is_restored() -> None:
    names = ("is_available", "device_count", "set_device", "synchronize", "memory_allocated")
    before = [getattr(torch.cuda, name) for name in names]
    others = nn.Module._apply, torch.autograd._engine_run_backward, nn.functional.scaled_dot_product_attention
    with pytest.raises(KeyError), FakeCuda():
        raise KeyError
    assert [getattr(torch.cuda, name) for name in names] == before
    assert others == (nn.Module._apply, torch.autograd._engine_run_backward, nn.functional.scaled_dot_product_attention)
    assert not torch.cuda.is_available() and not torch._C._only_lift_cpu_tensors()
    weight = torch.ones(3, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0] * 3


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The CUDA device of each thread, 0 where none was set, of a machine with several; streams do nothing."""
    current: dict[int, int] = {}
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.get(threading.get_ident(), 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.update({threading.get_ident(): index}))
    return current


def test_the_scoring_thread_is_on_its_makers_device(devices: dict[int, int]) -> None:
    torch.cuda.set_device(3)

    def calls() -> Iterator[Any]:
        for _ in range(2):
            yield lambda: (threading.get_ident(), torch.cuda.current_device())

    seen = list(in_thread(calls()))
    assert [device for _, device in seen] == [3, 3]
    assert threading.get_ident() not in {thread for thread, _ in seen}


def test_a_reward_with_a_timeout_is_on_its_makers_device(devices: dict[int, int]) -> None:
    torch.cuda.set_device(2)

    def device(samples: Tensor, prompts: object) -> Tensor:
        time.sleep(0)
        return torch.full((len(samples),), float(torch.cuda.current_device()))

    scores = score([NamedReward("device", device, timeout=10.0)], torch.zeros(2, 3), [Prompt("")] * 2)
    assert scores[:, 0].tolist() == [2.0, 2.0]


def test_a_device_has_an_index(devices: dict[int, int]) -> None:
    torch.cuda.set_device(5)
    assert own_device("cuda", {}) == own_device("cuda", {"LOCAL_RANK": "5"}) == torch.device("cuda", 5)
    assert own_device("cuda:1", {}) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="one GPU: set model"):
        own_device("cuda:1", {"LOCAL_RANK": "1"})
