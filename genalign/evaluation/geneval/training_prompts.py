"""Training prompts in GenEval's grammar: compositions of its classes and colors that its own prompts do not contain."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

from genalign.evaluation.geneval.metadata import Clause, PromptSpec
from genalign.evaluation.geneval.vocabulary import COLORS, OBJECTS, RELATIONS
from genalign.types import Prompt, PromptSet

OPENINGS = ("a photo of", "a picture of", "an image showing", "a snapshot of")
TASKS = ("two_object", "counting", "colors", "position", "color_attr")
"""The tasks with compositions to train on: GenEval's own prompts contain every single object."""

_MIRRORED = {"right of": "left of", "below": "above"}
_COUNTS = (2, 3, 4)
_Space = tuple[int, Callable[[int], PromptSpec]]  # the number of a task's compositions, and each by its number


def composition(spec: PromptSpec) -> str:
    """Return the content of a prompt in a canonical form that does not depend on its wording.

    It is the same for "a dog and a cat" and "a cat and a dog", and for a dog left of a cat and a cat right of a dog.
    """
    objects = sorted([clause.name, clause.count, clause.color or ""] for clause in spec.include)
    relations = []
    for clause in spec.include:
        if clause.relation is not None and clause.target is not None:
            pair = [clause.name, spec.include[clause.target].name]
            mirrored = clause.relation in _MIRRORED
            relations.append([_MIRRORED.get(clause.relation, clause.relation), *(pair[::-1] if mirrored else pair)])
    return json.dumps([objects, sorted(relations)])


def composition_hash(spec: PromptSpec) -> str:
    """Eight hexadecimal characters of a composition."""
    return hashlib.sha256(composition(spec).encode()).hexdigest()[:8]


@cache
def official_compositions() -> frozenset[str]:
    """Read the ``composition_hash`` of GenEval's 553 prompts, which this package does not contain themselves."""
    return frozenset(files("genalign.assets").joinpath("geneval-compositions.txt").read_text().split())


def training_prompts(
    per_task: int | Mapping[str, int],
    seed: int = 0,
    *,
    objects: Sequence[str] = OBJECTS,
    held_out: Iterable[Prompt] = (),
) -> PromptSet:
    """Draw prompts of distinct compositions that no prompt of GenEval has.

    As in GenEval, people have no color.

    Args:
        per_task: Prompts of each of ``TASKS``, or by task; a task with fewer compositions gets all of them.
        seed: Seed of the draws.
        objects: Classes to combine. Leave some out to measure generalization to unseen ones.
        held_out: Prompts whose compositions are left out as well.

    Raises:
        ValueError: an amount below 1, or a task without a composition to train on.
    """
    counts = per_task if isinstance(per_task, Mapping) else dict.fromkeys(TASKS, per_task)
    for task, count in counts.items():
        if count < 1:
            raise ValueError(f"ask for at least 1 prompt of {task}, or leave the task out")
    spaces = _composition_spaces(objects)
    if unknown := set(counts) - set(spaces):
        raise ValueError(f"no task {', '.join(sorted(unknown))} to train on: choose from {', '.join(spaces)}")

    excluded = official_compositions() | {composition_hash(PromptSpec.from_prompt(prompt)) for prompt in held_out}
    prompts: list[Prompt] = []
    for task, count in counts.items():
        drawn = list(_draw(spaces[task], count, excluded, random.Random(f"{seed}/{task}")))
        if not drawn:
            raise ValueError(f"there is no {task} composition to train on: give more objects")
        prompts += drawn
    return PromptSet("geneval-train", tuple(prompts))


def _draw(space: _Space, count: int, excluded: frozenset[str], rng: random.Random) -> Iterator[Prompt]:
    """Draw up to ``count`` prompts of distinct compositions, in random order and after random ``OPENINGS``."""
    size, build = space
    seen, tried = set(excluded), set[int]()
    while count > 0 and len(tried) < size:
        number = rng.randrange(size)
        if number in tried:
            continue
        tried.add(number)
        spec = build(number)
        if (key := composition_hash(spec)) not in seen:
            seen.add(key)
            count -= 1
            yield spec.to_prompt(rng.choice(OPENINGS))


def _composition_spaces(objects: Sequence[str]) -> dict[str, _Space]:
    things = [name for name in objects if name != "person"]
    n, t, c, r = len(objects), len(things), len(COLORS), len(RELATIONS)

    def two_object(number: int) -> PromptSpec:
        first, second = _ordered_pair(objects, number)
        return PromptSpec("two_object", (Clause(first), Clause(second)))

    def counting(number: int) -> PromptSpec:
        name, count = objects[number // len(_COUNTS)], _COUNTS[number % len(_COUNTS)]
        return PromptSpec("counting", (Clause(name, count),), (Clause(name, count + 1),))

    def one_color(number: int) -> PromptSpec:
        return PromptSpec("colors", (Clause(things[number // c], color=COLORS[number % c]),))

    def position(number: int) -> PromptSpec:
        first, second = _ordered_pair(objects, number // r)
        return PromptSpec("position", (Clause(second), Clause(first, relation=RELATIONS[number % r], target=0)))

    def color_attr(number: int) -> PromptSpec:
        names = _ordered_pair(things, number // (c * (c - 1)))
        shades = _ordered_pair(COLORS, number % (c * (c - 1)))
        return PromptSpec("color_attr", (Clause(names[0], color=shades[0]), Clause(names[1], color=shades[1])))

    return {
        "two_object": (n * (n - 1), two_object),
        "counting": (n * len(_COUNTS), counting),
        "colors": (t * c, one_color),
        "position": (n * (n - 1) * r, position),
        "color_attr": (t * (t - 1) * c * (c - 1), color_attr),
    }


def _ordered_pair(items: Sequence[str], number: int) -> tuple[str, str]:
    """Return number 0..n(n-1)-1 of the ordered pairs of distinct items."""
    first, second = divmod(number, len(items) - 1)
    return items[first], items[second + (second >= first)]
