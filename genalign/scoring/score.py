"""Calling users' rewards: several at once, failures turned into NaN and counted, wrong shapes refused."""

from __future__ import annotations

import inspect
import logging
import re
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genalign.runtime.distributed import current_gpu, use_gpu
from genalign.types import GroupReward, Prompt, RewardFunction

logger = logging.getLogger(__name__)

_OWN = [Path(__file__).parents[2] / name for name in ("genalign", "pipelines", "rewards")]
_INSTALLED = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
_STANDARD = Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class NamedReward:
    """A reward function with the name it is reported under and its weight in the sum; weight 0 only reports.

    ``score_batch``: the number of samples that are scored at once, for large networks; None for all. A reward that
    compares the samples of a group (``types.GroupReward``) must see them together, and takes none. A call that takes
    longer than ``timeout`` seconds has failed, and goes on in an abandoned thread; None waits for any call.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    score_batch: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.score_batch is not None and self.score_batch < 1:
            raise ValueError(f"score_batch of reward {self.name!r} must be at least 1 sample, not {self.score_batch}")
        if self.score_batch is not None and group_reward({self.name: self.function}):
            raise ValueError(
                f"reward {self.name!r} compares the samples of a prompt with each other, which score_batch would split:"
                " leave score_batch out"
            )
        if self.timeout is not None and not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"timeout of reward {self.name!r} must be positive, in seconds, not {self.timeout}; none waits for any"
                " call"
            )

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples as (B,), with a gradient where the function has one.

        Raises RewardError for another shape, or where the samples have a gradient and the function takes no such
        tensor, and whatever the function raises.
        """
        parts = self.parts(samples, prompts)
        try:
            return torch.cat([_of_shape(self.name, self.function(part, texts), len(part)) for part, texts in parts])
        except (RuntimeError, BufferError) as error:
            if not takes_no_gradient(error):
                raise
            raise RewardError(
                f"reward {self.name!r} has no gradient, which noise optimization, guided steering and recipes such as"
                f" draft follow: use another strategy or recipe, or torch operations in it ({described(error)})"
            ) from error

    def parts(self, samples: Tensor, prompts: Sequence[Prompt]) -> Iterator[tuple[Tensor, Sequence[Prompt]]]:
        """Yield samples and prompts in order, ``score_batch`` at a time."""
        size = self.score_batch or len(samples)
        for place, part in enumerate(torch.split(samples, size)):
            yield part, prompts[place * size : place * size + len(part)]


def parts(part: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Yield a part of a configuration, such as a reward, and all that it holds at any depth, by their places.

    The fields of dataclasses, the items of mappings, lists and tuples, and what functions wrap are searched: what a
    reward of other rewards holds is found if it is a dataclass.
    """
    if callable(part):
        part = inspect.unwrap(part)
    yield place, part
    inner: Mapping[Any, object] = {}
    if isinstance(part, Mapping):
        inner = part
    elif isinstance(part, list | tuple):
        inner = dict(enumerate(part))
    elif is_dataclass(part) and not isinstance(part, type):
        inner = vars(part)
    for name, value in inner.items():
        yield from parts(value, f"{place}.{name}" if place else str(name))


def group_reward(rewards: Mapping[str, object]) -> str | None:
    """Return the name of the first reward that is, or holds, a ``types.GroupReward``; None if there is none."""
    for name, reward in rewards.items():
        if any(isinstance(part, GroupReward) for _, part in parts(reward)):
            return name
    return None


def named(
    reward: RewardFunction | NamedReward | Mapping[str, RewardFunction] | Sequence[NamedReward],
) -> Sequence[NamedReward]:
    """Name one function "reward", or functions by their keys; named rewards are returned as they are."""
    if isinstance(reward, NamedReward):
        return [reward]
    if isinstance(reward, Mapping):
        return [NamedReward(name, function) for name, function in reward.items()]
    return [NamedReward("reward", reward)] if callable(reward) else reward


class RewardError(RuntimeError):
    """A reward cannot be used, or failed too often to go on."""


@torch.no_grad()
def score(rewards: Sequence[NamedReward], samples: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Score samples by K rewards as (B, K), float32 on the CPU; NaN where a reward fails or a score is not finite.

    A reward that raises or times out is called once more. If it raises again and has a ``score_batch``, so its
    batches may be split, the halves are scored: a sample on which it fails loses only its own score.

    Raises RewardError for a result that is not of shape (B,): that is a bug in the reward, not a failure.
    """
    columns = [[_score_part(reward, *part) for part in reward.parts(samples, prompts)] for reward in rewards]
    return torch.stack([torch.cat(column) for column in columns], dim=1)


def takes_no_gradient(error: Exception) -> bool:
    """Whether an error says that NumPy, DLPack or the like takes no tensor that requires a gradient."""
    return bool(re.search(r"requires? grad", str(error)))


def require_gradient(member: object, samples: Tensor, scores: Tensor) -> Tensor:
    """Return the scores of a member of a combination of rewards.

    Raises ValueError, by its name, where the samples require a gradient and the scores have none: the member would be a
    constant, and the combination's gradient that of the other members alone.
    """
    if samples.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
        own = [part for _, part in parts(member) if callable(part)]
        name = " of ".join(getattr(part, "__name__", type(part).__name__) for part in own)
        raise ValueError(
            f"{name}, a part of a combination of rewards, has no gradient: make it a reward of its own with weight 0,"
            " or choose what needs none, such as the recipe flow_grpo"
        )
    return scores


def described(error: BaseException) -> str:
    """What a reward raised, and where: "KeyError: 'color' (my_rewards.py:12)".

    The place is the last line of the user's own files; without any, of the package that genalign called.
    """
    own, installed = [], []
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if any(file.is_relative_to(folder) for folder in _OWN) or frame.filename.startswith("<frozen"):
            continue
        packages = next((folder for folder in _INSTALLED if file.is_relative_to(folder)), None)
        if packages:
            installed.append((file.relative_to(packages), frame.lineno))
        elif not file.is_relative_to(_STANDARD):
            own.append((Path(file.name), frame.lineno))
    places = own or [place for place in installed if place[0].parts[0] == installed[0][0].parts[0]]
    place = f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    return f"{type(error).__name__}: {error}{place}"


def _score_part(reward: NamedReward, samples: Tensor, prompts: Sequence[Prompt], retries: int = 1) -> Tensor:
    """Score one batch as (B,), float32 on the CPU; NaN where a score is not finite, or the last retry failed."""
    count = len(samples)
    try:
        result = _call_within(reward.timeout, lambda: reward.function(samples, prompts))
    except Exception as error:  # whatever a user's reward raises must not lose the run
        failure = f"reward {reward.name!r} raised {described(error)}"
        if retries:
            logger.warning("%s; calling it again", failure, exc_info=logger.isEnabledFor(logging.DEBUG))
            return _score_part(reward, samples, prompts, retries - 1)
        if reward.score_batch is None or count == 1 or isinstance(error, TimeoutError):
            logger.warning("%s; %d scores are NaN", failure, count)
            return torch.full((count,), torch.nan)
        halves = slice(count // 2), slice(count // 2, None)
        return torch.cat([_score_part(reward, samples[half], prompts[half], retries=0) for half in halves])
    scores = _of_shape(reward.name, result, count).detach().float().cpu()
    return torch.where(scores.isfinite(), scores, torch.nan)


def _call_within(seconds: float | None, call: Callable[[], object]) -> object:
    """Return the result of ``call``. Raises TimeoutError after ``seconds``; its thread goes on then."""
    if seconds is None:
        return call()
    answer: Future[object] = Future()
    gpu = current_gpu()
    stream = None if gpu is None else torch.cuda.current_stream()

    def work() -> None:
        try:
            use_gpu(gpu)
            with torch.no_grad(), torch.cuda.stream(stream):  # a thread has a mode and a stream of its own
                answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="genalign-reward", daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no scores within {seconds:g} s")
    return answer.result()


def _of_shape(name: str, column: object, count: int) -> Tensor:
    if inspect.iscoroutine(column):
        column.close()  # it was never awaited, which Python would warn of
        raise RewardError(f"reward {name!r} is an async function: wrap it in rewards.adapters.Adapted")
    if not isinstance(column, Tensor):
        raise RewardError(f"reward {name!r} returned {type(column).__name__}: return a tensor of shape (B,)")
    if column.shape != (count,):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(column.shape)} for {count} samples: return one score per sample,"
            f" a tensor of shape ({count},)"
        )
    if column.is_complex() or column.is_meta:
        kind = "complex numbers" if column.is_complex() else "a tensor without values, on the meta device"
        advice = "return real ones" if column.is_complex() else "load its weights on a real device"
        raise RewardError(f"reward {name!r} returned {kind}: {advice}")
    return column


def probe(rewards: Sequence[NamedReward], samples: Tensor, prompts: Sequence[Prompt]) -> None:
    """Score one batch before training starts, to find a broken reward early.

    Raises RewardError, with the cause and what to return instead, where a reward is not callable, raises, returns
    another shape, or scores nothing.
    """
    for reward in rewards:
        if not callable(reward.function):
            raise RewardError(f"reward {reward.name!r} is a {type(reward.function).__name__}: give something callable")
        try:
            with torch.no_grad():
                scores = reward(samples, prompts)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"reward {reward.name!r} failed on a first batch: {described(error)}") from error
        if not bool(scores.isfinite().any()):
            raise RewardError(f"reward {reward.name!r} scored none of {len(samples)} first samples: all are NaN")


@dataclass
class RewardMonitor:
    """Stops a run whose rewards fail, or give no credit, for too long.

    At most ``max_failed_fraction`` of a round's samples may lack a score: failures depend on the sample, so a policy
    trained only on the others learns to provoke them. ``rounds_without_credit`` counts the latest consecutive rounds in
    which no sample had credit, whatever their scores; at ``max_rounds_without_credit`` the run stops (None: never).
    """

    max_failed_fraction: float = 0.05
    max_rounds_without_credit: int | None = 20
    rounds_without_credit: int = 0

    def compare(self, rewards: Sequence[NamedReward], scores_BK: Tensor) -> None:
        """Warn if one reward's spread exceeds another's by far in the weighted sum; meant to be called once."""
        spreads = {
            reward.name: abs(reward.weight) * float(column[~column.isnan()].std(correction=0))
            for reward, column in zip(rewards, scores_BK.unbind(1), strict=True)
            if reward.weight and not bool(column.isnan().all())
        }
        moving = {name: spread for name, spread in spreads.items() if spread > 0}
        if len(moving) < 2:
            return
        large, small = max(moving, key=moving.__getitem__), min(moving, key=moving.__getitem__)
        if (ratio := moving[large] / moving[small]) > 20:
            logger.warning(
                f"in the weighted sum, reward {large!r} varies {ratio:.0f} times as much as {small!r}, which will"
                " hardly count: lower the first weight, or normalize each reward by itself (credit.NormalizedSum)"
            )

    def see_scores(self, scores_BK: Tensor) -> None:
        """Check the scores of a round. Raises RewardError where too many are missing."""
        failed = float(scores_BK.isnan().any(dim=1).float().mean())
        if failed > self.max_failed_fraction:
            raise RewardError(
                f"{failed:.0%} of this round's samples could not be scored (training.max_failed_fraction is"
                f" {self.max_failed_fraction:.0%}): a reward raised, as a warning above says, or it returned NaN, or"
                " the samples are not finite. Fix the cause, then resume from the last checkpoint"
            )

    def see_round(self, without_credit: bool) -> None:
        """Count a round without credit. Warns of the first in a row, and raises RewardError at the limit."""
        self.rounds_without_credit = self.rounds_without_credit + 1 if without_credit else 0
        if self.rounds_without_credit == 1:
            logger.warning("no sample of this round has credit, as where all scores are equal: nothing to learn from")
        if self.max_rounds_without_credit is not None and self.rounds_without_credit >= self.max_rounds_without_credit:
            raise RewardError(
                f"for {self.rounds_without_credit} rounds no sample had credit (training.max_rounds_without_credit), as"
                " where the scores of every group are equal: use a reward with partial credit, larger groups or more"
                " noise"
            )


def combine(scores_BK: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute the weighted sum (B,) of K rewards; NaN where a reward of non-zero weight is NaN.

    A reward of weight 0 is only reported: it changes nothing, NaN or not.
    """
    weight = weights_of_columns(scores_BK, weights)
    used = weight != 0
    return (scores_BK.double()[:, used] * weight[used]).sum(1).float()


def weights_of_columns(scores_BK: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weights (K,) of K rewards in float64. Raises ValueError unless there is a finite one for each."""
    if scores_BK.ndim != 2 or scores_BK.shape[1] != len(weights):
        raise ValueError(f"scores must be (B, K) with one weight per column, not {tuple(scores_BK.shape)}, {weights}")
    weight = torch.tensor(weights, dtype=torch.float64, device=scores_BK.device)
    if not bool(weight.isfinite().all()):
        raise ValueError(f"weights must be finite, not {weights}")
    return weight
