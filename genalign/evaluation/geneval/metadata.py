"""What a prompt asks for: GenEval's metadata as a record, and the prompt that its grammar makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from genalign.evaluation.geneval.grammar import (
    NUMBERS,
    color_attr,
    colors,
    counting,
    position,
    single_object,
    two_object,
)
from genalign.evaluation.geneval.vocabulary import COLORS, RELATIONS, TASKS
from genalign.types import Metadata, Prompt

OPENING = "a photo of"
_NUMBER_WORDS = {number: word for word, number in NUMBERS.items()}


@dataclass(frozen=True)
class Clause:
    """``count`` objects of the class ``name``; where they are given, of this ``color``, and in ``relation`` to the
    objects of the earlier clause number ``target``.
    """

    name: str
    count: int = 1
    color: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class Request:
    """All of ``include``, and none of ``exclude``; ``tag`` is the task."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    prompt: str

    @classmethod
    def of(cls, prompt: Prompt) -> Request:
        """The request in a prompt's metadata. Raises ValueError for a prompt without, or one that is not GenEval's."""
        if prompt.metadata is None:
            raise ValueError(f"the prompt {prompt.text!r} has no metadata: GenEval needs its tag and include clauses")
        return cls.parse(prompt.metadata)

    @classmethod
    def parse(cls, metadata: Metadata) -> Request:
        """Metadata as ``json.loads`` gives it. Raises ValueError naming the field that cannot be used."""
        text = metadata.get("prompt")
        for key, kind in (("tag", str), ("include", (list, tuple)), ("prompt", str)):
            if not isinstance(metadata.get(key), kind):
                raise ValueError(f"the metadata of {text!r} lacks {key!r}: GenEval has tag, include and prompt")
        if not metadata["include"]:
            raise ValueError(f"the metadata of {text!r} asks for nothing: include must have a clause")
        excluded = metadata.get("exclude", ())
        if not isinstance(excluded, list | tuple):
            raise ValueError(f"the metadata of {text!r} has an exclude that is no list: leave it out, or list clauses")
        include = tuple(_clause(text, index, clause) for index, clause in enumerate(metadata["include"]))
        exclude = tuple(_clause(text, 0, clause) for clause in excluded)
        return cls(str(metadata["tag"]), include, exclude, str(text))

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that it speaks of, in order, each once."""
        return tuple(dict.fromkeys(clause.name for clause in self.include + self.exclude))

    def metadata(self) -> dict[str, Any]:
        """What ``parse`` reads, with the keys in GenEval's order."""
        found: dict[str, Any] = {"tag": self.tag, "include": [_as_dict(clause) for clause in self.include]}
        if self.exclude:
            found["exclude"] = [_as_dict(clause) for clause in self.exclude]
        return found | {"prompt": self.prompt}


def _clause(text: str | None, index: int, value: Any) -> Clause:
    """The clause number ``index``, whose relation may be to an earlier one."""

    def refuse(what: str) -> ValueError:
        return ValueError(f"the metadata of {text!r} has the clause {value}: {what}")

    if not isinstance(value, Mapping):
        raise refuse("it must be an object with a class and a count")
    if unknown := set(value) - {"class", "count", "color", "position"}:
        raise refuse(f"there is no {', '.join(sorted(unknown))} in GenEval")
    name, count, color = value.get("class"), value.get("count"), value.get("color")
    if not isinstance(name, str) or type(count) is not int or count < 1:  # True is no count
        raise refuse("it needs a class and a count of at least 1")
    if color is not None and color not in COLORS:
        raise refuse(f"the color must be one of {', '.join(COLORS)}")
    if "position" not in value:
        return Clause(name, count, color)
    match value["position"]:
        case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < index:
            return Clause(name, count, color, relation, target)
    raise refuse(f"position must be one of {', '.join(RELATIONS)} and the number of an earlier clause")


def _as_dict(clause: Clause) -> dict[str, Any]:
    found: dict[str, Any] = {"class": clause.name, "count": clause.count}
    if clause.color is not None:
        found["color"] = clause.color
    if clause.relation is not None:
        found["position"] = [clause.relation, clause.target]
    return found


def written(request: Request, opening: str = OPENING) -> Prompt:
    """The prompt that GenEval's grammar makes of a request's tag and clauses, after ``opening``.

    It is the grammar of the shapes world (``worlds.shapes.prompts``) with other nouns. Raises ValueError for clauses
    that its task does not have.
    """
    try:
        made = _made(request)
        assert made.metadata is not None, "the grammar gives metadata"
        if Request.parse(made.metadata).include != request.include:
            raise ValueError("its prompt says something else")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"the clauses of {request.prompt!r} are not those of the task {request.tag}") from error
    text = f"{opening} {made.text}"
    return Prompt(text, {**made.metadata, "prompt": text})


def _made(request: Request) -> Prompt:
    include = request.include
    match request.tag:
        case "single_object":
            return single_object(include[0].name)
        case "two_object":
            return two_object(include[0].name, include[1].name)
        case "counting":
            return counting(include[0].name, _NUMBER_WORDS[include[0].count])
        case "colors":
            return colors(include[0].name, str(include[0].color))
        case "position":
            return position(include[1].name, str(include[1].relation), include[0].name)
        case "color_attr":
            first, second = include[:2]
            return color_attr(first.name, str(first.color), second.name, str(second.color))
    raise ValueError(f"{request.tag!r} is not a task of GenEval: {', '.join(TASKS)}")
