"""GenEval's prompt grammar: the sentence and the metadata of each of the six tasks, without "a photo of"."""

from __future__ import annotations

from collections.abc import Sequence

from genalign.types import Metadata, Prompt

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
NUMBER_WORDS = {number: word for word, number in NUMBERS.items()}


def with_article(noun: str) -> str:
    """Put "a" before a noun, or "an" before a vowel."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return GenEval's plural: +es after s, else +s."""
    return noun + ("es" if noun.endswith("s") else "s")


def _prompt(tag: str, text: str, include: Sequence[Metadata], exclude: Sequence[Metadata] = ()) -> Prompt:
    metadata: dict[str, object] = {"tag": tag, "include": include}
    if exclude:
        metadata["exclude"] = exclude
    return Prompt(text, metadata | {"prompt": text})


def single_object(shape: str) -> Prompt:
    """Prompt for one object, such as "a bench"."""
    return _prompt("single_object", with_article(shape), [{"class": shape, "count": 1}])


def two_object(first: str, second: str) -> Prompt:
    """Prompt for two objects, such as "a bench and a dog"."""
    text = f"{with_article(first)} and {with_article(second)}"
    return _prompt("two_object", text, [{"class": first, "count": 1}, {"class": second, "count": 1}])


def counting(shape: str, number: str) -> Prompt:
    """Prompt for exactly ``number`` objects, such as "three dogs"."""
    n = NUMBERS[number]
    include, exclude = [{"class": shape, "count": n}], [{"class": shape, "count": n + 1}]
    return _prompt("counting", f"{number} {plural(shape)}", include, exclude)


def colors(shape: str, color: str) -> Prompt:
    """Prompt for one object in a color, such as "a red bench"."""
    return _prompt("colors", with_article(f"{color} {shape}"), [{"class": shape, "count": 1, "color": color}])


def position(first: str, relation: str, second: str) -> Prompt:
    """Prompt for a spatial relation, such as "a dog left of a bench".

    As in GenEval, the object that the relation refers to comes first in the metadata.
    """
    text = f"{with_article(first)} {relation} {with_article(second)}"
    include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
    return _prompt("position", text, include)


def color_attr(first: str, first_color: str, second: str, second_color: str) -> Prompt:
    """Prompt for two objects in two colors, such as "a red bench and a blue dog"."""
    text = f"{with_article(f'{first_color} {first}')} and {with_article(f'{second_color} {second}')}"
    objects = ((first, first_color), (second, second_color))
    return _prompt("color_attr", text, [{"class": name, "count": 1, "color": color} for name, color in objects])
