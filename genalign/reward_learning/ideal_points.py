"""Preferences of people who differ, as distances to ideal points (PAL, arXiv 2406.08469).

K prototypical ideal points are shared by everyone, and a user is a mixture of them: K weights on the simplex. A new
user is fitted from few comparisons with all else frozen. The model reads the features of a frozen encoder.

N comparisons, D and E the widths of sample and prompt features, K prototypes, U users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.diffusion.noise import derived_seed
from genalign.reward_learning.fitting import FitSettings, Fitter

Score = Literal["angle", "distance"]


@dataclass(frozen=True)
class Comparisons:
    """N comparisons of two samples of one prompt by one annotator.

    Attributes:
        preferred: Features (N, D) of the samples that were preferred.
        rejected: Features (N, D) of the others.
        prompts: Features (N, E) of the prompts.
        annotators: The names (N) of who judged; each is a user of the model that is fitted.
    """

    preferred: Tensor
    rejected: Tensor
    prompts: Tensor
    annotators: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.preferred) == len(self.rejected) == len(self.prompts) == len(self.annotators):
            raise ValueError("comparisons have one preferred sample, rejected sample, prompt and annotator each")

    def __len__(self) -> int:
        return len(self.annotators)

    def rows(self, index: Sequence[int]) -> Comparisons:
        """Select the comparisons ``index``."""
        rows = torch.tensor(list(index), dtype=torch.long)
        names = tuple(self.annotators[row] for row in index)
        return Comparisons(self.preferred[rows], self.rejected[rows], self.prompts[rows], names)

    def split(self, fraction: float, seed: int) -> tuple[Comparisons, Comparisons]:
        """Split a ``fraction`` of each annotator's comparisons off, rounded down, drawn by ``seed``: (rest, these)."""
        rest, held_out = list[int](), list[int]()
        for annotator in dict.fromkeys(self.annotators):
            own = [row for row, name in enumerate(self.annotators) if name == annotator]
            generator = torch.Generator().manual_seed(derived_seed(seed, "held out", annotator))
            order = [own[place] for place in torch.randperm(len(own), generator=generator).tolist()]
            count = int(fraction * len(own))
            held_out += order[:count]
            rest += order[count:]
        return self.rows(sorted(rest)), self.rows(sorted(held_out))


@dataclass(frozen=True)
class IdealPointSettings:
    """The shape of an ``IdealPointModel``.

    Args:
        samples: Width D of the samples' features.
        prompts: Width E of the prompts' features.
        prototypes: Number K of prototypes.
        dimensions: Number of dimensions of the space of preferences.
        hidden: Width of the perceptrons' one hidden layer.
        score: "angle" is the cosine of a sample with its user's ideal point, whose prototypes are functions of the
            prompt (PAL-B); "distance" is minus the squared distance to ideal points that are the same for every prompt
            (PAL-A).
    """

    samples: int
    prompts: int
    prototypes: int = 4
    dimensions: int = 32
    hidden: int = 128
    score: Score = "angle"

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, not {self.score!r}")
        if min(self.samples, self.prompts, self.prototypes, self.dimensions, self.hidden) < 1:
            raise ValueError(f"widths and the number of prototypes must be at least 1, not {asdict(self)}")


class IdealPointModel(nn.Module):
    """A reward of (features of a sample, features of its prompt, mixture weights of a user).

    ``scale`` times the score is the logit of a preference. ``users`` are the names of the rows of ``mixture`` (U, K),
    whose softmax are the weights.
    """

    def __init__(self, settings: IdealPointSettings, users: Sequence[str] = ()) -> None:
        super().__init__()
        self.settings, self.users = settings, tuple(users)
        self.of_samples = _perceptron(settings.samples, settings)
        if settings.score == "angle":
            self.of_prompts = nn.ModuleList(_perceptron(settings.prompts, settings) for _ in range(settings.prototypes))
        else:
            self.points = nn.Parameter(torch.randn(settings.prototypes, settings.dimensions))
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.mixture = nn.Parameter(torch.randn(len(self.users), settings.prototypes))

    def forward(self, samples: Tensor, prompts: Tensor, weights: Tensor) -> Tensor:
        """Score samples (N, D) of prompts (N, E) for users of ``weights`` (N, K), as (N,); differentiable."""
        point = self.of_samples(samples)
        if self.settings.score == "angle":
            prototypes = torch.stack([of_prompts(prompts) for of_prompts in self.of_prompts], dim=1)
            ideal = torch.einsum("nk,nkd->nd", weights, prototypes)
            score = F.cosine_similarity(point, ideal, dim=1)
        else:
            score = -(point - weights @ self.points).square().sum(1)
        return self.log_scale.exp() * score

    def weights_of(self, users: Sequence[Mapping[str, float]]) -> Tensor:
        """Return the mixture weights (N, K) of users, each by the share of every name; none is the mean of all users.

        Raises ValueError for a user that was not fitted.
        """
        if unknown := sorted({name for shares in users for name in shares} - set(self.users)):
            raise ValueError(
                f"user {unknown[0]!r} is not known ({len(self.users)} others are): fit a few comparisons of this user"
                " with genalign learn-users --known FILE, or leave the user out for the mean of all"
            )
        places = {user: place for place, user in enumerate(self.users)}
        shares = torch.zeros(len(users), len(self.users))
        for row, names in enumerate(users):
            for name, share in names.items():
                shares[row, places[name]] = share
            if not names:
                shares[row] = 1.0
        return (shares / shares.sum(1, keepdim=True)).to(self.mixture.device) @ self.mixture.softmax(1)

    def margins(self, comparisons: Comparisons) -> Tensor:
        """Return the logits (N,) of the preferences: the preferred sample's reward less the rejected one's."""
        weights = self.weights_of([{annotator: 1.0} for annotator in comparisons.annotators])
        preferred = self(comparisons.preferred, comparisons.prompts, weights)
        margins: Tensor = preferred - self(comparisons.rejected, comparisons.prompts, weights)
        return margins

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the JSON values of a file."""
        return self.state_dict(), {"settings": asdict(self.settings), "users": list(self.users)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Restore the result of ``state``."""
        model = cls(IdealPointSettings(**meta["settings"]), meta["users"])
        model.load_state_dict(dict(tensors))
        return model


def _perceptron(width: int, settings: IdealPointSettings) -> nn.Sequential:
    hidden = nn.Linear(width, settings.hidden)
    return nn.Sequential(hidden, nn.GELU(), nn.Linear(settings.hidden, settings.dimensions))


@dataclass(frozen=True)
class PreferenceFit:
    """How a model is fitted to comparisons.

    Args:
        steps: Number of optimizer steps.
        batch_size: Largest number of comparisons in a step.
        learning_rate: Learning rate of AdamW; it falls linearly to a tenth.
        weight_decay: Weight decay of AdamW.
        seed: Seed of the first weights and of the batches.
    """

    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ValueError(f"steps, batch_size and learning_rate must be positive, not {self}")


def new_model(settings: IdealPointSettings, users: Sequence[str], seed: int) -> IdealPointModel:
    """Return an untrained model of these users, whose weights are drawn by ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "ideal points"))
        return IdealPointModel(settings, users)


def fit(model: IdealPointModel, comparisons: Comparisons, settings: PreferenceFit) -> Iterator[float]:
    """Fit prototypes, maps and users to comparisons by -log sigmoid of their margins, and yield the loss of each step.

    Raises ValueError without a comparison.
    """
    yield from _descend(model, dict(model.named_parameters()), comparisons, settings)


def with_new_users(model: IdealPointModel, comparisons: Comparisons, settings: PreferenceFit) -> IdealPointModel:
    """Return the model with the annotators of ``comparisons`` added as users, or refitted; all else is frozen.

    A user starts as the mean of the known users. Raises ValueError without a comparison.
    """
    added = [name for name in dict.fromkeys(comparisons.annotators) if name not in model.users]
    larger = IdealPointModel(model.settings, (*model.users, *added))
    state, mean = model.state_dict(), model.mixture.softmax(1).mean(0).log()
    mixtures = zip(model.users, state["mixture"], strict=True)
    rows = {user: row for user, row in mixtures if user not in comparisons.annotators}
    state["mixture"] = torch.stack([rows.get(user, mean) for user in larger.users])
    larger.load_state_dict(state)
    larger.requires_grad_(False)
    larger.mixture.requires_grad_(True)
    frozen = torch.tensor([user in rows for user in larger.users])
    only_new = lambda gradient: gradient.masked_fill(frozen[:, None].to(gradient.device), 0.0)  # noqa: E731
    larger.mixture.register_hook(only_new)  # type: ignore[no-untyped-call]  # torch has not typed it
    for _ in _descend(larger, {"mixture": larger.mixture}, comparisons, settings, weight_decay=0.0):
        pass
    return larger


def _descend(
    model: IdealPointModel,
    weights: Mapping[str, Tensor],
    comparisons: Comparisons,
    settings: PreferenceFit,
    weight_decay: float | None = None,
) -> Iterator[float]:
    if not len(comparisons):
        raise ValueError("there is no comparison to learn from")
    decay = settings.weight_decay if weight_decay is None else weight_decay
    fitter = Fitter(weights, FitSettings(settings.learning_rate, decay, clip=None), settings.steps)
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "comparisons"))
    for _ in range(settings.steps):
        drawn = torch.randperm(len(comparisons), generator=generator)[: settings.batch_size]
        loss = -F.logsigmoid(model.margins(comparisons.rows(drawn.tolist()))).mean()
        fitter.step(loss)
        yield float(loss.detach())


@torch.no_grad()
def accuracies(model: IdealPointModel, comparisons: Comparisons) -> dict[str, float]:
    """Return the share of comparisons that the model predicts, by annotator; a margin of 0 counts half."""
    if not len(comparisons):
        return {}
    margins = model.margins(comparisons)
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    rows: dict[str, list[int]] = {}
    for row, annotator in enumerate(comparisons.annotators):
        rows.setdefault(annotator, []).append(row)
    return {annotator: float(right[own].mean()) for annotator, own in rows.items()}
