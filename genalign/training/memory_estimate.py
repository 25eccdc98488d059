"""The GPU memory of a training run, estimated before any weights are read. Not yet checked on a GPU.

``genalign.training.meta_round`` counts one batch; the memory of other batches is added here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from genalign.algorithms.recipe import Recipe
from genalign.diffusion.policy import Policy
from genalign.diffusion.sampling import Sampling
from genalign.scoring.score import NamedReward
from genalign.training.meta_round import GeneratedSamples, MemoryCounter, RoundMemory
from genalign.training.outline import Outline, always_resident
from genalign.training.settings import FittedSettings

_ENCODED_TOGETHER = 64  # texts
CONTEXT = 2**30
"""The bytes, roughly, of CUDA's own context on a GPU, which no tensor counts."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by name: held during the whole run (``always``), and in addition during each phase of a round."""

    always: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    @property
    def peaks(self) -> dict[str, float]:
        """The total bytes in each phase."""
        base = sum(self.always.values())
        return {phase: base + sum(extra.values()) for phase, extra in self.phases.items()}

    @property
    def peak(self) -> tuple[str, float]:
        """The phase with the most bytes, and its bytes."""
        return max(self.peaks.items(), key=lambda item: item[1])


def estimate_memory(
    outline: Outline,
    policy: Policy,
    recipe: Recipe,
    settings: FittedSettings,
    sampling: Sampling,
    rewards: Sequence[NamedReward],
    generations: Sequence[GeneratedSamples] = (),
    processes: int = 1,
) -> dict[str, MemoryEstimate]:
    """Count the memory of each rank's training device, without the rewards' networks and library overhead.

    Args:
        outline: The checkpoint.
        policy: The policy of its denoiser, with the adapter if there is one.
        recipe: The method, which may sample with a copy of the trained weights.
        settings: Batch size, samples in a round and the optimizer.
        sampling: Steps, guidance and kernel of the rollouts.
        rewards: The rewards, of which only names and weights are used.
        generations: What is generated between rounds.
        processes: The number of ranks, each with a GPU of its own.

    Returns:
        The estimates of the ranks that differ, by their names.
    """
    sizes = settings.batch_sizes(recipe.objective.unit, processes)
    counter = MemoryCounter(outline, policy, recipe, settings, sampling, rewards)
    round_memory = counter.round(max(sizes), min(settings.micro_batch or max(sizes), max(sizes)))
    always = _held(outline, policy, round_memory)
    texts = max([settings.prompts_per_round, *(part.count for part in generations)])
    between = [(part, *counter.generation(part)) for part in generations]
    encoding = counter.encoding(min(texts, _ENCODED_TOGETHER))

    def of_rank(rank: int) -> MemoryEstimate:
        own = [size for size in sizes[rank::processes] if size]
        phases = {"encoding texts": {**_moved(outline, "encoding"), **encoding}}
        phases |= _round_phases(outline, settings, round_memory, own, max(sizes))
        for part, sampled, decoded in between:
            if rank == 0 or not part.on_main:
                sampled_then = {"tensors": float(sampled)}
                decoded_then = {**_moved(outline, "decoding"), "tensors": float(decoded)}
                phase = part.name.replace("_", " ")
                phases[phase] = max(sampled_then, decoded_then, key=lambda extra: sum(extra.values()))
        return MemoryEstimate(always, phases)

    # Join consecutive ranks with equal estimates, as in "ranks 1 to 7"
    estimates: dict[str, MemoryEstimate] = {}
    for estimate, members in itertools.groupby(range(processes), of_rank):
        ranks = list(members)
        estimates[f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"] = estimate
    return estimates


def _held(outline: Outline, policy: Policy, counted: RoundMemory) -> dict[str, float]:
    """Return the named bytes held during the whole run."""
    denoiser = outline.networks[0]
    trained = sum(parameter.nbytes for parameter in policy.parameters)
    copies = sum(tensor.nbytes for copy in policy.snapshots for tensor in copy.tensors) + counted.lagging
    copies = copies if policy.config is not None else 0  # those of a whole network are on the CPU
    held = {} if policy.config is None else {denoiser.name: float(denoiser.quantized(outline.memory.quantization))}
    held |= {"trained weights": float(trained), "copies of trained weights": float(copies)}
    held |= {"optimizer": float(counted.moments), "layers of the decoder": float(counted.decoder)}
    return held | {
        network.name: float(network.nbytes)
        for network in outline.networks[1:]
        if always_resident(network, outline.memory)
    }


def _moved(outline: Outline, phase: Literal["encoding", "decoding"]) -> dict[str, float]:
    """Return the bytes of the networks that are on the device only while they encode texts or decode latents."""
    kind = {"encoding": "text encoder", "decoding": "decoder"}[phase]
    return {
        network.name: float(network.nbytes)
        for network in outline.networks
        if network.kind == kind and not always_resident(network, outline.memory)
    }


def _round_phases(
    outline: Outline, settings: FittedSettings, counted: RoundMemory, own: Sequence[int], largest: int
) -> dict[str, dict[str, float]]:
    """Return the named bytes of each phase of a round of one rank.

    Args:
        outline: The checkpoint.
        settings: The settings of the run.
        counted: The memory of a batch of ``largest`` samples.
        own: The sizes of the rank's batches.
        largest: The size of the batch that was counted.
    """
    stored = counted.stored / largest  # of a sample
    earlier, vae = stored * max(sum(own) - largest, 0), _moved(outline, "decoding")
    layer = {"a layer without quantization": float(outline.networks[0].largest)} if outline.memory.quantization else {}
    phases = {
        "sampling": {"earlier batches": earlier, "tensors": float(counted.sampling), **layer},
        "decoding": {**vae, "earlier batches": earlier, "tensors": float(counted.decoding)},
    }
    if settings.overlap_scoring and len(own) > 1:
        phases["sampling beside decoding"] = {
            **vae,
            "earlier batches": stored * max(sum(own) - 2 * largest, 0),
            "tensors": float(counted.sampling + counted.decoding),
            **layer,
        }
    repeated = stored * sum(own) / settings.updates_per_round if settings.epochs > 1 else 0.0
    phases["learning"] = {
        "samples of the round": stored * sum(own),
        "shuffled samples of an update": repeated,
        "gradients": float(counted.gradients),
        "tensors": float(counted.learning),
        **layer,
    }
    return phases
