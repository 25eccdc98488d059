"""The cost of sampling, training and search: a ledger of calls, prices per call, and a budget."""

from __future__ import annotations

import functools
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from genalign.scoring.score import NamedReward, RewardError
from genalign.types import Conditioning, Grid, NoiseLevel, Pipeline, Prompt, RewardFunction

NFE, DECODE = "nfe", "decode"


def reward_call(name: str) -> str:
    """Return the ledger's name for scoring one sample by a reward."""
    return f"reward/{name}"


def backward_call(call: str) -> str:
    """Return the ledger's name for the backward pass of a call."""
    return f"{call} backward"


@dataclass
class Ledger:
    """The number of calls by name, on single samples.

    The names are "nfe" of the denoiser (two under guidance), "decode" and "reward/NAME", and each of them
    followed by " backward" where a gradient went through.
    """

    counts: Counter[str] = field(default_factory=Counter)

    @property
    def nfe(self) -> int:
        """The number of denoiser evaluations (NFE) of single samples; guidance counts twice."""
        return self.counts[NFE]

    def record(self, call: str, samples: int) -> None:
        """Count one call on ``samples`` samples."""
        self.counts[call] += samples

    def metered(self, call: str, samples: int, function: Callable[[], Tensor]) -> Tensor:
        """Count a call even if it fails, and return its result; a gradient that reaches it counts as backward."""
        self.record(call, samples)
        result = function()
        if isinstance(result, Tensor) and result.requires_grad:
            hook = lambda gradient: self.record(backward_call(call), samples)  # noqa: E731
            result.register_hook(hook)  # type: ignore[no-untyped-call]  # torch has not typed it
        return result

    def cost(self, prices: Mapping[str, float]) -> float:
        """Sum the prices of all calls, in the unit of ``prices``. Raises ValueError for a call without a price."""
        if missing := [call for call, count in self.counts.items() if count and call not in prices]:
            option = " --gradients true" if any(call.endswith(backward_call("")) for call in missing) else ""
            raise ValueError(f"no price for {', '.join(sorted(missing))}: measure it with: genalign prices{option}")
        return sum(count * prices[call] for call, count in self.counts.items() if count)

    def since(self, earlier: Ledger) -> Ledger:
        """Return the calls since ``earlier``, a copy of this ledger."""
        return Ledger(Counter({call: n - earlier.counts[call] for call, n in self.counts.items()}))

    def add(self, calls: Iterable[Mapping[str, int]], before: Ledger) -> None:
        """Set the counts to ``before`` plus the calls of all ranks since then, including this one."""
        self.counts = Counter(before.counts)
        for own in calls:
            self.counts.update(own)

    def copy(self) -> Ledger:
        return Ledger(Counter(self.counts))


class Metered:
    """A pipeline whose denoiser and decoder calls are counted in ``ledger``; everything else is the pipeline's own."""

    def __init__(self, pipeline: Pipeline, ledger: Ledger) -> None:
        self.pipeline, self.ledger = pipeline, ledger
        self.path, self.denoiser, self.compute_dtype = pipeline.path, pipeline.denoiser, pipeline.compute_dtype
        self.encode, self.grid, self.level = pipeline.encode, pipeline.grid, pipeline.level
        self.guidance_scale, self.initial_noise = pipeline.guidance_scale, pipeline.initial_noise

    def predict(self, x: Tensor, level: NoiseLevel, conditioning: Conditioning, guidance: float) -> Tensor:
        """Return the network's output, and count each sample once, or twice under guidance."""
        samples = len(x) * (2 if guidance > 1 else 1)
        return self.ledger.metered(NFE, samples, lambda: self.pipeline.predict(x, level, conditioning, guidance))

    def decode(self, latents: Tensor) -> Tensor:
        return self.ledger.metered(DECODE, len(latents), lambda: self.pipeline.decode(latents))


def metered_reward(name: str, function: RewardFunction, ledger: Ledger) -> RewardFunction:
    """Wrap a reward so that each call is counted in ``ledger``."""
    return lambda samples, prompts: ledger.metered(reward_call(name), len(samples), lambda: function(samples, prompts))


def metered_rewards(rewards: Sequence[NamedReward], ledger: Ledger) -> list[NamedReward]:
    """Wrap several rewards, under the same names and weights."""
    return [replace(reward, function=metered_reward(reward.name, reward.function, ledger)) for reward in rewards]


@dataclass(frozen=True)
class Budget:
    """A limit for each prompt, in exactly one unit.

    The unit is ``nfe`` of the denoiser (guidance counts twice), priced ``cost``, or wall-clock ``seconds``. ``prices``
    are per call on one sample, from ``measure_prices`` or your own; for a budget in seconds without them they are
    measured first.

    Args:
        nfe: Limit in denoiser evaluations of one sample; guidance counts twice.
        cost: Limit in the unit of ``prices``.
        seconds: Limit in seconds of wall-clock time.
        prices: Cost of each call on one sample, by the call's name; null measures them where they are needed.
    """

    nfe: float | None = None
    cost: float | None = None
    seconds: float | None = None
    prices: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.nfe, self.cost, self.seconds) if limit is not None]
        if len(limits) != 1 or not limits[0] > 0:
            raise ValueError(f"give one positive limit, nfe, cost or seconds, not {self}")
        if self.cost is not None and self.prices is None:
            raise ValueError(
                "a budget in priced cost needs prices: give those that genalign prices prints, or your own"
            )

    @property
    def limit(self) -> float:
        """The limit for one prompt, in this budget's unit."""
        return next(limit for limit in (self.nfe, self.cost, self.seconds) if limit is not None)

    def of(self, limit: float) -> Budget:
        """Return this budget with another limit."""
        if self.nfe is not None:
            return replace(self, nfe=limit)
        return replace(self, cost=limit) if self.cost is not None else replace(self, seconds=limit)

    def remaining(self, ledger: Ledger, prompts: int) -> Budget:
        """Return this budget less the mean cost of a prompt so far. Raises ValueError if nothing is left."""
        left = self.limit - self.spent(ledger) / prompts
        if left <= 0:
            raise ValueError(f"nothing is left of the budget of {self.limit:.4g} for each prompt: raise the budget")
        return self.of(left)

    def spent(self, ledger: Ledger) -> float:
        """Convert a ledger to this budget's unit. Raises ValueError for a call without a price."""
        if self.nfe is not None:
            return ledger.nfe + 2 * ledger.counts[backward_call(NFE)]
        if self.prices is None:
            raise ValueError("this budget has no prices yet: measure them")
        return ledger.cost(self.prices)


def peak_memory() -> int:
    """Return the peak memory so far in bytes: of the CUDA device if there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_prices(
    pipeline: Pipeline,
    rewards: Sequence[NamedReward],
    prompts: Sequence[Prompt],
    grid: Grid,
    guidance: float = 1.0,
    repeats: int = 5,
    gradients: bool = False,
) -> dict[str, float]:
    """Measure the median seconds of one sample's forward, decode and reward calls, after a call to warm up.

    Args:
        pipeline: the model.
        rewards: the rewards to price.
        prompts: a batch has one sample for each of them.
        grid: its first step is priced.
        guidance: classifier-free guidance, which doubles the evaluations above 1.
        repeats: how many calls the median is of.
        gradients: price the backward pass of every call that has one, to its input, too.
    """
    conditioning = pipeline.encode([prompt.text for prompt in prompts])
    x = pipeline.initial_noise(list(range(len(prompts))))
    with torch.no_grad():
        samples = pipeline.decode(x)
    calls: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        NFE: (lambda latents: pipeline.predict(latents, grid[0], conditioning, guidance), x),
        DECODE: (pipeline.decode, x),
    }
    for reward in rewards:
        calls[reward_call(reward.name)] = (functools.partial(reward, prompts=prompts), samples)
    prices = {}
    for name, (call, inputs) in calls.items():
        evaluations = len(x) * (2 if name == NFE and guidance > 1 else 1)
        with torch.no_grad():
            times = [_seconds(functools.partial(call, inputs)) for _ in range(repeats + 1)]
        prices[name] = statistics.median(times[1:]) / evaluations
        if gradients and (backward := _backward_seconds(call, inputs, repeats)) is not None:
            prices[backward_call(name)] = backward / evaluations
    return prices


def _seconds(call: Callable[[], Tensor]) -> float:
    """Return the seconds of one call, on a GPU until its result is there."""
    started = time.perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - started


@torch.enable_grad()
def _backward_seconds(call: Callable[[Tensor], Tensor], inputs: Tensor, repeats: int) -> float | None:
    """Return the median seconds of the backward pass of ``call`` to ``inputs``; None for a call without a gradient."""
    times = []
    for _ in range(repeats + 1):
        variable = inputs.detach().requires_grad_(True)
        try:
            result = call(variable)
        except RewardError:  # the reward takes no samples that have a gradient
            return None
        if not result.requires_grad:
            return None
        if result.is_cuda:  # the forward pass is not part of the time
            torch.cuda.synchronize(result.device)
        times.append(_seconds(functools.partial(_gradient, result.float().sum(), variable)))
    return statistics.median(times[1:])


def _gradient(total: Tensor, variable: Tensor) -> Tensor:
    return torch.autograd.grad(total, variable)[0]
