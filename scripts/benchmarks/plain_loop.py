"""The loop that Flow-GRPO describes, written plainly and for comparison only.

Every denoising step but the last is noisy and trained, one at a time, for every sample; texts are encoded again for
every batch; rewards come after sampling. What the published script does and why is in arXiv 2505.05470, sections 4.1
and 4.2; ``window`` is its faster variant, in which a random window of steps is noisy and trained, drawn anew for every
batch. A group's samples begin from different noises.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from genalign.types import Prompt, RewardFunction


@dataclass(frozen=True)
class PlainSettings:
    """Settings of the plain loop.

    A round has ``prompts_per_round`` x ``group_size`` samples in batches of ``batch_size``; each of its two updates
    takes half of the batches. ``window`` is the number of noisy, trained steps in the first half of the grid; None
    trains every step but the last.
    """

    sigmas: tuple[float, ...]
    noise_level: float = 0.7
    prompts_per_round: int = 24
    group_size: int = 8
    batch_size: int = 96
    learning_rate: float = 3e-4
    clip_range: float = 1e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    window: int | None = None
    autocast: torch.dtype | None = None
    seed: int = 0


@dataclass
class Trajectories:
    """One batch: states (B, S + 1, ...) around its noisy steps, log-probabilities (B, S), and final latents."""

    texts: list[str]
    steps: range
    states: Tensor
    log_probs: Tensor
    final: Tensor


class PlainLoop:
    """``after_update`` is called after every optimiser step, such as for an average of the weights."""

    def __init__(
        self,
        pipe: StableDiffusion3Pipeline,
        parameters: Sequence[nn.Parameter],
        reward: RewardFunction,
        prompts: Sequence[Prompt],
        settings: PlainSettings,
        after_update: Callable[[], None] = lambda: None,
    ) -> None:
        self.pipe, self.parameters, self.reward, self.prompts = pipe, list(parameters), reward, list(prompts)
        self.settings, self.after_update = settings, after_update
        self.sigmas = torch.tensor([*settings.sigmas, 0.0])
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.random = random.Random(settings.seed)
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay)

    def round(self) -> float:
        """Sample, score, and learn; the mean reward."""
        settings = self.settings
        order = torch.randperm(len(self.prompts), generator=self.generator)[: settings.prompts_per_round].tolist()
        prompts = [self.prompts[place] for place in order for _ in range(settings.group_size)]
        parts = [prompts[i : i + settings.batch_size] for i in range(0, len(prompts), settings.batch_size)]
        batches = [self.sample([prompt.text for prompt in part]) for part in parts]
        rewards = torch.cat([self.score(batch, part) for batch, part in zip(batches, parts, strict=True)])
        advantages = self.advantages(rewards).split(settings.batch_size)
        half = len(batches) // 2
        for update in (slice(half), slice(half, None)):
            self.update(batches[update], advantages[update])
        return float(rewards.mean())

    def advantages(self, rewards: Tensor) -> Tensor:
        """Rewards less their prompt's mean, over the standard deviation of all, at most 5."""
        groups = rewards.view(-1, self.settings.group_size)
        centered = (groups - groups.mean(1, keepdim=True)).flatten()
        return (centered / (rewards.std(correction=0) + 1e-4)).clamp(-5, 5)

    @torch.no_grad()
    def sample(self, texts: list[str], noises: Iterator[Tensor] | None = None) -> Trajectories:
        """One batch; ``noises`` are the first latents and those of the noisy steps, drawn where not given."""
        noises = noises or self._drawn(len(texts))
        steps, context = self._steps(), self.encode(texts)
        x = next(noises)
        states, log_probs = [x] if steps.start == 0 else [], []
        for i in range(len(self.settings.sigmas)):
            velocity = self.velocity(x, i, context)
            if i in steps:
                mean, std = self.move(x, velocity, i)
                x = mean + std * next(noises)
                log_probs.append(log_probability(x, mean, std))
            else:
                x = x + velocity * (self.sigmas[i + 1] - self.sigmas[i])
            if steps.start - 1 <= i < steps.stop:
                states.append(x)
        return Trajectories(texts, steps, torch.stack(states, 1), torch.stack(log_probs, 1), x)

    @torch.no_grad()
    def score(self, batch: Trajectories, prompts: Sequence[Prompt]) -> Tensor:
        """Decode a batch and compute its rewards (B,)."""
        config = self.pipe.vae.config
        with self._mixed_precision():
            latents = batch.final / config.scaling_factor + config.shift_factor
            images = self.pipe.vae.decode(latents, return_dict=False)[0]
        return self.reward((images.float() / 2 + 0.5).clamp(0, 1), prompts)

    def update(self, batches: Sequence[Trajectories], advantages: Sequence[Tensor]) -> None:
        """One optimiser step from these batches, step by step."""
        terms = sum(batch.log_probs.numel() for batch in batches)
        for batch, advantage in zip(batches, advantages, strict=True):
            for log_prob, old in zip(self._replayed(batch), batch.log_probs.unbind(1), strict=True):
                ratio = (log_prob - old).exp()
                clipped = ratio.clamp(1 - self.settings.clip_range, 1 + self.settings.clip_range)
                loss = torch.maximum(-advantage * ratio, -advantage * clipped)
                torch.autograd.backward(loss.sum() / terms)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_update()

    @torch.no_grad()
    def log_probs(self, batch: Trajectories) -> Tensor:
        """Those (B, S) of a batch's states under the current weights."""
        return torch.stack(list(self._replayed(batch)), dim=1)

    def _replayed(self, batch: Trajectories) -> Iterator[Tensor]:
        """Log-probabilities (B,) of the states under the current weights, step by step."""
        context = self.encode(batch.texts)
        for j, i in enumerate(batch.steps):
            x = batch.states[:, j]
            yield log_probability(batch.states[:, j + 1], *self.move(x, self.velocity(x, i, context), i))

    def move(self, x: Tensor, velocity: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noisy step i."""
        sigma, dt = self.sigmas[i], self.sigmas[i + 1] - self.sigmas[i]
        rate = self.settings.noise_level * (sigma / (1 - (self.sigmas[1] if sigma == 1 else sigma))).sqrt()
        pull = rate**2 / (2 * sigma)
        return x * (1 + pull * dt) + velocity * (1 + pull * (1 - sigma)) * dt, rate * (-dt).sqrt()

    def velocity(self, x: Tensor, i: int, context: tuple[Tensor, Tensor]) -> Tensor:
        """The transformer's output at step i."""
        timestep = (self.sigmas[i] * 1000).expand(len(x))
        with self._mixed_precision():
            velocity: Tensor = self.pipe.transformer(x, *context, timestep, return_dict=False)[0]
        return velocity.float()

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings and pooled embeddings."""
        longest = self.pipe.tokenizer_3.model_max_length
        options = {"do_classifier_free_guidance": False, "max_sequence_length": longest}
        context, _, pooled, _ = self.pipe.encode_prompt(texts, None, None, **options)
        return context, pooled

    def _steps(self) -> range:
        """The steps that are noisy and trained."""
        size, total = self.settings.window, len(self.settings.sigmas)
        if size is None:
            return range(total - 1)
        first = self.random.randint(0, total // 2 - size)
        return range(first, first + size)

    def _drawn(self, count: int) -> Iterator[Tensor]:
        config = self.pipe.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        while True:
            yield torch.randn(shape, generator=self.generator)

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast("cpu", self.settings.autocast, enabled=self.settings.autocast is not None)


def log_probability(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log N(x; mean, std), a mean over dimensions, (B,), up to a constant."""
    each = -((x.detach() - mean) ** 2) / (2 * std**2) - std.log()
    return each.flatten(1).mean(1)
