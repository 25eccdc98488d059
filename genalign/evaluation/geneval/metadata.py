"""GenEval's prompt metadata as a dataclass, and the prompt that its grammar spells for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from genalign.evaluation.geneval import grammar
from genalign.evaluation.geneval.vocabulary import COLORS, RELATIONS
from genalign.types import Metadata, Prompt


@dataclass(frozen=True)
class Clause:
    """``count`` objects of the class ``name``, optionally of one ``color``.

    If ``relation`` is set, they are in this relation to the objects of the earlier clause number ``target``.
    """

    name: str
    count: int = 1
    color: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class PromptSpec:
    """The content that a prompt requires: all of ``include`` and none of ``exclude``; ``tag`` is the task."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    prompt: str = ""

    @classmethod
    def from_prompt(cls, prompt: Prompt) -> PromptSpec:
        """Parse a prompt's metadata. Raises ValueError if there is none, or if it is not GenEval's."""
        if prompt.metadata is None:
            raise ValueError(f"the prompt {prompt.text!r} has no metadata: GenEval needs its tag and include clauses")
        return cls.from_metadata(prompt.metadata)

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> PromptSpec:
        """Parse metadata as ``json.loads`` returns it, or a table: a null is as good as nothing there.

        Raises ValueError that names an invalid field.
        """
        text = metadata.get("prompt")
        for key, kind in (("tag", str), ("include", (list, tuple)), ("prompt", str)):
            if not isinstance(metadata.get(key), kind):
                raise ValueError(f"the metadata of {text!r} lacks {key!r}: GenEval has tag, include and prompt")
        if not metadata["include"]:
            raise ValueError(f"the metadata of {text!r} has an empty include: list at least one clause")
        excluded = metadata.get("exclude") or ()
        if not isinstance(excluded, list | tuple):
            raise ValueError(f"the metadata of {text!r} has an exclude that is no list: leave it out, or list clauses")
        include = tuple(_parse_clause(text, index, clause) for index, clause in enumerate(metadata["include"]))
        exclude = tuple(_parse_clause(text, 0, clause) for clause in excluded)
        return cls(str(metadata["tag"]), include, exclude, str(text))

    @property
    def classes(self) -> tuple[str, ...]:
        """The distinct object classes of all clauses, in order."""
        return tuple(dict.fromkeys(clause.name for clause in self.include + self.exclude))

    def to_prompt(self, opening: str = "a photo of") -> Prompt:
        """Spell the prompt by GenEval's grammar from tag and clauses, after ``opening``.

        Raises ValueError for clauses that the task does not have.
        """
        try:
            prompt = _GRAMMAR[self.tag](*self.include)
            assert prompt.metadata is not None, "the grammar gives metadata"
            if PromptSpec.from_metadata(prompt.metadata).include != self.include:
                raise ValueError("its prompt says something else")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the clauses of {self.prompt!r} do not fit the task {self.tag}") from error
        text = f"{opening} {prompt.text}"
        return Prompt(text, {**prompt.metadata, "prompt": text})


def _parse_clause(text: str | None, index: int, value: Any) -> Clause:
    """Parse clause number ``index``, which may refer to an earlier one."""

    def invalid(problem: str) -> ValueError:
        return ValueError(f"the metadata of {text!r} has the clause {value}: {problem}")

    if not isinstance(value, Mapping):
        raise invalid("it must be an object with a class and a count")
    if unknown := set(value) - {"class", "count", "color", "position"}:
        raise invalid(f"there is no {', '.join(sorted(unknown))} in GenEval")
    name, count, color = value.get("class"), _whole(value.get("count")), value.get("color")
    if not isinstance(name, str) or type(count) is not int or count < 1:  # True is no count
        raise invalid("it needs a class and a count of at least 1")
    if color is not None and color not in COLORS:
        raise invalid(f"the color must be one of {', '.join(COLORS)}")
    position = value.get("position")
    if position is None:
        return Clause(name, count, color)
    match [*map(_whole, position)] if isinstance(position, list | tuple) else position:
        case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < index:
            return Clause(name, count, color, relation, target)
    raise invalid(f"position must be one of {', '.join(RELATIONS)} and the number of an earlier clause")


def _whole(value: Any) -> Any:
    """Turn 2.0 into 2, as pandas writes a column of integers that has nulls."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_GRAMMAR: Mapping[str, Callable[..., Prompt]] = {
    "single_object": lambda a: grammar.single_object(a.name),
    "two_object": lambda a, b: grammar.two_object(a.name, b.name),
    "counting": lambda a: grammar.counting(a.name, grammar.NUMBER_WORDS[a.count]),
    "colors": lambda a: grammar.colors(a.name, str(a.color)),
    "position": lambda target, a: grammar.position(a.name, str(a.relation), target.name),
    "color_attr": lambda a, b: grammar.color_attr(a.name, str(a.color), b.name, str(b.color)),
}
"""The prompt of the include clauses, by task."""
