"""Flow-GRPO as its authors' script trains it (arXiv 2505.05470), on one process and for comparison only.

A round is what the script calls an epoch: batches of samples are drawn, every step but the last noisy (with a
``window`` a few steps, drawn anew for each batch: the script's faster variant); a thread pool scores a batch while the
next one is sampled; advantages are rewards less their prompt's mean, divided by the standard deviation of all rewards.
Samples without advantage are dropped, as many as make the rest divisible by the number of batches are put back at
random, and the rest is divided into that many batches again. Each half of them is one step of AdamW on PPO's clipped
surrogate, one noisy step at a time, with the embeddings of the texts that sampling stored.

Where it differs from the script, it is to the script's advantage or needed on small models: a batch encodes each of its
texts once, where the script encodes repeated ones again; the last step has no noise, as in the script's faster variant,
since grids of small models leave more noise there than can be seen in their pictures; ``after_update`` may average the
weights at every step, where the script does so at every eighth, too seldom for runs of tens of rounds; there is no KL
penalty, which would cost another pass, as in the script's settings without guidance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from genalign.types import Prompt, RewardFunction

_SCORING_THREADS = 8
_LARGEST_ADVANTAGE = 5.0


@dataclass(frozen=True)
class PlainSettings:
    """Settings of the plain loop, by default the script's.

    A round has ``prompts_per_round`` x ``group_size`` samples in an even number of batches of ``batch_size``; each of
    its two updates takes half of the batches. ``window`` is the number of noisy, trained steps in the first half of the
    grid; None trains every step but the last.
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

    def __post_init__(self) -> None:
        if self.prompts_per_round * self.group_size % (2 * self.batch_size):
            raise ValueError(
                f"{self.prompts_per_round * self.group_size} samples are no even number of batches of"
                f" {self.batch_size}: each of two updates takes half of the batches"
            )

    @property
    def batches(self) -> int:
        """The number of batches of a round."""
        return self.prompts_per_round * self.group_size // self.batch_size


@dataclass(frozen=True)
class Trajectories:
    """Samples with S noisy steps each, which differ by sample where a window was drawn for each batch.

    Attributes:
        steps: The noisy steps (B, S).
        states: The latents around them (B, S + 1, ...).
        log_probs: The log-probabilities (B, S) with which they were drawn.
        context: The embeddings (B, tokens, d) of the texts.
        pooled: Their pooled embeddings (B, d).
    """

    steps: Tensor
    states: Tensor
    log_probs: Tensor
    context: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, rows: Tensor | slice) -> Trajectories:
        """Select the samples of these rows."""
        return Trajectories(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Trajectories]) -> Trajectories:
        """Concatenate batches in their order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class PlainLoop:
    """The loop; ``after_update`` is called after every optimizer step, such as for an average of the weights."""

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
        self.pool = ThreadPoolExecutor(_SCORING_THREADS)
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay)

    def round(self) -> float:
        """Sample, score, and learn; return the mean reward."""
        settings, batches, scores = self.settings, [], []
        order = torch.randperm(len(self.prompts), generator=self.generator)[: settings.prompts_per_round].tolist()
        prompts = [self.prompts[place] for place in order for _ in range(settings.group_size)]
        for start in range(0, len(prompts), settings.batch_size):
            part = prompts[start : start + settings.batch_size]
            batch, final = self.sample([prompt.text for prompt in part])
            batches.append(batch)
            scores.append(self.pool.submit(self.reward, self.decode(final), part))
        rewards = torch.cat([score.result() for score in scores])
        advantages = self.advantages(rewards)
        rows = self.trained_rows(advantages)
        self.learn(Trajectories.joined(batches)[rows], advantages[rows])
        return float(rewards.mean())

    def advantages(self, rewards: Tensor) -> Tensor:
        """Return rewards less their prompt's mean, over the standard deviation of all of them, in float64."""
        rewards = rewards.double()
        groups = rewards.view(-1, self.settings.group_size)
        centered = (groups - groups.mean(1, keepdim=True)).flatten()
        return centered / (rewards.std(correction=0) + 1e-4)

    def trained_rows(self, advantages: Tensor) -> Tensor:
        """Return the rows with an advantage, and random others until they divide into the batches."""
        trained, batches = advantages != 0, self.settings.batches
        count = int(trained.sum())
        if count % batches or not count:
            dropped = (~trained).nonzero()[:, 0]
            order = torch.randperm(len(dropped), generator=self.generator)
            trained[dropped[order[: batches - count % batches]]] = True
        return trained.nonzero()[:, 0]

    @torch.no_grad()
    def sample(self, texts: list[str], noises: Iterator[Tensor] | None = None) -> tuple[Trajectories, Tensor]:
        """Sample one batch; return its trajectories and final latents.

        ``noises`` are the first latents and those of the noisy steps, drawn where not given.
        """
        noises = noises or self._drawn(len(texts))
        window, (context, pooled) = self._window(), self.encode(texts)
        x = next(noises)
        states, log_probs = [x] if window.start == 0 else [], []
        for i in range(len(self.settings.sigmas)):
            step = torch.full((len(x),), i)
            velocity = self.velocity(x, step, context, pooled)
            if i in window:
                mean, std = self.move(x, velocity, step)
                x = mean + std * next(noises)
                log_probs.append(log_probability(x, mean, std))
            else:
                x = x + velocity * (self.sigmas[i + 1] - self.sigmas[i])
            if window.start - 1 <= i < window.stop:
                states.append(x)
        steps = torch.tensor(window).expand(len(x), -1)
        return Trajectories(steps, torch.stack(states, 1), torch.stack(log_probs, 1), context, pooled), x

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images (B, 3, H, W) in [0, 1]."""
        config = self.pipe.vae.config
        with self._mixed_precision():
            images = self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def learn(self, samples: Trajectories, advantages: Tensor) -> None:
        """Make the two optimizer steps of a round, each the mean loss of half of the batches and of all noisy steps."""
        batches, count = self.settings.batches, samples.steps.shape[1]
        size = len(samples) // batches
        for number in range(batches):
            rows = slice(number * size, (number + 1) * size)
            for j in range(count):
                loss = self.loss(samples[rows], advantages[rows], j)
                torch.autograd.backward(loss / (batches // 2 * count))
            if (number + 1) % (batches // 2) == 0:
                nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.after_update()

    def loss(self, samples: Trajectories, advantages: Tensor, j: int) -> Tensor:
        """Compute PPO's clipped surrogate of the noisy step j, a mean over samples."""
        advantages = advantages.clamp(-_LARGEST_ADVANTAGE, _LARGEST_ADVANTAGE).float()
        ratio = (self.log_probs(samples, j) - samples.log_probs[:, j]).exp()
        clipped = ratio.clamp(1 - self.settings.clip_range, 1 + self.settings.clip_range)
        return torch.maximum(-advantages * ratio, -advantages * clipped).mean()

    def log_probs(self, samples: Trajectories, j: int) -> Tensor:
        """Compute the log-probabilities (B,) of the noisy step j under the current weights."""
        x, step = samples.states[:, j], samples.steps[:, j]
        mean, std = self.move(x, self.velocity(x, step, samples.context, samples.pooled), step)
        return log_probability(samples.states[:, j + 1], mean, std)

    def move(self, x: Tensor, velocity: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of noisy steps (B,)."""
        sigma, after = (self.sigmas[at].view(-1, *[1] * (x.ndim - 1)) for at in (step, step + 1))
        dt = after - sigma
        rate = self.settings.noise_level * (sigma / (1 - torch.where(sigma == 1, self.sigmas[1], sigma))).sqrt()
        pull = rate**2 / (2 * sigma)
        return x * (1 + pull * dt) + velocity * (1 + pull * (1 - sigma)) * dt, rate * (-dt).sqrt()

    def velocity(self, x: Tensor, step: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Run the transformer at steps (B,)."""
        with self._mixed_precision():
            velocity: Tensor = self.pipe.transformer(x, context, pooled, self.sigmas[step] * 1000, return_dict=False)[0]
        return velocity.float()

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings and pooled embeddings of texts, each of which is encoded once."""
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        longest = self.pipe.tokenizer_3.model_max_length
        options = {"do_classifier_free_guidance": False, "max_sequence_length": longest}
        context, _, pooled, _ = self.pipe.encode_prompt(list(distinct), None, None, **options)
        rows = torch.tensor([distinct[text] for text in texts])
        return context[rows], pooled[rows]

    def _window(self) -> range:
        """Draw the steps that are noisy and trained."""
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
