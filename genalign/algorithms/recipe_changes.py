"""Changes of any recipe: each takes a recipe, and returns it with one thing replaced. They nest."""

from __future__ import annotations

from dataclasses import replace

from genalign.algorithms.gradient_balance import GradientBalance
from genalign.algorithms.recipe import ElasticReset, Recalibration, Recipe
from genalign.algorithms.redraws import FurtherPrompts, MoreSamples
from genalign.algorithms.trajectory import PolicyGradient
from genalign.types import AnyCallable


def with_credit(recipe: Recipe, credit: AnyCallable) -> Recipe:
    """Replace the credit of a recipe, for example by ``credit.NormalizedSum`` or ``rewards.combine.EnsembleCredit``.

    Args:
        recipe: The recipe whose credit is replaced.
        credit: The rule from the scores of a round to advantages.
    """
    return replace(recipe, credit=credit)


def with_chi_squared(recipe: Recipe, sharpness: float) -> Recipe:
    """Replace the KL penalty of a recipe by a chi-squared penalty, which punishes large distances more.

    It is the regularizer of arXiv 2403.03185, per transition, see ``losses.chi_squared``. Use it where few transitions
    move far, which the mean of their KL hides.

    Args:
        recipe: A recipe that learns from stored steps, with a ``kl`` above 0.
        sharpness: The sharpness k: with 2 k KL about 1 at the largest KL per dimension that is acceptable.
    """
    if not isinstance(recipe.objective, PolicyGradient) or not recipe.objective.kl:
        raise ValueError("with_chi_squared needs a recipe with a KL penalty, such as flow_grpo: set its kl above 0")
    return replace(recipe, objective=replace(recipe.objective, kl_sharpness=sharpness))


def with_recalibration(recipe: Recipe, every: int = 1, step: float = 0.05) -> Recipe:
    """Recalibrate the noise levels of a recipe with a completion, such as ``dense_grpo``, as the policy moves.

    Args:
        recipe: The recipe. Its kernel, a ``FlowSDE``, ``DanceSDE`` or ``CalibratedSDE``, gives the first levels.
        every: The number of rounds between two moves of the levels.
        step: The move of a level, as a fraction of its first value.
    """
    return replace(recipe, recalibration=Recalibration(every, step))


def with_elastic_reset(recipe: Recipe, every: int = 15, decay: float = 0.95) -> Recipe:
    """Reset the weights to their average at intervals, against drift from the model that training began with.

    Args:
        recipe: The recipe.
        every: The number of rounds between two resets.
        decay: The decay of the average, per optimizer step.
    """
    return replace(recipe, reset=ElasticReset(every, decay))


def with_gradient_balance(recipe: Recipe, every: int = 10, decay: float = 0.7) -> Recipe:
    """Weigh the rewards of a recipe so that their gradients balance, in the form of MARBLE (arXiv 2605.06507).

    Use it where a weighted sum follows one of several rewards. Of the rewards' own weights only the signs matter. The
    step is taken with the sum of the rewards' credits times their factors; in between, the credits are weighted by the
    averaged weights. That step is the published sum of gradients where the loss is linear in the credit: as long as no
    ratio and no credit is clipped, and but for parts of a loss that do not depend on the credit, such as the pull of
    ``nft`` with a lag to the sampling weights.

    Args:
        recipe: The recipe, whose loss must not tie the samples of a group together.
        every: The number of updates between two in which every reward's own gradient is computed, at the cost of as
            many backward passes as there are rewards.
        decay: The fraction of the averaged weights that such an update keeps.
    """
    return replace(recipe, balance=GradientBalance(every, decay))


def with_further_prompts(recipe: Recipe, extra: float = 1.0) -> Recipe:
    """Replace groups without spread by further prompts in the same round (DAPO, arXiv 2503.14476, section 3.2).

    Use it where many groups get equal scores, such as with rewards that are right or wrong. What is dropped is billed,
    too; rewards in the log are those of the prompts that were drawn first.

    Args:
        recipe: The recipe.
        extra: The most further samples of a round, as a multiple of its own.
    """
    return replace(recipe, redraw=FurtherPrompts(extra))


def with_more_samples(recipe: Recipe, extra: float = 1.0) -> Recipe:
    """Replace groups without spread by more samples of the others, most where scores vary most.

    After the idea of Knapsack RL, see ``redraws.MoreSamples``. Groups become unequal. Use it where further prompts are
    as silent as the first, or the prompt set is small.

    Args:
        recipe: The recipe, whose loss must not tie the samples of a group together.
        extra: The most further samples of a round, as a multiple of its own.
    """
    return replace(recipe, redraw=MoreSamples(extra))
