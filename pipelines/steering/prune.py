"""Noise-aware pruning of a diffusers pipeline of the user's own: one call of it for the steps between two prunings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from genalign.diffusion.noise import derived_seed
from genalign.scoring.budget import Ledger
from genalign.search.lineage import Lineage
from genalign.search.pruning import Prune
from genalign.search.ranking import best_per_prompt
from genalign.types import Prompt
from pipelines.steering.latent_scores import Decode, PipelineScorer, Rewards
from pipelines.steering.partial_runs import PartialRun, run_part, run_rest


@dataclass(frozen=True)
class Pruned:
    """Result of pruning: decoded ``samples`` (M, ...), best first, and their ``scores`` (M, K rewards).

    ``lineage`` holds all candidates, ``ledger`` the cost. For the range of samples see
    ``pipelines.steering.latent_scores``.
    """

    samples: Tensor
    scores: Tensor
    lineage: Lineage
    ledger: Ledger


def prune(
    pipe: DiffusionPipeline,
    prompt: str | Prompt,
    reward: Rewards,
    strategy: Prune,
    decode: Decode | None = None,
    seed: int = 0,
    **call: Any,
) -> Pruned:
    """Sample ``strategy.candidates`` times with ``pipe(prompt, **call)``, and drop most candidates on their way.

    Args:
        pipe: The pipeline; it is called once for the steps between two prunings, with one row for each candidate.
        prompt: The prompt of all candidates.
        reward: One reward, or several by name.
        strategy: The pruning steps and fractions, with a number of candidates.
        decode: From latents to samples, in place of ``pipelines.steering.latent_scores.decode_latents``.
        seed: Seed of the candidates' generators.
        **call: Further arguments of the pipeline, for one sample: texts, such as a negative prompt, and tensors, such
            as embeddings in place of the prompt, are repeated for each candidate.

    Raises:
        ValueError: No number of candidates, a scorer other than the rewards, or a call that
            ``pipelines.steering.partial_runs`` cannot divide into parts.
    """
    if strategy.candidates is None or strategy.scorer is not None:
        raise ValueError("prune needs Prune(candidates=...), and scores decoded previews by the rewards alone")
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
    scorer = PipelineScorer(pipe, reward, decode)
    count = strategy.candidates
    generators = [torch.Generator().manual_seed(derived_seed(seed, j)) for j in range(count)]
    nodes = list(scorer.lineage.add([0] * count, [None] * count, 0))
    part: PartialRun | None = None
    with scorer.observing():
        for step, alive in zip(strategy.steps, strategy.counts(count)[1:], strict=True):
            # All candidates that are left do the steps until the next pruning
            part = run_part(pipe, part, step + 1, **_repeated(call, prompt, generators))

            # The candidates with the best previews continue
            scores, _ = scorer(part.x0, [prompt] * len(nodes), nodes, step + 1)
            rows = best_per_prompt(scores, torch.zeros(len(nodes), dtype=torch.long), alive)
            survivors = [nodes[i] for i in rows.tolist()]
            scorer.lineage.close([node for node in nodes if node not in survivors], step + 1)
            part, nodes, generators = part.rows(rows), survivors, [generators[i] for i in rows.tolist()]

        # The survivors finish, best first
        arguments = {**_repeated(call, prompt, generators), "output_type": "latent", "return_dict": False}
        output = run_rest(pipe, part, **arguments)
        total = len(pipe.scheduler.timesteps)
        scores, samples = scorer(output[0], [prompt] * len(nodes), nodes, total)
        scorer.lineage.close(nodes, total)
        order = best_per_prompt(scores, torch.zeros(len(nodes), dtype=torch.long), len(nodes))
        return Pruned(samples[order], scores[order], scorer.lineage, scorer.ledger)


def _repeated(call: dict[str, Any], prompt: Prompt, generators: list[torch.Generator]) -> dict[str, Any]:
    """Repeat the arguments of a call for one sample for a batch with these generators."""
    count = len(generators)
    batch: dict[str, Any] = {} if "prompt_embeds" in call else {"prompt": [prompt.text] * count}
    for name, value in call.items():
        if isinstance(value, str):
            batch[name] = [value] * count
        else:
            batch[name] = value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value
    return {**batch, "generator": list(generators)}
