"""The kernel of plain sampling: generation, unscheduled training steps, evaluations and searches use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genalign.algorithms.recipes import flow_grpo
from genalign.diffusion.policy import Lora, Policy
from genalign.diffusion.rollout import generate, step_noise
from genalign.diffusion.sampling import Sampling
from genalign.diffusion.transitions import CPS, DDIM, ODE, FlowSDE, Kernel
from genalign.evaluation.evaluate import SampleSpec
from genalign.evaluation.python_api import evaluate
from genalign.evaluation.sources import PipelineSource
from genalign.search import BestOfN, ReNO
from genalign.search.run_search import search
from genalign.training.settings import TrainerSettings
from genalign.training.trainer import Trainer
from genalign.types import Prompt
from pipelines import SD3

SIGMAS = (1.0, 0.6, 0.3)
STOCHASTIC = Sampling(3, SIGMAS, kernel=CPS(1.0))
PROMPTS, SEEDS = ["a circle", "two squares"], [5, 6]


def redness(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return samples[:, 0].flatten(1).mean(1)


@torch.no_grad()
def renoised(tiny: SD3) -> Tensor:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1): each clean estimate is noised again."""
    grid, x, conditioning = STOCHASTIC.grid(tiny), tiny.initial_noise(SEEDS), tiny.encode(PROMPTS)
    for index in range(len(grid)):
        x0 = tiny.path.x0(x, tiny.predict(x, grid[index], conditioning, 1.0), grid[index])
        sigma = float(grid.sigma[index + 1])
        x = (1 - sigma) * x0 + sigma * step_noise(SEEDS, index, x0)
    return tiny.decode(x)


def test_the_consistency_sampler_is_a_kernel(small: SD3) -> None:
    grid = STOCHASTIC.grid(small)
    samples = torch.cat(list(generate(small, PROMPTS, SEEDS, grid, 1.0, 1, STOCHASTIC.kernel_on(grid))))
    torch.testing.assert_close(samples, renoised(small), rtol=0, atol=1e-5)
    plain = torch.cat(list(generate(small, PROMPTS, SEEDS, grid, 1.0, 2)))
    assert (samples - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("kernel", "expected"), [(None, ODE()), (DDIM(0.5), DDIM(0.5))])
def test_without_a_kernel_sampling_is_the_ode(small: SD3, kernel: Kernel | None, expected: Kernel) -> None:
    assert Sampling(3, SIGMAS, kernel=kernel).kernel_on(small.grid(3, SIGMAS)) == expected


def test_a_kernel_that_ends_in_noise_is_refused(small: SD3) -> None:
    with pytest.raises(ValueError, match="ends in noise, which stays in the samples: choose ODE, CPS, DDIM or DPMSDE"):
        Sampling(3, SIGMAS, kernel=FlowSDE(0.7)).kernel_on(small.grid(3, SIGMAS))


def test_steps_that_are_not_trained_follow_the_sampling_kernel(small: SD3) -> None:
    """In a group that shares its first noise, samples part at the first step with CPS, else at the trained one."""
    settings = TrainerSettings(rounds=1, prompts_per_round=1, group_size=2, batch_size=2, updates_per_round=1)
    recipe = replace(flow_grpo(CPS(0.8), window=1), schedule=lambda *_: (1,))
    policy = Policy(small.denoiser, Lora(rank=2))
    for sampling, same in ((STOCHASTIC, False), (replace(STOCHASTIC, kernel=None), True)):
        trainer = Trainer(small, policy, redness, "a circle", recipe, settings, sampling)
        (batch,) = trainer.sample(0, [Prompt("a circle")])
        first, second = batch.rollout.states[:, 0]
        assert torch.equal(first, second) == same
        assert trainer.learner.elsewhere == sampling.kernel_on(trainer.grid)


def test_an_evaluation_names_its_kernel(small: SD3) -> None:
    prompts = [Prompt(text) for text in PROMPTS]
    stochastic = evaluate(small, prompts, redness, STOCHASTIC, seeds=2, batch_size=2)
    plain = evaluate(small, prompts, redness, replace(STOCHASTIC, kernel=None), seeds=2, batch_size=2)
    assert (stochastic.protocol.kernel, plain.protocol.kernel) == ("CPS(eta=1.0)", "ODE()")
    assert stochastic.protocol.hash != plain.protocol.hash
    scores = [[record.scores["reward"] for record in one.records] for one in (stochastic, plain)]
    assert scores[0] != scores[1]
    one_by_one = evaluate(small, prompts, redness, STOCHASTIC, seeds=2, batch_size=1)
    assert [record.scores["reward"] for record in one_by_one.records] == pytest.approx(scores[0], abs=1e-5)
    with pytest.raises(ValueError, match=r"names the kernel ODE\(\), not CPS"):
        PipelineSource(small, [SampleSpec(prompts[0], 0)], plain.protocol, CPS(1.0))


def test_a_search_moves_by_the_sampling_kernel(small: SD3) -> None:
    result = search(small, "a circle", redness, BestOfN(2), sampling=STOCHASTIC)
    ode = search(small, "a circle", redness, BestOfN(2, ODE()), sampling=STOCHASTIC)
    (plain,), (of_ode,) = result.per_prompt, ode.per_prompt
    assert not plain.plain.extra  # the first candidate is the plain sample
    assert of_ode.plain.extra  # and is not one where the strategy has a kernel of its own
    torch.testing.assert_close(plain.plain.sample, of_ode.plain.sample, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"ReNO moves by ODE\(\), and not by sampling.kernel CPS"):
        search(small, "a circle", redness, ReNO(2), sampling=STOCHASTIC)
