"""Changes that apply to any recipe: each takes a recipe and returns it with one part replaced. They nest."""

from __future__ import annotations

from dataclasses import replace

from genalign.algorithms.gradient_balance import GradientBalance
from genalign.algorithms.recipe import ElasticReset, Recalibration, Recipe
from genalign.algorithms.redraws import AdaptiveGroupSize, DynamicSampling
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
    """Replace the KL penalty of a recipe by a chi-squared penalty, which penalizes large distances more.

    It is the regularizer of arXiv 2403.03185, per transition, see ``losses.chi_squared``. Use it where a few
    transitions move far, which the mean KL hides.

    Args:
        recipe: A recipe that learns from stored steps, with a ``kl`` above 0.
        sharpness: The sharpness k, such that 2 k KL is about 1 at the largest acceptable KL per dimension.
    """
    if not isinstance(recipe.objective, PolicyGradient) or not recipe.objective.kl:
        raise ValueError("with_chi_squared needs a recipe with a KL penalty, such as flow_grpo: set its kl above 0")
    return replace(recipe, objective=replace(recipe.objective, kl_sharpness=sharpness))


def with_recalibration(recipe: Recipe, every: int = 1, step: float = 0.05) -> Recipe:
    """Recalibrate the noise levels of a recipe with a completion, such as ``dense_grpo``, as the policy moves.

    Args:
        recipe: The recipe. Its kernel, a ``FlowSDE``, ``DanceSDE`` or ``CalibratedSDE``, gives the initial levels.
        every: The number of rounds between two recalibrations.
        step: The change of a level, as a fraction of its initial value.
    """
    return replace(recipe, recalibration=Recalibration(every, step))


def with_elastic_reset(recipe: Recipe, every: int = 15, decay: float = 0.95) -> Recipe:
    """Reset the weights to their average at intervals, to limit drift from the initial model.

    Args:
        recipe: The recipe.
        every: The number of rounds between two resets.
        decay: The decay of the average, per optimizer step.
    """
    return replace(recipe, reset=ElasticReset(every, decay))


def with_gradient_balance(recipe: Recipe, every: int = 10, decay: float = 0.7) -> Recipe:
    """Weigh the rewards of a recipe so that their gradients balance, as in MARBLE (arXiv 2605.06507).

    Use it where one of several rewards dominates a weighted sum. Of the rewards' own weights only the signs matter. The
    step is taken with the sum of the rewards' credits times their factors; in between, the credits are weighted by the
    averaged weights. That step is the published sum of gradients where the loss is linear in the credit: as long as no
    ratio and no credit is clipped, and except for parts of a loss that do not depend on the credit, such as the pull of
    ``nft`` with a lag toward the sampling weights.

    Args:
        recipe: The recipe, whose loss must not couple the samples of a group.
        every: The number of updates from one computation of every reward's own gradient to the next. It costs as many
            backward passes as there are rewards.
        decay: The decay of the averaged weights at such an update.
    """
    return replace(recipe, balance=GradientBalance(every, decay))


def with_dynamic_sampling(recipe: Recipe, extra: float = 1.0) -> Recipe:
    """Replace zero-variance groups by further prompts in the same round (DAPO, arXiv 2503.14476, section 3.2).

    Use it where many groups have equal scores, as with binary rewards. Dropped samples count toward NFE, and the log
    shows the rewards of the prompts that were drawn first.

    Args:
        recipe: The recipe.
        extra: The largest number of further samples per round, as a multiple of the round's size.
    """
    return replace(recipe, redraw=DynamicSampling(extra))


def with_adaptive_group_size(recipe: Recipe, extra: float = 1.0) -> Recipe:
    """Replace zero-variance groups by more samples of the others, most where scores vary most.

    After the idea of Knapsack RL, see ``redraws.AdaptiveGroupSize``. Groups become unequal. Use it where the groups of
    further prompts would have zero variance as often, or the prompt set is small.

    Args:
        recipe: The recipe, whose loss must not couple the samples of a group.
        extra: The largest number of further samples per round, as a multiple of the round's size.
    """
    return replace(recipe, redraw=AdaptiveGroupSize(extra))
