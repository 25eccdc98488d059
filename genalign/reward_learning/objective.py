"""What a reward network learns: the loss with its corrections and terms, and the judgments."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from genalign.reward_learning.encoding import ItemTokens
from genalign.reward_learning.examples import Examples
from genalign.reward_learning.label_noise import NoiseCorrection
from genalign.reward_learning.preference_losses import GradeLoss, PairLoss, PreferenceLoss
from genalign.reward_learning.regularizers import Centering, Disentangle, Regularizer, needs_pairs


@dataclass(frozen=True)
class RewardObjective:
    """What is minimized: a loss of preferences, as corrected for label noise, and terms beside it."""

    loss: PreferenceLoss
    noise: NoiseCorrection | None = None
    regularizers: Sequence[Regularizer] = ()
    disentangle: Disentangle | None = None

    def require_fit(self, data: Examples) -> None:
        """Raise ValueError where it cannot learn from ``data``, or its parts do not fit together."""
        name = type(self.loss).__name__
        learned = len(data.pairs) if isinstance(self.loss, PairLoss) else len(data.grades)
        if not learned:
            raise ValueError(
                f"{name} learns from judgments of the kind {' or '.join(self.loss.kinds)}, and there is none to train"
                " on: take a loss of the kinds that there are"
            )
        of_pairs = [*filter(None, [self.noise]), *(term for term in self.regularizers if needs_pairs(term))]
        if of_pairs and not isinstance(self.loss, PairLoss):
            raise ValueError(f"{type(of_pairs[0]).__name__} is of pairs, and {name} learns from grades: leave it out")
        if self.disentangle is not None and len(data.dimensions) > 1:
            raise ValueError(
                f"Disentangle is of one dimension, and there are {', '.join(data.dimensions)}: select one with"
                " dimensions"
            )

    @property
    def centered(self) -> bool:
        """Whether the scores of a prompt have an origin that members share: by ``Centering``, or by grades.

        Grades compare the items of different prompts, so what they leave open is one constant of a member: its
        level, which training measures (``PreferenceLoss.has_origin``).
        """
        return isinstance(self.loss, GradeLoss) or any(isinstance(term, Centering) for term in self.regularizers)

    @property
    def nuisances(self) -> tuple[str, ...]:
        """The names of the nuisances of ``disentangle``, in the order of their outputs."""
        return () if self.disentangle is None else tuple(self.disentangle.nuisances)


@dataclass(frozen=True)
class RewardData:
    """Training and held-out judgments; ``tokens`` has the items of training first, and then those held out."""

    training: Examples
    held_out: Examples
    tokens: ItemTokens

    def has_held_out(self, loss: PreferenceLoss) -> bool:
        """Return whether a judgment of the kinds of ``loss`` is held out, in a dimension that is learned."""
        held_out = self.held_out.pairs.preferred if isinstance(loss, PairLoss) else self.held_out.grades.values
        return not bool(held_out.isnan().all())

    def digest(self) -> str:
        """Return a hash of the items and of what was judged of them."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for item in part.items:
                digest.update(f"{item.digest}/{item.prompt.text}\n".encode())
            pairs, grades = part.pairs, part.grades
            for tensor in (pairs.rows, pairs.preferred, pairs.difference, grades.rows, grades.values):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def nothing_held_out(training: Examples) -> Examples:
    """Return examples of the same dimensions without items, pairs or grades."""
    return Examples((), training.dimensions, training.pairs.select([]), training.grades.select([]))
