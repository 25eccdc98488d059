"""The gradient of a reward through the sampler equals full back-propagation, on a tiny checkpoint of every family."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import pipelines
from genalign.algorithms.interfaces import MetricSums, TermScales, UpdateBatch, UpdateContext
from genalign.algorithms.pathwise import PathwiseObjective, Tail
from genalign.algorithms.tails import Chain, OneStepEstimate, SparseSteps
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import RolloutInputs, rollout
from genalign.diffusion.transitions import ODE, transition
from genalign.scoring.score import NamedReward
from genalign.types import Prompt
from pipelines.base import DiffusersPipeline
from tests.pipelines.tiny_checkpoints import FAMILIES, FolderOf

pytestmark = [
    pytest.mark.slow,
    # torch's older weight_norm, which diffusers' AutoencoderOobleck uses
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
PROMPTS = ["a red circle", "two big blue squares"]
STEPS, ESTIMATED = 3, 1
TAILS = [Chain(), SparseSteps(active=STEPS, rescale=0.0), OneStepEstimate()]


def mean_square_of_differences(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Of neighboring values: it depends on all of a sample."""
    return samples.diff(dim=-1).square().flatten(1).mean(1)


def _by_hand(pipeline: DiffusersPipeline, policy: Policy, inputs: RolloutInputs, tail: Tail) -> list[Tensor]:
    """Back-propagate the mean reward through all moves, or all calls of the network, at once."""
    grid, x = pipeline.grid(STEPS), pipeline.initial_noise(inputs.noise_seeds)
    guidance, conditioning = pipeline.guidance_scale(None), inputs.conditioning[inputs.prompt]
    for index in range(STEPS):
        seen = x if isinstance(tail, Chain) else x.detach()
        prediction = pipeline.predict(seen, grid[index], conditioning, guidance)
        if isinstance(tail, OneStepEstimate) and index == ESTIMATED:
            x = pipeline.path.x0(seen, prediction, grid[index])
            break
        x = transition(pipeline.path, ODE(), x, prediction, grid[index]).mean
    loss = -mean_square_of_differences(pipeline.decode(x), [Prompt(text) for text in PROMPTS]).mean()
    # the last block of some families leaves the text tokens unused
    return list(torch.autograd.grad(loss, policy.parameters, materialize_grads=True))


@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: type(tail).__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_full_back_propagation(family: str, tail: Tail, folder_of: FolderOf) -> None:
    pipeline = pipelines.load(folder_of(family), **FAMILIES[family].options)
    policy = Policy(pipeline.denoiser, Lora(rank=2))
    for parameter in policy.parameters:  # B starts at zero, where A has no gradient
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    conditioning, grid = pipeline.encode(PROMPTS), pipeline.grid(STEPS)
    inputs = RolloutInputs(conditioning, torch.tensor([0, 1]), (1, 2), (3, 4))
    guidance = pipeline.guidance_scale(None)
    steps = [ESTIMATED] if isinstance(tail, OneStepEstimate) else range(STEPS)
    sampled = rollout(pipeline, inputs, grid, [ODE()] * STEPS, guidance, steps)
    prompts, rewards = [Prompt(text) for text in PROMPTS], [NamedReward("r", mean_square_of_differences)]
    context = UpdateContext(pipeline, policy, grid, ODE(), guidance, None, MetricSums(), prompts, rewards)
    batch = UpdateBatch(sampled, torch.ones(2), inputs.prompt, on_policy=True)
    objective = PathwiseObjective(tail)
    objective.backward(context, batch, TermScales.of_means(objective.terms(batch)), 0)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.parameters]
    ours = torch.cat([gradient.flatten() for gradient in gradients])
    theirs = torch.cat([gradient.flatten() for gradient in _by_hand(pipeline, policy, inputs, tail)])
    assert float(theirs.norm()) > 0
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
