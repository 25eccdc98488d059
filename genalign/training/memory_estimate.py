"""The GPU memory of a training run, counted before any weights are read. Checked on no GPU yet.

The code of a round runs on torch's meta device, where tensors have shapes and no values: one batch is sampled, decoded
and scored, and one micro-batch is trained. What other batches hold is added.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from genalign.algorithms.interfaces import RoundScores
from genalign.algorithms.recipes import Recipe
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import Rollout, generate
from genalign.diffusion.sampling import Sampling
from genalign.runtime.counted_memory import CountedMemory, CudaKernels
from genalign.runtime.memory_options import Memory
from genalign.scoring.score import NamedReward
from genalign.training.dry_run import without_networks
from genalign.training.settings import FittedSettings
from genalign.training.trainer import Trainer
from genalign.types import Conditioning, NoiseLevel, Pipeline, Prompt, PromptSet, TrainableReward

_QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes per number; nf4 has a float32 for every 64 numbers
_ENCODED_TOGETHER = 64  # texts
logger = logging.getLogger(__name__)
CONTEXT = 2**30
"""About the bytes that CUDA takes on a GPU for itself, which no tensor has."""


class MetaPipeline(Pipeline, Protocol):
    """A diffusers pipeline whose networks are on the meta device, with shapes and no values."""

    pipe: Any

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def sample_rate(self) -> int | None: ...

    def longest_conditioning(self, count: int) -> Mapping[str, Tensor]: ...

    def run_denoiser(self, x: Tensor, timestep: Tensor, tensors: Mapping[str, Tensor]) -> Tensor: ...

    def run_vae(self, latents: Tensor) -> Tensor: ...

    def zeros(self, *shape: int) -> Tensor: ...

    def encode_longest(self, count: int) -> None:
        """Run the text encoders on ``count`` texts of the greatest length."""


@dataclass(frozen=True)
class NetworkSize:
    """A network without an adapter.

    Attributes:
        name: The name of the component.
        parameters: The number of its parameters.
        linear: The number of those that quantization takes: the weights of linear layers.
        nbytes: The bytes of its parameters and buffers, without quantization.
        largest: The bytes of the largest of these weights, which is held without quantization for a moment.
        kind: Whether it is trained, encodes texts, or decodes latents.
    """

    name: str
    parameters: int
    linear: int
    nbytes: int
    largest: int
    kind: Literal["denoiser", "text encoder", "decoder"]

    def quantized(self, quantization: str | None) -> float:
        """Bytes under a quantization of the weights of linear layers; "fp8" stores them in their own dtype, too."""
        if quantization not in _QUANTIZED:
            return self.nbytes
        return self.nbytes - self.linear * (round(self.nbytes / self.parameters) - _QUANTIZED[quantization])


@dataclass(frozen=True)
class Outline:
    """A checkpoint opened without its weights.

    Attributes:
        pipeline: The pipeline, on the meta device.
        networks: The sizes of its networks without an adapter, the denoiser first.
        memory: The memory options of the run.
        autocast: The dtype of mixed precision; None for none.
    """

    pipeline: MetaPipeline
    networks: Sequence[NetworkSize]
    memory: Memory
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class GeneratedSamples:
    """Samples that are generated between rounds: an evaluation, the panel of reward hacking, or a sample grid.

    Attributes:
        name: The name of its section.
        sampling: Steps and guidance.
        batch_size: Samples that are generated at once.
        count: All samples.
        joined: Whether all of them are held at the end.
        on_main: Whether they are the main rank's alone.
    """

    name: str
    sampling: Sampling
    batch_size: int
    count: int
    joined: bool = False
    on_main: bool = False


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


def always_resident(network: NetworkSize, memory: Memory) -> bool:
    """Return whether a network is on the device during the whole run, or only while it is used."""
    waiting = {"none": (), "text": ("text encoder",), "all": ("text encoder", "decoder")}
    return network.kind not in waiting[memory.offload]


def _moved(outline: Outline, phase: Literal["encoding", "decoding"]) -> dict[str, float]:
    """Bytes of the networks that are moved to the device while texts are encoded or latents decoded, by name."""
    kind = {"encoding": "text encoder", "decoding": "decoder"}[phase]
    return {
        network.name: float(network.nbytes)
        for network in outline.networks
        if network.kind == kind and not always_resident(network, outline.memory)
    }


@dataclass
class _Calls:
    """A pipeline whose calls without gradients run once for each shape, since the same call takes the same memory.

    ``sampled`` is the peak until the first batch was decoded.
    """

    pipeline: MetaPipeline
    memory: CountedMemory
    sampled: int | None = None
    done: dict[tuple[Any, ...], tuple[int, Tensor]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        if torch.is_grad_enabled():
            return self.pipeline.predict(x, level, conditioning, guidance)
        key = ("predict", x.shape, guidance > 1)
        return self._once(key, x, lambda: self.pipeline.predict(x, level, conditioning, guidance))

    def decode(self, latents: Tensor) -> Tensor:
        if self.sampled is None:
            self.sampled = self.memory.peak
            self.memory.reset_peak()
        return self._once(("decode", latents.shape), latents, lambda: self.pipeline.decode(latents))

    def share_decoding(self) -> None:
        """Run the VAE once for all parts of a batch that are decoded one by one."""
        run_vae, pipeline = self.pipeline.run_vae, cast(Any, self.pipeline)
        pipeline.run_vae = lambda latents: self._once(("vae", latents.shape), latents, lambda: run_vae(latents))

    def _once(self, key: tuple[Any, ...], latents: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """Run a call, or count what it took before."""
        if key in self.done:
            extra, like = self.done[key]
            self.memory.raise_peak(extra)
            return like.new_empty(like.shape)
        earlier, before = self.memory.peak, self.memory.reset_peak()
        result = call()
        shape = torch.empty((), dtype=result.dtype, device="meta").expand(result.shape)  # takes no memory
        self.done[key] = self.memory.peak - before, shape
        self.memory.peak = max(self.memory.peak, earlier)
        return result


@dataclass(frozen=True)
class _RoundMemory:
    """Bytes of a round of one batch.

    Attributes:
        decoder: What layers of the decoder hold from the first call on, such as the products of weight norm.
        moments: The optimizer's moments.
        lagging: The lagging copy of the weights.
        sampling: At most until the batch is sampled.
        decoding: At most while it is decoded and scored, with what it stores.
        stored: What the batch holds until it is trained.
        gradients: The gradients of all trained weights.
        learning: At most while a micro-batch is trained, beyond what is stored and the gradients.
    """

    decoder: int
    moments: int
    lagging: int
    sampling: int
    decoding: int
    stored: int
    gradients: int
    learning: int


class _Counter:
    """The memory of the parts of a run, each run once.

    Args:
        outline: The checkpoint.
        policy: The policy of its denoiser.
        recipe: The method, whose trained steps are the same in every round.
        settings: The settings of the run.
        sampling: Steps and guidance of the rollouts.
        rewards: The rewards, of which only names and weights are used.
    """

    def __init__(
        self,
        outline: Outline,
        policy: Policy,
        recipe: Recipe,
        settings: FittedSettings,
        sampling: Sampling,
        rewards: Sequence[NamedReward],
    ) -> None:
        self.outline, self.policy, self.settings = outline, policy, settings
        self.keeps_samples = any(isinstance(reward.function, TrainableReward) for reward in rewards)
        self.memory, self.kernels = CountedMemory(), CudaKernels(outline.autocast)
        if outline.memory.checkpointing:
            cast(Any, outline.pipeline.denoiser).enable_gradient_checkpointing(self.kernels.checkpoint)
        self.memory.leave_out(tensor for network in _networks(outline.pipeline) for tensor in _tensors(network))
        self.memory.leave_out([tensor for copy in policy.snapshots for tensor in copy.tensors])
        self.calls = _Calls(outline.pipeline, self.memory)
        self.calls.share_decoding()
        self.recipe, self.sampling = without_networks(recipe), sampling
        self.rewards = [replace(reward, function=_random_scores) for reward in rewards]

    @contextmanager
    def counting(self) -> Iterator[CountedMemory]:
        """Count what runs within the context."""
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # about scores of no samples
        try:
            with self.memory, self.kernels:
                yield self.memory
        finally:
            logging.disable(disabled)

    def trainer(self, batch: int) -> Trainer:
        """Return a trainer whose round is a batch, of whole groups if it divides, and at least two samples."""
        whole = batch % self.settings.group_size == 0
        prompts, group = (batch // self.settings.group_size, self.settings.group_size) if whole else (1, max(batch, 2))
        sizes: dict[str, Any] = {
            "prompts_per_round": prompts,
            "group_size": group,
            "batch_size": batch,
            "updates_per_round": 1,
        }
        once: dict[str, Any] = {
            "rounds": 1,
            "warmup_rounds": 0,
            "max_nfe": None,
            "optimizer": "adamw",
            "overlap_scoring": False,
        }
        micro_batch = min(self.settings.micro_batch or batch, batch)
        settings = replace(self.settings, **sizes, **once, micro_batch=micro_batch)
        texts = PromptSet("prompts", tuple(Prompt(str(number)) for number in range(prompts)))
        trainer = Trainer(self.calls, self.policy, self.rewards, texts, self.recipe, settings, self.sampling)
        trainer.sampler = replace(trainer.sampler, keep_samples=self.keeps_samples)
        if self.settings.optimizer == "adamw8bit":
            trainer.optimizer = _EightBit(self.policy.parameters, {})
        for options in trainer.optimizer.param_groups:
            options["foreach"] = True  # the default on CUDA
        return trainer

    def round(self, size: int, micro_batch: int) -> _RoundMemory:
        """Sample, decode and score a batch of ``size``, and train a micro-batch of it on one of its stored steps."""
        with self.counting() as memory:
            start = memory.live
            with torch.no_grad():
                self.outline.pipeline.decode(self.outline.pipeline.zeros(1, *self.outline.pipeline.latent_shape))
            decoder, start = memory.live - start, memory.live
            trainer = self.trainer(size)
            lagging = memory.live - start
            moments = _first_step(trainer)

            # Sample
            before, self.calls.sampled = memory.reset_peak(), None
            prompts = next(trainer.prompts.rounds())
            (batch, *_) = batches = trainer.sample(0, prompts)
            sampling, decoding = self._peaks_since(before)
            after = (memory.live - before) // len(batches)

            # Learn
            rollout = _first_transition(batch.rollout)
            part = replace(batch, rollout=next(rollout.split(micro_batch)))
            scores = _first_scores(trainer.gather_scores(batches, len(prompts)), micro_batch)
            trainer.batch_sizes, trainer.micro_batch = (micro_batch,), micro_batch
            before = memory.live
            _make_gradients(self.policy)  # as the earlier micro-batches have
            gradients = memory.reset_peak() - before
            trainer.learn(0, prompts, [part], scores)
            learning = memory.peak - before - gradients
        if self.settings.offload_rollouts:  # a micro-batch is on the device with all of its steps
            whole, first = (sum(tensor.nbytes for tensor in r.tensors().values()) for r in (batch.rollout, rollout))
            learning += (whole - first) * micro_batch // len(rollout.final)
        return _RoundMemory(decoder, moments, lagging, sampling, decoding, after, gradients, learning)

    def encoding(self, texts: int) -> dict[str, float]:
        """Encode texts of the greatest length; return the bytes at most, if that needs no tokenizer's files."""
        with self.counting() as memory, torch.no_grad():
            start = memory.reset_peak()
            try:
                self.outline.pipeline.encode_longest(texts)
            except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
                logger.debug("text encoders cannot run without values: %s", error)
                return {}
            return {"activations": float(memory.peak - start)}

    def _peaks_since(self, start: int) -> tuple[int, int]:
        """The bytes beyond ``start`` at most until a batch was decoded, and since."""
        assert self.calls.sampled is not None, "a batch is decoded"
        return self.calls.sampled - start, self.memory.peak - start

    def generation(self, part: GeneratedSamples) -> tuple[int, int]:
        """Generate a batch between rounds; return the bytes at most until it is sampled, and afterwards."""
        with self.counting() as memory:
            texts, size = [str(number) for number in range(part.count)], min(part.batch_size, part.count)
            grid, guidance = part.sampling.grid(self.calls), part.sampling.guidance_scale(self.calls)
            start, self.calls.sampled = memory.reset_peak(), None
            samples = next(generate(self.calls, texts[:size], range(size), grid, guidance, size))
            sampling, decoding = self._peaks_since(start)
            if not part.joined:
                return sampling, decoding
            # All samples are joined
            earlier = samples.nbytes // size * (part.count - size)
            others = samples.new_empty(part.count - size, *samples.shape[1:])
            memory.reset_peak()
            torch.cat([samples, others])
            return sampling + earlier, max(decoding + earlier, memory.peak - start)


def _first_step(trainer: Trainer) -> int:
    """Make an optimizer step; return the bytes of the optimizer's moments."""
    _make_gradients(trainer.policy)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return sum(
        tensor.nbytes for state in trainer.optimizer.state.values() for tensor in state.values() if tensor.is_meta
    )


def _make_gradients(policy: Policy) -> None:
    for parameter in policy.parameters:
        parameter.grad = torch.zeros_like(parameter)


def _first_transition(rollout: Rollout) -> Rollout:
    """Return a rollout with the first of its stored steps, if any, whose tensors are parts of the same storages."""
    tensors = rollout.states[:, :2], rollout.prediction[:, :1], rollout.final
    return Rollout(rollout.inputs, rollout.steps[:1], *tensors)


def _first_scores(scores: RoundScores, count: int) -> RoundScores:
    """Return the scores of the first ``count`` samples, as of one stored step."""
    stepwise = None if scores.stepwise is None else scores.stepwise[:count, [0, -1]]
    features = None if scores.features is None else scores.features[:count]
    return RoundScores(scores.scores[:count], scores.weights, scores.group[:count], stepwise, features)


class _EightBit(torch.optim.Optimizer):
    """The moments of AdamW in 8 bits, without the package that needs a CUDA device."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            moments = torch.empty(2, *parameter.shape, dtype=torch.uint8, device=parameter.device)
            self.state[parameter].setdefault("moments", moments)


def _random_scores(samples: Tensor, prompts: object) -> Tensor:
    return torch.rand(len(samples), generator=torch.Generator().manual_seed(len(samples)))


def _networks(pipeline: MetaPipeline) -> list[nn.Module]:
    return [part for part in pipeline.pipe.components.values() if isinstance(part, nn.Module)]


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    return (*network.parameters(), *network.buffers())


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
    """Count the memory of the training device of each rank; rewards' networks and what libraries take are left out.

    Args:
        outline: The checkpoint.
        policy: The policy of its denoiser, with the adapter if there is one.
        recipe: The method, which may sample with a copy of the trained weights.
        settings: Batch size, samples in a round and the optimizer.
        sampling: Steps and guidance of the rollouts.
        rewards: The rewards, of which only names and weights are used.
        generations: What is generated between rounds.
        processes: The number of ranks, each with a GPU of its own.

    Returns:
        The estimates of the ranks that differ, by their names.
    """
    sizes = settings.batch_sizes(recipe.objective.unit, processes)
    counter = _Counter(outline, policy, recipe, settings, sampling, rewards)
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

    return _named_by_ranks([of_rank(rank) for rank in range(processes)])


def _held(outline: Outline, policy: Policy, counted: _RoundMemory) -> dict[str, float]:
    """Bytes that are held during the whole run, by name."""
    denoiser = outline.networks[0]
    trained = sum(parameter.nbytes for parameter in policy.parameters)
    copies = sum(tensor.nbytes for copy in policy.snapshots for tensor in copy.tensors) + counted.lagging
    copies = copies if policy.config is not None else 0  # those of a whole network are on the CPU
    held = {} if policy.config is None else {denoiser.name: float(denoiser.quantized(outline.memory.quantization))}
    held |= {"trained weights": float(trained), "copies of them": float(copies)}
    held |= {"optimizer": float(counted.moments), "layers of the decoder": float(counted.decoder)}
    return held | {
        network.name: float(network.nbytes)
        for network in outline.networks[1:]
        if always_resident(network, outline.memory)
    }


def _round_phases(
    outline: Outline, settings: FittedSettings, counted: _RoundMemory, own: Sequence[int], largest: int
) -> dict[str, dict[str, float]]:
    """Bytes of the phases of a round of batches of the sizes ``own``, of which ``largest`` was counted."""
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


def _named_by_ranks(estimates: Sequence[MemoryEstimate]) -> dict[str, MemoryEstimate]:
    """Join consecutive ranks with equal estimates, as in "ranks 1 to 7"."""
    named: dict[str, MemoryEstimate] = {}
    for estimate, members in itertools.groupby(enumerate(estimates), key=lambda item: item[1]):
        ranks = [rank for rank, _ in members]
        named[f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"] = estimate
    return named
