"""The ledger against an instrumented model's true calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipe import Recipe
from genalign.algorithms.recipes import dense_grpo, dragon, flow_grpo, nft, prdp
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.scoring.budget import Ledger, Metered, metered_reward
from genalign.scoring.score import NamedReward
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt, PromptSet
from pipelines import SD3

PROMPTS = PromptSet("two", (Prompt("a circle"), Prompt("two squares")))
SETTINGS = TrainerSettings(rounds=2, prompts_per_round=2, group_size=4, batch_size=4, updates_per_round=2)
RECIPES: dict[str, Recipe] = {recipe.__name__: recipe(window=2) for recipe in (flow_grpo, dense_grpo, prdp)}
RECIPES |= {"dragon": dragon(), "nft": nft()}


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_training_bills_every_call_of_the_model(tiny: SD3, recipe: Recipe, guidance: float) -> None:
    true: Counter[str] = Counter()

    def count_network(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        true["nfe"] += len(output[0])
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: true.update({"nfe backward": len(gradient)}))

    def count_decodes(latents: Tensor, **options: Any) -> Any:
        true["decode"] += len(latents)
        return decode(latents, **options)

    def reward(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        true["reward/red"] += len(samples)
        return redness(samples, prompts)

    tiny.denoiser.register_forward_hook(count_network)
    decode, tiny.pipe.vae.decode = tiny.pipe.vae.decode, count_decodes
    policy = Policy(tiny.denoiser, Lora(rank=2, alpha=4))
    sampling = Sampling(num_steps=4, sigmas=(1.0, 0.75, 0.5, 0.25), guidance=guidance)
    trainer = Trainer(tiny, policy, [NamedReward("red", reward)], PROMPTS, recipe, SETTINGS, sampling)
    (*_, last) = trainer.rounds()
    assert last.calls == true and last.nfe == true["nfe"]


def test_gradients_of_decodes_and_rewards_are_counted(tiny: SD3) -> None:
    metered = Metered(tiny, Ledger())
    reward = metered_reward("red", redness, metered.ledger)
    latents = torch.randn(2, 4, 16, 16, requires_grad=True)
    reward(metered.decode(latents), PROMPTS.prompts).sum().backward()
    assert metered.ledger.counts == {"decode": 2, "decode backward": 2, "reward/red": 2, "reward/red backward": 2}


def test_cost_by_prices() -> None:
    ledger = Ledger(Counter({"nfe": 10, "decode": 2, "reward/red": 0}))
    assert ledger.cost({"nfe": 0.5, "decode": 2.0}) == 9.0
    with pytest.raises(ValueError, match="no price for decode: measure it with: genalign prices"):
        ledger.cost({"nfe": 1.0})
    with pytest.raises(ValueError, match=r"no price for nfe backward: .* genalign prices --gradients true"):
        Ledger(Counter({"nfe backward": 1})).cost({"nfe": 1.0})
    earlier = ledger.copy()
    ledger.record("nfe", 3)
    assert ledger.since(earlier).nfe == 3 and earlier.nfe == 10


def test_failed_reward_is_counted() -> None:
    ledger = Ledger()

    def broken(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise RuntimeError("no server")

    with pytest.raises(RuntimeError):
        metered_reward("remote", broken, ledger)(torch.zeros(3, 3, 8, 8), PROMPTS.prompts)
    assert ledger.counts["reward/remote"] == 3
