"""Sampling and decoding in smaller parts where memory runs out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from genalign.algorithms import recipes
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.sampling import Sampling
from genalign.training.out_of_memory import PartSizes
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from pipelines import SD3
from tests.genalign.training.toy_runs import redness

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
HALVING = TrainerSettings(
    rounds=1, prompts_per_round=2, group_size=4, batch_size=4, updates_per_round=1, on_out_of_memory="halve"
)


def build(tiny: SD3, settings: TrainerSettings = HALVING) -> Trainer:
    pipeline = copy.deepcopy(tiny)
    policy, recipe = Policy(pipeline.denoiser, Lora(rank=2)), recipes.flow_grpo(window=1)
    return Trainer(pipeline, policy, redness, ["a circle", "a square"], recipe, settings, Sampling(2, (1.0, 0.5)))


def limited(trainer: Trainer, name: str, most: int) -> list[int]:
    """Make the pipeline's ``name`` raise for more than ``most`` samples; return the list of sizes that were tried."""
    sizes, original = list[int](), getattr(trainer.pipeline, name)

    def call(latents: Tensor, *others: object) -> Tensor:
        sizes.append(len(latents))
        if len(latents) > most:
            raise FULL
        result: Tensor = original(latents, *others)
        return result

    setattr(trainer.pipeline, name, call)
    return sizes


def samples(trainer: Trainer) -> Tensor:
    prompts = next(iter(trainer.prompts.rounds()))
    return torch.cat([batch.rollout.final for batch in trainer.sample(0, prompts)])


@pytest.mark.parametrize(("name", "phase"), [("predict", "sampling"), ("decode", "decoding")])
def test_a_batch_that_does_not_fit_is_computed_in_parts(
    tiny: SD3, caplog: pytest.LogCaptureFixture, name: str, phase: str
) -> None:
    trainer, whole = build(tiny), samples(build(tiny))
    sizes = limited(trainer, name, 1)
    assert torch.allclose(samples(trainer), whole, atol=1e-4)
    assert [size for size in sizes if size > 1] == [4, 2]  # no later batch tries more
    assert f"Out of memory in {phase} 2 samples at once: continuing with 1" in caplog.text
    assert trainer.state().numbers["parts"][phase] == 1
    again = build(tiny)
    again.restore(trainer.state())
    assert vars(again.learner.parts) == vars(trainer.learner.parts)


def test_a_round_in_parts_is_trained(tiny: SD3) -> None:
    trainer = build(tiny)
    limited(trainer, "decode", 2)
    (result,), (whole,) = list(trainer.rounds()), list(build(tiny).rounds())
    assert result.reward == pytest.approx(whole.reward, abs=1e-4) and result.skipped_updates == 0


@pytest.mark.parametrize(("setting", "most"), [("stop", 2), ("halve", 0)])
def test_the_run_stops_if_nothing_smaller_is_allowed_or_fits(tiny: SD3, setting: Any, most: int) -> None:
    trainer = build(tiny, replace(HALVING, on_out_of_memory=setting))
    limited(trainer, "predict", most)
    with pytest.raises(torch.OutOfMemoryError):
        list(trainer.rounds())


def test_ranks_take_the_smallest_sizes() -> None:
    sizes = PartSizes(True, sampling=8)
    sizes.agree([sizes, PartSizes(True, sampling=4), PartSizes(True, decoding=2)])
    assert sizes == PartSizes(True, 4, 2)
    calls: list[slice] = []

    def compute(rows: slice) -> None:
        if rows.stop - rows.start > 1 and rows.start == 4:
            raise FULL
        calls.append(rows)

    sizes.map("sampling", 6, compute)
    assert calls == [slice(0, 4), slice(4, 5), slice(5, 6)]  # what fitted is not repeated
    assert sizes.sampling == 1
