"""Fine-tune a text-to-image model on a reward of your own, and save a LoRA that diffusers opens.

python scripts/examples/train_own_reward.py                          embedded model, about a minute on two cores
python scripts/examples/train_own_reward.py --model CHECKPOINT       any diffusers folder or Hub id
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import genalign
import pipelines

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="shapes-sd3", help="embedded model, diffusers folder or Hub id")
parser.add_argument("--rounds", type=int, default=8)
parser.add_argument("--prompts", type=int, default=6, help="prompts per round, at most 6")
parser.add_argument("--output", type=Path, default=Path("runs/example-own-reward"))
options = parser.parse_args()


# 1. A reward: any function of images (B, 3, H, W) in [0, 1] and their prompts. Higher is better.
def redness(images: Tensor, prompts: Sequence[genalign.Prompt]) -> Tensor:
    """Mean of red minus the mean of the other channels, (B,)."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


# 2. Prompts: a list, or a PromptSet from a file or a world.
shapes = ("circle", "square", "triangle", "cross", "ring", "moon")
prompts = [f"a {shape}" for shape in shapes[: options.prompts]]

# 3. The model, and what is trained of it: a LoRA of rank 16.
pipeline = pipelines.load(options.model)
policy = genalign.Policy(pipeline.denoiser, genalign.Lora(rank=16, alpha=32))

# 4. The method, and the geometry of a round: 6 prompts x 8 samples.
trainer = genalign.Trainer(
    pipeline,
    policy,
    redness,
    prompts,
    genalign.flow_grpo(genalign.FlowSDE(noise_level=0.9), window=2, window_reach=0.25, clip_range=1e-3),
    genalign.TrainerSettings(
        rounds=options.rounds,
        prompts_per_round=len(prompts),
        group_size=8,
        batch_size=8 * len(prompts),
        updates_per_round=1,
        learning_rate=3e-3,
    ),
    genalign.Sampling(num_steps=8),
)
for result in trainer.rounds():
    print(f"round {result.round + 1}  reward {result.reward:+.4f}  KL {result.kl:.2e}  NFE {result.nfe}")

# 5. Save the averaged weights as a LoRA: pipe.load_lora_weights(OUTPUT).
assert policy.config is not None
with policy.averaged():
    pipeline.save_lora(options.output, policy.adapter_state(), policy.config)
print(f"LoRA saved to {options.output}")
