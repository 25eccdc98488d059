"""Prompts in GenEval's manner for training: compositions of its classes and colours that it does not ask for itself."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from genalign.evaluation.geneval.metadata import Clause, Request, written
from genalign.evaluation.geneval.vocabulary import COLORS, OBJECTS, RELATIONS
from genalign.types import Prompt, PromptSet

OPENINGS = ("a photo of", "a picture of", "an image showing", "a snapshot of")
TASKS = ("two_object", "counting", "colors", "position", "color_attr")
"""The tasks that have compositions to train on: GenEval asks for every single object itself."""

_MIRRORED = {"right of": "left of", "below": "above"}
_COUNTS = (2, 3, 4)


def composition(request: Request) -> str:
    """What is asked for, whatever the words: the same for "a dog and a cat" and "a cat and a dog", and for a dog left
    of a cat and a cat right of a dog.
    """
    objects = sorted([clause.name, clause.count, clause.color or ""] for clause in request.include)
    relations = []
    for clause in request.include:
        if clause.relation is not None and clause.target is not None:
            pair = [clause.name, request.include[clause.target].name]
            mirrored = clause.relation in _MIRRORED
            relations.append([_MIRRORED.get(clause.relation, clause.relation), *(pair[::-1] if mirrored else pair)])
    return json.dumps([objects, sorted(relations)])


def composition_hash(request: Request) -> str:
    """Eight hexadecimal characters of a composition."""
    return hashlib.sha256(composition(request).encode()).hexdigest()[:8]


@cache
def official() -> frozenset[str]:
    """The ``composition_hash`` of GenEval's 553 prompts, which are not in this package themselves."""
    return frozenset(files("genalign.assets").joinpath("geneval-compositions.txt").read_text().split())


@dataclass(frozen=True)
class _Space:
    """``size`` compositions of a task; ``make`` is number 0..size-1 of them."""

    size: int
    make: Callable[[int], Request]


def training_prompts(
    per_task: int | Mapping[str, int],
    seed: int = 0,
    *,
    objects: Sequence[str] = OBJECTS,
    colors: Sequence[str] = COLORS,
    openings: Sequence[str] = OPENINGS,
    held_out: Iterable[Prompt] = (),
) -> PromptSet:
    """Up to ``per_task`` prompts of each of ``TASKS``, all of other compositions; fewer where there are no more.

    None has the composition of a prompt of GenEval, nor of one ``held_out``. People have no colour, as in GenEval.
    Leave some ``objects`` out to see how a model does on unseen ones. The same for the same seed.

    Raises ValueError for a colour that GenEval lacks, an amount below 1, or a task without a composition that may be
    used.
    """
    wanted = per_task if isinstance(per_task, Mapping) else dict.fromkeys(TASKS, per_task)
    if few := [tag for tag, count in wanted.items() if count < 1]:
        raise ValueError(f"ask for at least 1 prompt of {few[0]}, or leave the task out")
    if beyond := [color for color in colors if color not in COLORS]:
        raise ValueError(f"{beyond[0]!r} is not a colour of GenEval: choose from {', '.join(COLORS)}")
    barred = official() | {composition_hash(Request.of(prompt)) for prompt in held_out}
    spaces = _spaces(objects, colors)
    if unknown := set(wanted) - set(spaces):
        raise ValueError(f"no task {', '.join(sorted(unknown))} to train on: choose from {', '.join(spaces)}")
    made: list[Prompt] = []
    for tag, count in wanted.items():
        rng = random.Random(f"{seed}/{tag}")
        found = list(_drawn(spaces[tag], count, barred, openings, rng))
        if not found:
            raise ValueError(f"there is no {tag} composition to train on: give more objects or colours")
        made += found
    return PromptSet("geneval-train", tuple(made))


def _drawn(
    space: _Space, count: int, barred: frozenset[str], openings: Sequence[str], rng: random.Random
) -> Iterator[Prompt]:
    """Up to ``count`` prompts of distinct compositions, in random order."""
    seen, tried = set(barred), set[int]()
    while count > 0 and len(tried) < space.size:
        number = rng.randrange(space.size)
        if number in tried:
            continue
        tried.add(number)
        request = space.make(number)
        if (found := composition_hash(request)) not in seen:
            seen.add(found)
            count -= 1
            yield written(request, rng.choice(openings))


def _spaces(objects: Sequence[str], colors: Sequence[str]) -> dict[str, _Space]:
    things = [name for name in objects if name != "person"]
    n, t, c, r = len(objects), len(things), len(colors), len(RELATIONS)

    def two_object(number: int) -> Request:
        first, second = _pair(objects, number)
        return _request("two_object", Clause(first), Clause(second))

    def counting(number: int) -> Request:
        name, count = objects[number // len(_COUNTS)], _COUNTS[number % len(_COUNTS)]
        return Request("counting", (Clause(name, count),), (Clause(name, count + 1),), "")

    def one_color(number: int) -> Request:
        return _request("colors", Clause(things[number // c], color=colors[number % c]))

    def position(number: int) -> Request:
        first, second = _pair(objects, number // r)
        return _request("position", Clause(second), Clause(first, relation=RELATIONS[number % r], target=0))

    def color_attr(number: int) -> Request:
        pair, shades = _pair(things, number // (c * (c - 1))), _pair(colors, number % (c * (c - 1)))
        return _request("color_attr", *(Clause(name, color=color) for name, color in zip(pair, shades, strict=True)))

    return {
        "two_object": _Space(n * (n - 1), two_object),
        "counting": _Space(n * len(_COUNTS), counting),
        "colors": _Space(t * c, one_color),
        "position": _Space(n * (n - 1) * r, position),
        "color_attr": _Space(t * (t - 1) * c * (c - 1), color_attr),
    }


def _request(tag: str, *include: Clause) -> Request:
    return Request(tag, include, (), "")


def _pair(items: Sequence[str], number: int) -> tuple[str, str]:
    """Number 0..n(n-1)-1 of the ordered pairs of different items."""
    first, second = divmod(number, len(items) - 1)
    return items[first], items[second + (second >= first)]
