"""What sampling, training and search cost: a ledger of calls, what each is worth, and a limit on the sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from genalign.types import Conditioning, NoiseLevel, Pipeline, Prompt, RewardFunction

FORWARD, DECODE = "forward", "decode"


def reward_call(name: str) -> str:
    """The ledger's name for scoring one sample by a reward."""
    return f"reward/{name}"


def backward(call: str) -> str:
    """The ledger's name for differentiating a call."""
    return f"{call} backward"


@dataclass
class Ledger:
    """Calls by name, each of a single sample: "forward" of the denoiser (two under guidance), "decode",
    "reward/NAME", and each of them followed by " backward" where a gradient went through."""

    counts: Counter[str] = field(default_factory=Counter)

    @property
    def forwards(self) -> int:
        """Denoiser evaluations of single samples, guidance twice."""
        return self.counts[FORWARD]

    @property
    def decodes(self) -> int:
        """Decoded samples."""
        return self.counts[DECODE]

    def bill(self, call: str, samples: int) -> None:
        """Count a call."""
        self.counts[call] += samples

    def watch(self, call: str, samples: int, result: Tensor) -> Tensor:
        """``result``, whose call is billed as differentiated once a gradient reaches it."""
        if isinstance(result, Tensor) and result.requires_grad:
            result.register_hook(lambda gradient: self.bill(backward(call), samples))  # type: ignore[no-untyped-call]
        return result

    def cost(self, prices: Mapping[str, float]) -> float:
        """Seconds, or whatever the prices are in. Raises ValueError for a call without a price."""
        if missing := [call for call, count in self.counts.items() if count and call not in prices]:
            raise ValueError(f"no price for {', '.join(sorted(missing))}: measure it by genalign prices")
        return sum(count * prices[call] for call, count in self.counts.items() if count)

    def since(self, earlier: Ledger) -> Ledger:
        """What came after ``earlier``, a copy of this ledger."""
        return Ledger(Counter({call: n - earlier.counts[call] for call, n in self.counts.items()}))

    def copy(self) -> Ledger:
        """As it is now."""
        return Ledger(Counter(self.counts))


class Metered:
    """A pipeline whose forwards and decodes are billed to ``ledger``; all else is the pipeline's own."""

    def __init__(self, pipeline: Pipeline, ledger: Ledger) -> None:
        self.pipeline, self.ledger = pipeline, ledger
        self.path, self.denoiser = pipeline.path, pipeline.denoiser
        self.encode, self.grid, self.level = pipeline.encode, pipeline.grid, pipeline.level
        self.initial_noise = pipeline.initial_noise

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """The network's output; twice the samples under guidance."""
        samples = len(x) * (2 if guidance > 1 else 1)
        self.ledger.bill(FORWARD, samples)
        return self.ledger.watch(FORWARD, samples, self.pipeline.predict(x, level, conditioning, guidance))

    def decode(self, latents: Tensor) -> Tensor:
        """Decoded samples."""
        self.ledger.bill(DECODE, len(latents))
        return self.ledger.watch(DECODE, len(latents), self.pipeline.decode(latents))


def metered_reward(name: str, function: RewardFunction, ledger: Ledger) -> RewardFunction:
    """The reward, billed to ``ledger`` whether or not it succeeds."""

    def call(samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        ledger.bill(reward_call(name), len(samples))
        return ledger.watch(reward_call(name), len(samples), function(samples, prompts))

    return call
