"""An ensemble of learned rewards with too few samples each, for the proofs of reward ensembles: the verifier is gold.

Each is a perceptron on the frozen shapes-clip, fitted to the verifier's partial credit of its own images of the base
model, so that each overrates something else of what training will find.

    python scripts/benchmarks/learned_proxies.py     fit the heads that comparisons name, where they are missing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from genalign import assets
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.rollout import generate
from genalign.prompts import drawn_in_turn
from genalign.types import Prompt, RewardFunction
from genalign.worlds import shapes
from pipelines import SD3
from rewards.regressor import Regressor, RegressorReward
from rewards.shapes import ShapesReward
from scripts.benchmarks.shapes_sampling import shapes_sampling

PROXIES = Path("runs/proofs/proxies")  # which the comparisons name
COUNT, IMAGES, STEPS = 4, 512, 400  # heads, base images of each, and steps of Adam
SAMPLING = shapes_sampling(8)  # as in training


@dataclass(frozen=True)
class Overrating:
    """The score of a learned reward minus the verifier's partial credit, which it was fitted to."""

    weights: str

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score images (B, 3, 64, 64) in [0, 1] as (B,), float32 on the CPU; NaN for one that is not finite."""
        return RegressorReward(self.weights)(images, prompts).cpu() - ShapesReward("partial")(images, prompts)


def write_proxies(folder: Path = PROXIES, model: str = "shapes-sd3", count: int = COUNT, images: int = IMAGES) -> None:
    """Fit the heads and write them to head-1.safetensors, head-2.safetensors, ...; those that exist stay.

    Args:
        folder: The folder of the files.
        model: The base model, a folder or the name of an embedded one.
        count: The number of heads.
        images: The number of base images of each head.
    """
    for number in range(1, count + 1):
        path = folder / f"head-{number}.safetensors"
        if not path.exists():
            fitted(*base_images(model, images, number), ShapesReward("partial"), number).save(path)


def base_images(model: str, count: int, seed: int) -> tuple[Tensor, list[Prompt]]:
    """Sample the base model by the ODE on training prompts, as many of each task, (count, 3, 64, 64)."""
    pipeline = SD3.load(assets.resolve(model), autocast=torch.bfloat16)
    prompts = drawn_in_turn(shapes.prompts("train"), count, seed=seed)
    seeds = [derived_seed(seed, "proxies", prompt.text, place) for place, prompt in enumerate(prompts)]
    parts = generate(pipeline, [prompt.text for prompt in prompts], seeds, SAMPLING.grid(pipeline), 1.0, 64)
    return torch.cat(list(parts)), prompts


def fitted(images: Tensor, prompts: Sequence[Prompt], gold: RewardFunction, seed: int, steps: int = STEPS) -> Regressor:
    """Fit a head to the gold scores of these images, by least squares on batches of 64."""
    torch.manual_seed(seed)
    network = Regressor("shapes-clip")
    target = gold(images, prompts)
    with torch.no_grad():
        pieces = range(0, len(prompts), 64)
        inputs = torch.cat([network.features(images[i : i + 64], prompts[i : i + 64]) for i in pieces])
    optimizer = torch.optim.Adam(network.head.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(target), (min(64, len(target)),), generator=generator)
        loss = F.mse_loss(network.head(inputs[rows]).squeeze(-1), target[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return network


if __name__ == "__main__":
    write_proxies()
