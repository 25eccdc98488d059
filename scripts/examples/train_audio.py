"""Fine-tune a text-to-audio model: the embedded Stable Audio model learns to play what its prompts say.

    python scripts/examples/train_audio.py                               about two minutes on two cores
    python scripts/examples/train_audio.py --rounds 1 --prompts 2 --samples 2

The reward is the tones world's verifier. For Stable Audio Open, name its folder or Hub id, your prompts, and a reward
such as rewards.clap.ClapReward with the model's sample_rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import genalign
import pipelines
from genalign.diffusion.rollout import generate
from genalign.runtime.media import AudioMedium
from genalign.worlds import tones
from rewards.tones import TonesReward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=4)
parser.add_argument("--prompts", type=int, default=8, help="prompts per round")
parser.add_argument("--samples", type=int, default=8, help="samples per prompt")
parser.add_argument("--output", type=Path, default=Path("runs/example-audio"))
options = parser.parse_args()

# 1. An audio pipeline has a sample rate; everything else is as for images.
pipeline = pipelines.load("tones-audio", autocast=torch.bfloat16)
policy = genalign.Policy(pipeline.denoiser, genalign.Lora(rank=16, alpha=32))

# 2. DiffusionNFT learns from final samples of the deterministic sampler, so that any noise schedule will do.
sampling = genalign.Sampling(num_steps=8, sigmas=[30.0, 7.0, 3.0, 1.67, 1.0, 0.6, 0.33, 0.14])
trainer = genalign.Trainer(
    pipeline,
    policy,
    {"partial": TonesReward("partial")},
    tones.prompts("train"),
    genalign.nft(),
    genalign.TrainerSettings(
        rounds=options.rounds,
        prompts_per_round=options.prompts,
        group_size=options.samples,
        batch_size=options.prompts * options.samples,
        updates_per_round=1,
        learning_rate=2e-3,
    ),
    sampling,
)
for result in trainer.rounds():
    print(f"round {result.round + 1}  reward {result.reward:.4f}  NFE {result.nfe}")

# 3. Listen: one clip of a prompt with a composition that training never had, by the averaged weights.
text = tones.prompts("comp").prompts[0].text
with policy.averaged():
    (clips,) = generate(pipeline, [text], [0], sampling.grid(pipeline), guidance=1.0, batch_size=1)
options.output.mkdir(parents=True, exist_ok=True)
(options.output / "clip.wav").write_bytes(AudioMedium(tones.SAMPLE_RATE).encode(clips[0]))
print(f"{text}: {options.output / 'clip.wav'}")
