"""The FLOPs of an image: published ratios, torch's formulas for attention and adapters, and a whole round on shapes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from genalign import assets
from genalign.algorithms.interfaces import MetricSums, TermScales, UpdateBatch, UpdateContext
from genalign.cli.train_settings import Train
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import kernel_per_step, rollout
from genalign.training.trainer import Trainer
from scripts.benchmarks import flops
from tests.packages import ROOT


def test_the_published_ratios_are_within_their_limits() -> None:
    rows = json.loads((ROOT / "docs/results/flops.json").read_text())["rows"]
    ratios = {row["name"]: row["mean"] for row in rows if row["name"].endswith(".ratio")}
    assert ratios["sd35_medium_flow_grpo_geneval.ratio"] <= 0.95
    assert ratios[f"{flops.ONE_GPU}.ratio"] <= 0.25


def test_attention_and_an_adapter_are_counted_forward_and_backward() -> None:
    tokens, width, rank = 10, 64, 4
    with torch.device("meta"):
        base, down, up = nn.Linear(width, width), nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        x = torch.zeros(1, tokens, width)
    base.requires_grad_(False)
    counts = Counter[str]()
    with flops.counted(counts, "forward"):
        hidden = (base(x) + up(down(x))).view(1, tokens, 2, 32).transpose(1, 2)
        output = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
    with flops.counted(counts, "backward"):
        torch.autograd.backward(output.sum())
    product, adapter = 2 * tokens * width**2, 2 * tokens * width * rank
    attention = 2 * 2 * tokens * tokens * width
    assert counts["forward"] == product + 2 * adapter + attention
    # fused kernels run the scores again; the adapter has two weights with a gradient and one matrix before another
    assert counts["backward"] == 3 * adapter + attention * 5 / 2


def test_the_calls_of_a_configuration_are_those_of_its_settings() -> None:
    settings = flops.training_settings(ROOT / flops.GENEVAL)
    settings = replace(settings, training=replace(settings.training, rounds=1, prompts_per_round=2))  # all are equal
    calls = flops.our_calls(settings, flops.model_on_meta(settings, blocks=1))
    assert (calls.forward, calls.backward) == (2 * (10 + 2 * 8), 2 * 8)  # with guidance; sampled, replayed, reference
    assert flops.published_calls() == flops.Calls(2 * (10 + 2 * 9), 2 * 9)


def _round(settings: Train, blocks: int) -> float:
    """The FLOPs of an image in a small round that the trainer's own code runs on the meta device."""
    pipeline = flops.model_on_meta(settings, blocks)
    policy = Policy(pipeline.denoiser, None, has_adapter=True)
    training = replace(settings.training, prompts_per_round=2, updates_per_round=1)
    trainer = Trainer(pipeline, policy, len, ["a", "b"], settings.recipe, training, settings.sampling)
    steps = settings.recipe.steps(pipeline.path, trainer.grid, 0, training.seed)
    kernels = kernel_per_step(trainer.kernel, steps, len(trainer.grid))
    arguments = trainer.pipeline, policy, trainer.grid, trainer.kernel, trainer.guidance, None, MetricSums()
    context, counts = UpdateContext(*arguments), Counter[str]()
    inputs = trainer.sampler.inputs(settings.recipe, next(trainer.prompts.rounds()), "flops")
    with flops.counted(counts, "round"):
        for batch in inputs.split(list(trainer.learner.batch_sizes)):
            sampled = rollout(trainer.pipeline, batch, trainer.grid, kernels, trainer.guidance, store=steps)
            update = UpdateBatch(sampled, torch.ones(len(batch)), batch.prompt, on_policy=True)
            for part in update.split(trainer.learner.micro_batch):
                settings.recipe.objective.backward(context, part, TermScales(1.0, 1.0), 0)
    return counts["round"] / sum(trainer.learner.batch_sizes)


@pytest.mark.slow  # some 60 calls of a network at its published width
@pytest.mark.parametrize("name", ["geneval", "one_gpu"])
def test_a_round_on_the_meta_device_takes_as_many(name: str) -> None:
    """Up to the reference, which runs without the adapter, and the KL that is measured once in a round."""
    file = ROOT / flops.GENEVAL if name == "geneval" else assets.preset(flops.ONE_GPU)
    settings = flops.training_settings(file)
    assert _round(settings, 1) == pytest.approx(flops.our_flops(settings, 1), rel=0.06)
