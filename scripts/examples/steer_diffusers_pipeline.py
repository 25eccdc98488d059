"""Steer a diffusers pipeline of your own, step by step.

python scripts/examples/steer_diffusers_pipeline.py                      the embedded model
python scripts/examples/steer_diffusers_pipeline.py CHECKPOINT PROMPT    any diffusers folder or Hub id, such as
                                                                         stabilityai/stable-diffusion-xl-base-1.0
python scripts/examples/steer_diffusers_pipeline.py CHECKPOINT PROMPT CLIP    with another CLIP as the reward
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline

from genalign import assets
from genalign.search import BestOfN, FKSteering, Prune
from pipelines import prune, steer
from rewards.clip import ClipReward

# 1. Any pipeline, loaded as usual.
own = len(sys.argv) > 1
checkpoint = sys.argv[1] if own else assets.resolve("shapes-sd3")
prompt = sys.argv[2] if len(sys.argv) > 2 else "a red circle and a blue square"
clip = sys.argv[3] if len(sys.argv) > 3 else "openai/clip-vit-large-patch14" if own else "shapes-clip"
pipe = DiffusionPipeline.from_pretrained(checkpoint)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
pipe.set_progress_bar_config(disable=True)

# 2. Any reward: images (B, 3, H, W) in [0, 1] and their prompts to (B,) scores. Here the
#    cosine of image and prompt by a CLIP.
reward = ClipReward(clip)
call = {"num_inference_steps": 20, "guidance_scale": 5.0 if own else 1.0}

# 3. The baseline: eight samples, the best first. A result prints its rewards, the gain over plain
#    sampling (here the first of the eight), and what both cost.
with steer(pipe, reward, BestOfN()) as baseline:
    pipe(prompt, num_images_per_prompt=8, generator=torch.Generator().manual_seed(0), **call)
print(f"best of 8    {baseline}")

# 4. Feynman-Kac steering: the same eight, weighted and resampled between steps. Your code does not change.
with steer(pipe, reward, FKSteering(particles=8)) as steering:
    image = pipe(prompt, num_images_per_prompt=8, generator=torch.Generator().manual_seed(0), **call).images[0]
print(f"FK steering  {steering}")
image.save("steered.png")
steering.grid().save("steered_grid.png")  # plain, then the best four; steering.save(folder) writes them with scores

# 5. Pruning: sixteen start, two finish, for about the NFE of eight.
pruned = prune(pipe, prompt, reward, Prune((3, 6, 9), (0.5, 0.5, 0.5), candidates=16), **call)
print(f"pruning      {pruned}")
