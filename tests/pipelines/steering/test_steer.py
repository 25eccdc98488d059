"""Steering unmodified pipelines of several families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.diffusion.transitions import DDIM, ODE
from genalign.scoring.score import NamedReward
from genalign.search import BestOfN, FKSteering, Prune, ReNO, RewardGradient, Selection, Stepwise
from genalign.search.ranking import best_per_prompt
from genalign.search.stepwise import StepwiseStrategy
from genalign.types import Prompt
from pipelines import SD3, prune, steer
from pipelines.steering.latent_scores import decode_latents
from tests.pipelines.tiny_pipelines import STEPS, Family, flux, sd3, sd15, sdxl, stable_audio

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers makes tensors of numpy arrays
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]
PARTICLES = 4
FK = FKSteering(PARTICLES, lam=1e5, start=0.0, stop=0.5, every=0.25, ess=None)


def loudness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples.flatten(1).mean(1)


EDM = EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0)
FAMILIES: dict[str, Callable[[], Family]] = {
    "sd15 DDIM": sd15,
    "sd15 Euler": lambda: sd15().on(EulerDiscreteScheduler),
    "sd15 DPM++2M": lambda: sd15().on(DPMSolverMultistepScheduler),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "stable_audio": lambda: stable_audio(scheduler=EDM),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_particles_of_a_diffusers_pipeline_are_resampled(name: str) -> None:
    family = FAMILIES[name]()
    with steer(family.pipe, loudness, FK, prompts=["noise"]) as steering:
        steered = family.run(range(PARTICLES))
    assert "step" not in vars(family.pipe.scheduler)
    assert steering.scores is not None and steering.scores.shape == (PARTICLES, 1)
    assert steering.ledger.nfe == STEPS * PARTICLES * family.nfe
    assert steering.ledger.counts["decode"] == PARTICLES * len(FK.scoring_steps(STEPS))
    samples = decode_latents(family.pipe, steered, (8, 8))
    torch.testing.assert_close(loudness(samples, []), steering.scores[:, 0], rtol=0, atol=1e-5)
    assert int(steering.scores[:, 0].argmax()) == 0  # the sample that is chosen comes first
    copies = [node for node in steering.lineage.nodes if node.parent is not None]
    assert copies and len({node.parent for node in copies}) < len(copies)


def test_best_of_n_changes_only_the_order() -> None:
    family, rows = sd15(), range(PARTICLES)
    plain = family.run(rows)
    with steer(family.pipe, loudness, BestOfN(), prompts=["noise"]) as steering:
        steered = family.run(rows)
    assert sorted(map(bytes, plain.numpy())) == sorted(map(bytes, steered.numpy()))
    assert steering.scores is not None and int(steering.scores[:, 0].argmax()) == 0
    assert torch.equal(family.run(rows), plain)


def test_prompts_never_exchange_particles_under_the_schedulers_own_moves() -> None:
    family, strategy = sd15().on(EulerAncestralDiscreteScheduler), replace(FK, particles=2, kernel=None)
    with steer(family.pipe, loudness, strategy, prompts=["noise", "silence"]) as steering:
        family.run(range(4))
    nodes = steering.lineage.nodes
    parents = [(node, nodes[node.parent]) for node in nodes if node.parent is not None]
    assert parents and all(node.prompt == parent.prompt for node, parent in parents)


def test_pipeline_called_by_text_is_steered(tiny_folder: object) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(str(tiny_folder))
    pipe.set_progress_bar_config(disable=True)
    texts: set[str] = set()

    def reward(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts.update(prompt.text for prompt in prompts)
        return loudness(samples, prompts)

    with steer(pipe, reward, FK) as steering:
        generator = torch.Generator().manual_seed(0)
        images = pipe("a circle", num_images_per_prompt=PARTICLES, num_inference_steps=4, generator=generator).images
    assert len(images) == PARTICLES and texts == {"a circle"} and steering.scores is not None
    assert SD3.load(str(tiny_folder)).pipe.scheduler.step  # the class is untouched


class KeepBest(Selection):
    """Fills a prompt's places with copies of the particle whose preview scores best."""

    def select(self, step: int, scores: Tensor) -> Tensor:
        return best_per_prompt(scores, self.call.prompt, 1)[self.call.prompt]


class Greedy:
    """A strategy that this repository does not have."""

    selection: type[Selection] = KeepBest

    def stepwise(self) -> Stepwise:
        return Stepwise(kernel=DDIM(1.0), scoring_steps=lambda total: range(1, total - 1), selection=self.selection)


def test_custom_stepwise_strategy_steers() -> None:
    family = sd15()
    with steer(family.pipe, loudness, Greedy(), prompts=["noise", "silence"]) as steering:
        family.run(range(4))
    lineage, scores = steering.lineage, steering.scores
    assert scores is not None and scores[0] >= scores[1] and scores[2] >= scores[3]
    for done in (2, 3):
        for prompt in (0, 1):
            before = [node for node in lineage.nodes if node.prompt == prompt and node.end_step == done]
            best = max(before, key=lambda node: node.scores[-1][1])
            copies = [node for node in lineage.nodes if node.prompt == prompt and node.start_step == done]
            assert [node.parent for node in copies] == [lineage.nodes.index(best)] * 2
    assert steering.ledger.counts["decode"] == 4 * 3


def test_selection_across_prompts_is_refused() -> None:
    class Mixed(Selection):
        def select(self, step: int, scores: Tensor) -> Tensor:
            return torch.zeros(len(scores), dtype=torch.long)

    family, strategy = sd15(), Greedy()
    strategy.selection = Mixed
    with (
        pytest.raises(ValueError, match=r"Mixed\.select must return one particle of the same prompt"),
        steer(family.pipe, loudness, strategy, prompts=["noise", "silence"]),
    ):
        family.run(range(4))


@pytest.mark.parametrize(
    ("strategy", "prompts", "count", "message"),
    [
        (replace(FK, kernel=None), ["noise"], 4, "DDIMScheduler is deterministic"),
        (replace(FK, kernel=ODE()), ["noise"], 4, "moves without noise"),
        (FK, ["noise"], 3, "call the pipeline with num_images_per_prompt=4"),
        (FK, None, 4, "give steer prompts="),
        (BestOfN(4, DDIM(1.0)), ["noise"], 4, "keeps the scheduler's moves"),
        (replace(FK, guide=RewardGradient()), ["noise"], 4, "leave it out for a pipeline of your own"),
        (ReNO(), ["noise"], 4, "ReNO cannot steer a pipeline of your own"),
    ],
)
def test_impossible_steering_is_refused(
    strategy: StepwiseStrategy, prompts: list[str] | None, count: int, message: str
) -> None:
    family = sd15()
    with pytest.raises((ValueError, TypeError), match=message), steer(family.pipe, loudness, strategy, prompts=prompts):
        family.run(range(count))
    assert "step" not in vars(family.pipe.scheduler)


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_pipeline_is_pruned_in_parts(name: str) -> None:
    family = FAMILIES[name]()
    call = {**family.shared, **{key: tensor[:1] for key, tensor in family.samples.items()}}
    call |= {"num_inference_steps": STEPS}
    pruned = prune(family.pipe, "noise", loudness, Prune((0, 2), (0.5, 0.5), 8), seed=3, **call)
    (best,) = pruned.per_prompt
    assert best.samples.shape[0] == 2 and best.scores.shape == (2, 1) and pruned.scores.shape == (1, 1)
    assert best.scores[0] >= best.scores[1]
    assert pruned.ledger.nfe == family.nfe * (8 * 1 + 4 * 2 + 2 * (STEPS - 3))
    assert pruned.ledger.counts["decode"] == 8 + 4 + 2
    assert sorted(node["ended"] for node in pruned.lineage) == [1] * 4 + [3] * 2 + [STEPS] * 2
    (alone,) = pruned.winners
    plain = best.plain
    assert plain is not None and plain.ledger.nfe == family.nfe * STEPS
    assert plain.extra == (pruned.lineage[0]["ended"] < STEPS) and plain.ledger.counts["decode"] == 1
    generator = torch.Generator().manual_seed(derived_seed(3, alone))
    latents = family.pipe(**call, generator=[generator], output_type="latent", return_dict=False)[0]
    whole = decode_latents(family.pipe, latents, (8, 8))
    torch.testing.assert_close(whole[0], pruned.samples[0], rtol=0, atol=1e-4)
    generator = torch.Generator().manual_seed(derived_seed(3, 0))
    latents = family.pipe(**call, generator=[generator], output_type="latent", return_dict=False)[0]
    torch.testing.assert_close(decode_latents(family.pipe, latents, (8, 8))[0], plain.sample, rtol=0, atol=1e-4)


def test_a_reported_reward_chooses_no_sample() -> None:
    family = sd15()
    shown = NamedReward("shown", lambda samples, prompts: -loudness(samples, prompts), weight=0.0)
    rewards = [[NamedReward("loud", loudness), *others] for others in ([], [shown])]
    call = {**family.shared, **{key: tensor[:1] for key, tensor in family.samples.items()}}
    alone, both = (
        prune(family.pipe, "noise", some, Prune((0, 2), (0.5, 0.5), 6), seed=3, num_inference_steps=STEPS, **call)
        for some in rewards
    )
    assert both.winners == alone.winners and torch.equal(both.per_prompt[0].samples, alone.per_prompt[0].samples)
    orders = []
    for some in rewards:
        with steer(family.pipe, some, BestOfN(), prompts=["noise"]) as steering:
            family.run(range(PARTICLES))
        orders.append(steering.result.per_prompt[0].scores[:, 0])
    assert torch.equal(*orders) and torch.equal(orders[0], orders[0].sort(descending=True).values)


def test_pruning_needs_a_number_of_candidates() -> None:
    with pytest.raises(ValueError, match=r"no budget that could decide: give Prune\(candidates=\.\.\.\)"):
        prune(sd15().pipe, "noise", loudness, Prune((0,), (0.5,)))
