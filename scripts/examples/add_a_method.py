"""A training method of your own: Flow-GRPO with credit by rank, trained beside Flow-GRPO itself.

    python scripts/examples/add_a_method.py                              embedded model, under two minutes on two cores

See docs/methods/add_a_method.md for where each kind of new part goes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import genalign
import pipelines
from genalign.algorithms.interfaces import RoundScores
from genalign.worlds import shapes
from rewards.shapes import ShapesReward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=6)
parser.add_argument("--prompts", type=int, default=12, help="prompts per round")
options = parser.parse_args()


# 1. The new part: from the scores of a round to credit.
def rank_credit(scores: RoundScores) -> torch.Tensor:
    """Credit (B,) from -1 for the worst sample of a group to 1 for the best."""
    rewards = scores.combined
    same_group = scores.group[:, None] == scores.group[None, :]
    worse = (same_group & (rewards[None, :] < rewards[:, None])).sum(1)
    return 2 * worse / (same_group.sum(1) - 1) - 1


# 2. The method: existing parts, and the new one in its place.
def rank_grpo(window: int = 2) -> genalign.Recipe:
    """Flow-GRPO with credit by rank."""
    base = genalign.flow_grpo(genalign.FlowSDE(0.9), window=window, window_reach=0.25, clip_range=1e-3)
    return replace(base, credit=rank_credit)


# 3. Train it and its base from the same weights, prompts and noise.
settings = genalign.TrainerSettings(
    rounds=options.rounds,
    prompts_per_round=options.prompts,
    group_size=8,
    batch_size=8 * options.prompts,
    updates_per_round=1,
    learning_rate=2e-3,
)
methods = {
    "flow_grpo": genalign.flow_grpo(genalign.FlowSDE(0.9), window=2, window_reach=0.25, clip_range=1e-3),
    "rank_grpo": rank_grpo(),
}
for name, recipe in methods.items():
    pipeline = pipelines.load("shapes-sd3")
    policy = genalign.Policy(pipeline.denoiser, genalign.Lora(rank=16, alpha=32))
    reward = {"partial": ShapesReward("partial")}
    sampling = genalign.Sampling(num_steps=8)
    trainer = genalign.Trainer(pipeline, policy, reward, shapes.prompts("train"), recipe, settings, sampling)
    rewards = [result.reward for result in trainer.rounds()]
    print(f"{name}: reward by round " + " ".join(f"{value:.3f}" for value in rewards))
