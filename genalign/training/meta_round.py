"""The memory of the parts of a run, each run once on torch's meta device, where tensors have shapes but no values.

One batch is sampled, decoded and scored, one micro-batch is trained, and a batch between rounds is generated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from genalign.algorithms.interfaces import RoundScores, traits_of
from genalign.algorithms.recipe import Recipe
from genalign.diffusion.hypernetwork import with_gates
from genalign.diffusion.policy import Policy
from genalign.diffusion.rollout import Rollout, generate
from genalign.diffusion.sampling import Sampling
from genalign.runtime.counted_memory import CountedMemory, CudaKernels
from genalign.scoring.score import NamedReward
from genalign.training.dry_run import without_networks
from genalign.training.outline import MetaPipeline, Outline
from genalign.training.settings import FittedSettings
from genalign.training.trainer import Trainer
from genalign.types import Conditioning, NoiseLevel, Prompt, PromptSet, TrainableReward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundMemory:
    """Bytes of a round of one batch.

    Attributes:
        decoder: Tensors that the decoder's layers hold after the first call, such as the products of weight norm.
        moments: The optimizer's moments.
        lagging: The lagging copy of the weights.
        sampling: The peak until the batch is sampled.
        decoding: The peak while it is decoded and scored, with its stored transitions.
        stored: The batch until it is trained on.
        gradients: The gradients of all trained weights.
        learning: The peak while a micro-batch is trained on, without the stored batch and the gradients.
    """

    decoder: int
    moments: int
    lagging: int
    sampling: int
    decoding: int
    stored: int
    gradients: int
    learning: int


@dataclass(frozen=True)
class GeneratedSamples:
    """Samples that are generated between rounds: an evaluation, the panel of reward hacking, or a sample grid.

    Attributes:
        name: The name of its section.
        sampling: Steps, guidance and kernel.
        batch_size: Samples that are generated at once.
        count: All samples.
        joined: Whether all samples are held together at the end.
        on_main: Whether only the main rank generates them.
    """

    name: str
    sampling: Sampling
    batch_size: int
    count: int
    joined: bool = False
    on_main: bool = False


class MemoryCounter:
    """Runs each part of a training run once, and counts its memory.

    Args:
        outline: The checkpoint.
        policy: The policy of its denoiser.
        recipe: The method, whose trained steps are the same in every round.
        settings: The settings of the run.
        sampling: Steps, guidance and kernel of the rollouts.
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
            checkpoint = with_gates(outline.pipeline.denoiser, self.kernels.checkpoint)
            cast(Any, outline.pipeline.denoiser).enable_gradient_checkpointing(checkpoint)
        for part in outline.pipeline.pipe.components.values():
            if isinstance(part, nn.Module):
                self.memory.leave_out([*part.parameters(), *part.buffers()])
        self.memory.leave_out([tensor for copy in policy.snapshots for tensor in copy.tensors])
        self.calls = _Calls(outline.pipeline, self.memory, self.kernels)
        self.calls.share_decoding()
        self.recipe, self.sampling = replace(without_networks(recipe), balance=None), sampling
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
        """Return a trainer whose round is one batch of at least two samples, in whole groups if they divide it."""
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
            "data": None,  # reading takes less than sampling
        }
        micro_batch = min(self.settings.micro_batch or batch, batch)
        settings = replace(self.settings, **sizes, **once, micro_batch=micro_batch)
        texts = PromptSet("prompts", tuple(Prompt(str(number)) for number in range(prompts)))
        trainer = Trainer(self.calls, self.policy, self.rewards, texts, self.recipe, settings, self.sampling)
        trainer.sampler = replace(trainer.sampler, keep_samples=self.keeps_samples)
        if self.settings.optimizer == "adamw8bit":
            trainer.learner.optimizer = _EightBit(self.policy.parameters, {})
        for options in trainer.learner.optimizer.param_groups:
            options["foreach"] = True  # the default on CUDA
        return trainer

    def round(self, size: int, micro_batch: int) -> RoundMemory:
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
            chained = traits_of(self.recipe.objective).through_sampler  # its graph may span all stored steps
            rollout = batch.rollout
            if not chained:  # the first of its stored steps, in parts of the same storages
                tensors = rollout.states[:, :2], rollout.prediction[:, :1], rollout.final
                rollout = Rollout(rollout.inputs, rollout.steps[:1], *tensors)
            part = replace(batch, rollout=next(rollout.split(micro_batch)))
            scores = _first_scores(trainer.gather_scores(batches, prompts), micro_batch)
            trainer.learner.batch_sizes, trainer.learner.micro_batch = (micro_batch,), micro_batch
            before = memory.live
            _make_gradients(self.policy)  # as the earlier micro-batches have
            gradients = memory.reset_peak() - before
            trainer.learner.learn(0, prompts, [part], scores, trainer.kernel)
            learning = memory.peak - before - gradients
        if self.settings.offload_rollouts:  # a micro-batch is on the device with all of its steps
            whole, first = (sum(tensor.nbytes for tensor in r.tensors().values()) for r in (batch.rollout, rollout))
            learning += (whole - first) * micro_batch // len(rollout.final)
        return RoundMemory(decoder, moments, lagging, sampling, decoding, after, gradients, learning)

    def encoding(self, texts: int) -> dict[str, float]:
        """Encode texts of maximum length, and return the named peak; empty if that needs a tokenizer's files."""
        with self.counting() as memory, torch.no_grad():
            start = memory.reset_peak()
            try:
                self.outline.pipeline.encode_longest(texts)
            except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
                logger.debug("text encoders cannot run without values: %s", error)
                return {}
            return {"activations": float(memory.peak - start)}

    def _peaks_since(self, start: int) -> tuple[int, int]:
        """The peaks in bytes beyond ``start``: until the first batch was decoded, and since then."""
        assert self.calls.sampled is not None, "a batch is decoded"
        return self.calls.sampled - start, self.memory.peak - start

    def generation(self, part: GeneratedSamples) -> tuple[int, int]:
        """Generate a batch between rounds; return the peaks in bytes until it is sampled, and afterwards."""
        with self.counting() as memory:
            texts, size = [str(number) for number in range(part.count)], min(part.batch_size, part.count)
            grid, guidance = part.sampling.grid(self.calls), part.sampling.guidance_scale(self.calls)
            kernel = part.sampling.kernel_on(grid)
            start, self.calls.sampled = memory.reset_peak(), None
            samples = next(generate(self.calls, texts[:size], range(size), grid, guidance, size, kernel))
            sampling, decoding = self._peaks_since(start)
            if not part.joined:
                return sampling, decoding
            # All samples are joined
            earlier = samples.nbytes // size * (part.count - size)
            others = samples.new_empty(part.count - size, *samples.shape[1:])
            memory.reset_peak()
            torch.cat([samples, others])
            return sampling + earlier, max(decoding + earlier, memory.peak - start)


@dataclass
class _Calls:
    """A pipeline whose calls without gradients run once per shape, since equal calls take equal memory.

    ``sampled`` is the peak until the first batch was decoded.
    """

    pipeline: MetaPipeline
    memory: CountedMemory
    kernels: CudaKernels
    sampled: int | None = None
    done: dict[tuple[Any, ...], tuple[int, Tensor]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        if torch.is_grad_enabled():
            with self.kernels:  # a call that is made again in the backward pass is outside of the counter's context
                return self.pipeline.predict(x, level, conditioning, guidance)
        key = ("predict", x.shape, guidance > 1)
        return self._once(key, x, lambda: self.pipeline.predict(x, level, conditioning, guidance))

    def decode(self, latents: Tensor) -> Tensor:
        if self.sampled is None:
            self.sampled = self.memory.peak
            self.memory.reset_peak()
        if torch.is_grad_enabled():
            return self.pipeline.decode(latents)
        return self._once(("decode", latents.shape), latents, lambda: self.pipeline.decode(latents))

    def share_decoding(self) -> None:
        """Run the VAE once for all parts of a batch that are decoded one by one."""
        run_vae, pipeline = self.pipeline.run_vae, cast(Any, self.pipeline)
        pipeline.run_vae = lambda latents: (
            run_vae(latents)
            if torch.is_grad_enabled()
            else self._once(("vae", latents.shape), latents, lambda: run_vae(latents))
        )

    def _once(self, key: tuple[Any, ...], latents: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """Run a call, or count the memory of the same earlier call."""
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


def _first_step(trainer: Trainer) -> int:
    """Make an optimizer step; return the bytes of the optimizer's moments."""
    _make_gradients(trainer.policy)
    trainer.learner.optimizer.step()
    trainer.learner.optimizer.zero_grad()
    return sum(
        tensor.nbytes
        for state in trainer.learner.optimizer.state.values()
        for tensor in state.values()
        if tensor.is_meta
    )


def _make_gradients(policy: Policy) -> None:
    for parameter in policy.parameters:
        parameter.grad = torch.zeros_like(parameter)


def _first_scores(scores: RoundScores, count: int) -> RoundScores:
    """Return the scores of the first ``count`` samples, as of one stored step."""
    stepwise = None if scores.stepwise is None else scores.stepwise[:count, [0, -1]]
    features = None if scores.features is None else scores.features[:count]
    task = None if scores.task is None else scores.task[:count]
    first, group = scores.scores[:count], scores.group[:count]
    return RoundScores(first, scores.weights, group, stepwise, features, task, scores.names)


class _EightBit(torch.optim.Optimizer):
    """The moments of 8-bit AdamW, without the package that needs a CUDA device."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            moments = torch.empty(2, *parameter.shape, dtype=torch.uint8, device=parameter.device)
            self.state[parameter].setdefault("moments", moments)


def _random_scores(samples: Tensor, prompts: object) -> Tensor:
    """Random scores, with a gradient if the samples have one: the memory of rewards is not counted."""
    if samples.requires_grad:
        return samples.flatten(1).mean(1).cpu()
    return torch.rand(len(samples), generator=torch.Generator().manual_seed(len(samples)))
