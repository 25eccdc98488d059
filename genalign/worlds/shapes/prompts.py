"""The prompt grammar of the shapes world, GenEval metadata, and the deterministic splits.

single_object  a circle                     6 prompts
two_object     a circle and a square       30
counting       three circles               18  (and "five circles", never trained)
colors         a red circle                60
position       a circle left of a square  120
color_attr     a red circle and a blue square  2700
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import permutations, product

from genalign.evaluation.geneval.grammar import (
    NUMBERS,
    color_attr,
    colors,
    counting,
    position,
    single_object,
    two_object,
)
from genalign.evaluation.geneval.vocabulary import RELATIONS as RELATIONS
from genalign.types import Prompt, PromptSet
from genalign.worlds.grammar import SUITES as SUITES
from genalign.worlds.grammar import digest, split
from genalign.worlds.shapes.geometry import PALETTE, SHAPES

_SHAPES, _COLORS = tuple(SHAPES), tuple(PALETTE)


def is_held_out_pair(shape: str, color: str) -> bool:
    """Whether the pair is held out: two colors of each shape are never drawn in training, in any scene."""
    return (_COLORS.index(color) - 3 * _SHAPES.index(shape)) % 10 in (0, 5)


@cache
def held_out_triples() -> frozenset[tuple[str, str, str]]:
    """Return the triples (first, relation, second) that are never trained: a fifth of all, by hash.

    Some are given back, so every ordered pair of shapes has a trained relation, and every relation at least 15
    trained triples.
    """
    pairs = list(permutations(_SHAPES, 2))
    held = {
        (first, relation, second)
        for (first, second), relation in product(pairs, RELATIONS)
        if digest(position(first, relation, second).text)[0] % 5 == 0
    }
    for first, second in pairs:
        if all((first, relation, second) in held for relation in RELATIONS):
            held.discard((first, RELATIONS[0], second))
    for relation in RELATIONS:
        excess = sorted(triple for triple in held if triple[1] == relation)
        held.difference_update(excess[len(pairs) - 15 :])
    return frozenset(held)


def _all_prompts() -> Iterable[tuple[Prompt, bool]]:
    """Every prompt of the six tasks, and whether it is held out."""
    for shape in _SHAPES:
        yield single_object(shape), False
    for i, k in permutations(range(6), 2):
        yield two_object(_SHAPES[i], _SHAPES[k]), (i - k) % 6 == 3
    for (i, shape), number in product(enumerate(_SHAPES), ("two", "three", "four")):
        yield counting(shape, number), (i + NUMBERS[number]) % 3 == 0
    for shape, color in product(_SHAPES, _COLORS):
        yield colors(shape, color), is_held_out_pair(shape, color)
    for (first, second), relation in product(permutations(_SHAPES, 2), RELATIONS):
        yield position(first, relation, second), (first, relation, second) in held_out_triples()
    for (first, second), (c1, c2) in product(permutations(_SHAPES, 2), permutations(_COLORS, 2)):
        held = is_held_out_pair(first, c1) or is_held_out_pair(second, c2)
        yield color_attr(first, c1, second, c2), held


@cache
def prompts(suite: str) -> PromptSet:
    """The prompts of a split, as ``grammar.split`` defines it; "len" is five of a kind."""
    return split(suite, _all_prompts(), [counting(shape, "five") for shape in _SHAPES])
