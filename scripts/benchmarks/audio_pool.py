"""Recorded audio trajectories on which searches are compared: a part of ``proofs.py audio``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import pipelines
from genalign import assets
from genalign.diffusion.noise import derived_seed
from genalign.diffusion.sampling import Sampling
from genalign.prompts import drawn_in_turn
from genalign.runtime.files import load_state, save_state
from genalign.scoring.score import NamedReward
from genalign.search.engine import SearchRun
from genalign.search.noise_aware import sample_with_previews
from genalign.types import Pipeline, Prompt
from genalign.worlds import tones
from rewards.regressor import RegressorReward
from rewards.tones import TonesReward

STEPS, CANDIDATES, PROMPTS = 16, 48, 60
LEVELS = (3, 4, 6, 7, 8, 10)
SUITES = {100: "val", 84: "comp", 85: "comp", 86: "comp", 87: "iid", 88: "iid", 89: "iid"}  # of a seed's prompts


def pipeline() -> Pipeline:
    """The base model, as it is searched."""
    return pipelines.load(assets.resolve("tones-audio"), autocast=torch.bfloat16)


def pool_prompts(seed: int) -> list[Prompt]:
    """The prompts of a seed's pool, as many of each task as there are, in turn."""
    return drawn_in_turn(tones.prompts(SUITES[seed]), PROMPTS, seed=0)


def record(work: Path, selection: Path) -> None:
    """Record the latent previews of all trajectories at LEVELS, and the scores of their samples.

    Samples are scored by the selection reward and by the verifier. Prompts that are recorded already are skipped.
    """
    model = pipeline()
    judges = [NamedReward("selection", RegressorReward(selection)), NamedReward("strict", TonesReward("strict"))]
    for seed in SUITES:
        for index, prompt in enumerate(pool_prompts(seed)):
            path = work / f"seed-{seed}" / f"{index:03d}.safetensors"
            if path.exists():
                continue
            grid, name = Sampling(STEPS).grid(model), str(derived_seed(seed, "pool", index))
            run = SearchRun(model, [prompt], judges, grid, 1.0, CANDIDATES, name)
            previews, finished = sample_with_previews(run, CANDIDATES, LEVELS)
            tensors = {"previews": previews, "clean": finished.scores}
            save_state(path, tensors, {"prompt": prompt.text, "task": prompt.task})
            print(f"seed {seed}  {index + 1}/{PROMPTS}  {prompt.text}", flush=True)


def load(work: Path, seed: int) -> list[tuple[dict[str, Tensor], Prompt]]:
    """What ``record`` wrote of a seed's prompts."""
    paths = sorted((work / f"seed-{seed}").glob("*.safetensors"))
    return [(load_state(path)[0], prompt) for path, prompt in zip(paths, pool_prompts(seed), strict=True)]
