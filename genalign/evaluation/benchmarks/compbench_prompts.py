"""The files of T2I-CompBench and its "++" (arXiv:2307.06350): what each prompt asks for, by its category."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genalign.evaluation.benchmarks.benchmark import distinct_prompts
from genalign.runtime.prompt_files import load_prompts
from genalign.runtime.text_files import numbered_lines
from genalign.types import Prompt, PromptSet

ATTRIBUTES = ("color", "shape", "texture")
CATEGORIES = (*ATTRIBUTES, "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
RELATIONS = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of")
RELATIONS_3D = ("in front of", "behind", "hidden by")
MOST_PHRASES = 8
"""The original asks about no more phrases of a prompt."""

_NUMBERS = {word: n for n, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight"), start=1)}
_NUMBERS |= {"a": 1, "an": 1}
_PHRASE = r"(?:(?:an?|the) )?[\w'-]+(?: [\w'-]+){0,2}"
_TEMPLATE = re.compile(rf"({_PHRASE}),? and ({_PHRASE})\.?", re.IGNORECASE)  # "a plastic cup and a red wooden bowl"


@dataclass(frozen=True)
class Lists:
    """Files beside the prompts: singulars by noun in singular and plural, and complex prompts by their kind."""

    nouns: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)


def read_compbench(paths: Sequence[Path]) -> PromptSet:
    """Read files such as color_val.txt, whose names say the category, or tables with the metadata below.

    The metadata has ``phrases`` for attributes, ``objects`` and their ``relation`` for places in 2D and 3D, ``counts``
    for numeracy, and for complex prompts the former three, the ``kind`` ("spatial", "action" or "both") and
    ``text_without_adjectives``. What a row does not have is parsed: numeracy by the nouns of new_objects.txt, kinds by
    complex_val_spatial.txt and complex_val_action.txt, and phrases in sentences and complex prompts by spaCy, as in the
    original. Raises ValueError for a file of no category, and where one of these is missing.
    """
    lists, prompts = _read_lists(paths), list[Prompt]()
    for path in (path for path in paths if _list_name(path) is None):
        for prompt in load_prompts(path).prompts:
            row = dict(prompt.metadata or {})
            category = str(row.get("tag") or re.sub(r"_(train|val)\w*$", "", path.stem))
            if category not in CATEGORIES:
                raise ValueError(
                    f"{path} is of no category of T2I-CompBench: its name must begin with {', '.join(CATEGORIES)}"
                )
            metadata: dict[str, Any] = {**row, "prompt": prompt.text}
            for key, parse in _PARSERS.get(category, {}).items():
                if key not in metadata:
                    metadata |= parse(prompt.text, lists)
            metadata["tag"] = category
            _check(f"{path}, {prompt.text!r}", metadata)
            prompts.append(Prompt(prompt.text, metadata))
    return distinct_prompts("t2i-compbench", prompts)


def _list_name(path: Path) -> str | None:
    """Return which of the lists a file is: "nouns", "spatial", "action" or "both"; None for prompts."""
    if path.name == "new_objects.txt":
        return "nouns"
    match = re.fullmatch(r"complex_[a-z]+_(spatial|action|spatialaction)", path.stem)
    return match and match[1].replace("spatialaction", "both")


def _read_lists(paths: Sequence[Path]) -> Lists:
    """Read the lists among the files. Raises ValueError for a line of nouns that is not "dog - dogs"."""
    nouns, kinds = dict[str, str](), dict[str, frozenset[str]]()
    for path in paths:
        name = _list_name(path)
        if name == "nouns":
            for number, line in numbered_lines(path):
                singular, dash, plural = (part.strip().lower() for part in line.partition(" - "))
                if not dash:
                    raise ValueError(f"{path}, line {number}: {line!r} is no noun with its plural, such as dog - dogs")
                nouns |= {singular: singular, plural: singular}
        elif name is not None:
            kinds[name] = frozenset(_key(prompt.text) for prompt in load_prompts(path).prompts)
    return Lists(nouns, kinds)


def _key(text: str) -> str:
    """Return the first sentence in lower case, by which the original finds a prompt in its lists."""
    return text.split(".")[0].strip().lower()


def _check(where: str, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError for metadata from a table that cannot be scored."""
    allowed = ("", *(RELATIONS_3D if metadata["tag"] == "3d_spatial" else RELATIONS))
    if metadata.get("relation", "") not in allowed:
        raise ValueError(f"{where}: the relation {metadata['relation']!r} is none of {', '.join(allowed[1:])}")
    if len(metadata.get("objects", ())) not in (0, 2):
        raise ValueError(f"{where}: objects must be the two names that the relation is between")
    if not all(isinstance(count, list | tuple) and len(count) == 2 for count in metadata.get("counts", ())):
        raise ValueError(f'{where}: counts must be a list of names with their numbers, such as [["dog", 2]]')


def _phrases(text: str, lists: Lists) -> dict[str, Any]:
    """Parse the noun phrases, at most eight."""
    if match := _TEMPLATE.fullmatch(text):
        return {"phrases": list(match.groups())}
    phrases = [str(chunk) for chunk in _language()(text).noun_chunks][:MOST_PHRASES]
    if not phrases:
        raise ValueError(f"there is no noun phrase in {text!r}: leave it out, or give its phrases in a table")
    return {"phrases": phrases}


def _places(relations: Sequence[str]) -> Callable[[str, Lists], dict[str, Any]]:
    """Build a parser of "a dog on the left of a lamp": the nouns on both sides of a relation."""

    def parse(text: str, lists: Lists) -> dict[str, Any]:
        relation = next((relation for relation in relations if f" {relation} " in text), None)
        if relation is None:
            raise ValueError(f"none of the relations {', '.join(relations)} is in {text!r}: leave it out")
        sides = text.rstrip(". ").split(f" {relation} ", maxsplit=1)
        return {"objects": [re.sub(r"^(an?|the) ", "", side.strip().lower()) for side in sides], "relation": relation}

    return parse


def _counts(text: str, lists: Lists) -> dict[str, Any]:
    """Parse "two dogs and a lamp": the singular and the number of each object, one or two words after a number."""
    if not lists.nouns:
        raise ValueError(
            f"counting {text!r} needs the nouns of new_objects.txt: give that file too, or a table with counts"
        )
    words, counts = re.findall(r"[\w'-]+", text.lower()), list[tuple[str, int]]()
    for i, word in enumerate(words):
        names = [" ".join(words[i + 1 : i + 1 + length]) for length in (2, 1)]
        singular = next((lists.nouns[name] for name in names if name in lists.nouns), None)
        if word in _NUMBERS and singular is not None:
            counts.append((singular, _NUMBERS[word]))
    if not counts:
        raise ValueError(f"there is no number of objects of new_objects.txt in {text!r}: leave it out")
    return {"counts": counts}


def _complex_places(text: str, lists: Lists) -> dict[str, Any]:
    """Parse the nouns next to the relation of a sentence; none where it has no relation, or several."""
    matches = [match for relation in RELATIONS for match in re.finditer(rf"\b{relation}\b", text)]
    if len(matches) != 1:
        return {"objects": [], "relation": ""}
    match, tokens = matches[0], [token for token in _language()(text) if token.pos_ in ("NOUN", "PROPN")]
    before = [token for token in tokens if token.idx < match.start()]
    after = sorted((token for token in tokens if token.idx >= match.end()), key=lambda token: token.pos_ != "NOUN")
    if not before or not after:
        return {"objects": [], "relation": ""}
    return {"objects": [before[-1].text.lower(), after[0].text.lower()], "relation": match[0]}


@functools.cache
def _language() -> Any:
    """Load spaCy's small English model, the original's parser. Raises ValueError where it is not installed."""
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        raise ValueError(
            "sentences of T2I-CompBench are parsed by spaCy: pip install spacy, python -m spacy download"
            " en_core_web_sm; or give a table with the metadata that docs/benchmarks.md lists"
        ) from None


_PARSERS: Mapping[str, Mapping[str, Callable[[str, Lists], dict[str, Any]]]] = {
    **{category: {"phrases": _phrases} for category in ATTRIBUTES},
    "spatial": {"objects": _places(RELATIONS)},
    "3d_spatial": {"objects": _places(RELATIONS_3D)},
    "numeracy": {"counts": _counts},
    "complex": {
        "phrases": _phrases,
        "objects": _complex_places,
        "kind": lambda text, lists: {
            "kind": next((kind for kind, texts in lists.kinds.items() if _key(text) in texts), "both")
        },
        "text_without_adjectives": lambda text, lists: {
            "text_without_adjectives": " ".join(token.text for token in _language()(text) if token.pos_ != "ADJ")
        },
    },
}
"""Parsers of what a category needs, by the key that they fill."""
