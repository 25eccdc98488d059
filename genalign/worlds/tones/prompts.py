"""The prompt grammar of the tones world, its metadata, and the deterministic splits.

single_tone  a sine tone                                    5 prompts
two_tone     a sine tone then a noise burst                20
counting     three square tones                            20  (and "six square tones", never trained)
pitch        a C5 organ tone                               40
relation     a sine tone then a lower square tone          24
attribution  a C4 sine tone then a G4 square tone        1080
loudness     a quiet organ tone then a louder sine tone    40

Metadata follow GenEval's: tag, prompt, and ``events`` in order of time, each with class, count and maybe pitch;
``relation`` ("higher", "lower") and ``loudness`` ("louder", "quieter") compare the second event with the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import permutations, product

from genalign.evaluation.geneval.grammar import plural, with_article
from genalign.types import Metadata, Prompt, PromptSet
from genalign.worlds.grammar import split
from genalign.worlds.tones.instruments import NOISE, NOTES, PITCHED, TIMBRES

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
RELATIONS = ("higher", "lower")
LOUDNESS = {"louder": "quiet", "quieter": "loud"}
"""How the second event differs, and the word for the first event."""
_NOTES = tuple(NOTES)


def noun(timbre: str) -> str:
    """The noun of a timbre: "sine tone", or "noise burst"."""
    return f"{timbre} {'burst' if timbre == NOISE else 'tone'}"


def _prompt(tag: str, text: str, events: Sequence[Metadata], **criteria: str) -> Prompt:
    return Prompt(text, {"tag": tag, "events": events, **criteria, "prompt": text})


def _event(timbre: str, pitch: str | None = None, count: int = 1) -> Metadata:
    return {"class": timbre, "count": count} | ({"pitch": pitch} if pitch else {})


def _then(first: str, second: str) -> str:
    return f"{with_article(first)} then {with_article(second)}"


def single_tone(timbre: str) -> Prompt:
    """Write a prompt such as "a sine tone"."""
    return _prompt("single_tone", with_article(noun(timbre)), [_event(timbre)])


def two_tone(first: str, second: str) -> Prompt:
    """Write a prompt such as "a sine tone then a noise burst"."""
    return _prompt("two_tone", _then(noun(first), noun(second)), [_event(first), _event(second)])


def counting(timbre: str, number: str) -> Prompt:
    """Write a prompt such as "three square tones"."""
    return _prompt("counting", f"{number} {plural(noun(timbre))}", [_event(timbre, count=NUMBERS[number])])


def pitch(timbre: str, note: str) -> Prompt:
    """Write a prompt such as "a C5 organ tone"."""
    return _prompt("pitch", with_article(f"{note} {noun(timbre)}"), [_event(timbre, note)])


def relation(first: str, direction: str, second: str) -> Prompt:
    """Write a prompt such as "a sine tone then a lower square tone"."""
    text = _then(noun(first), f"{direction} {noun(second)}")
    return _prompt("relation", text, [_event(first), _event(second)], relation=direction)


def attribution(first: str, first_note: str, second: str, second_note: str) -> Prompt:
    """Write a prompt such as "a C4 sine tone then a G4 square tone"."""
    text = _then(f"{first_note} {noun(first)}", f"{second_note} {noun(second)}")
    return _prompt("attribution", text, [_event(first, first_note), _event(second, second_note)])


def loudness(first: str, change: str, second: str) -> Prompt:
    """Write a prompt such as "a quiet organ tone then a louder sine tone"."""
    text = _then(f"{LOUDNESS[change]} {noun(first)}", f"{change} {noun(second)}")
    return _prompt("loudness", text, [_event(first), _event(second)], loudness=change)


def is_held_out_note(timbre: str, note: str) -> bool:
    """Whether the note is held out: no training prompt names these two notes of a pitched timbre with it."""
    return timbre != NOISE and (_NOTES.index(note) - 2 * TIMBRES.index(timbre)) % 5 == 0


def is_held_out_order(first: str, second: str) -> bool:
    """Whether the order is held out: four of twenty ordered pairs of timbres never follow each other in training."""
    i, k = TIMBRES.index(first), TIMBRES.index(second)
    return i < 4 and (k - i) % 5 == 2


def _all_prompts() -> Iterable[tuple[Prompt, bool]]:
    """Every prompt of the seven tasks, and whether it is held out."""
    for timbre in TIMBRES:
        yield single_tone(timbre), False
    for first, second in permutations(TIMBRES, 2):
        yield two_tone(first, second), is_held_out_order(first, second)
    for timbre, number in product(TIMBRES, ("two", "three", "four", "five")):
        yield counting(timbre, number), (TIMBRES.index(timbre) + NUMBERS[number]) % 3 == 0
    for timbre, note in product(PITCHED, NOTES):
        yield pitch(timbre, note), is_held_out_note(timbre, note)
    for (first, second), direction in product(permutations(PITCHED, 2), RELATIONS):
        yield relation(first, direction, second), is_held_out_order(first, second)
    for (first, second), (low, high) in product(permutations(PITCHED, 2), permutations(NOTES, 2)):
        held = is_held_out_note(first, low) or is_held_out_note(second, high) or is_held_out_order(first, second)
        yield attribution(first, low, second, high), held
    for (first, second), change in product(permutations(TIMBRES, 2), LOUDNESS):
        yield loudness(first, change, second), is_held_out_order(first, second)


@cache
def prompts(suite: str) -> PromptSet:
    """The prompts of a split, as ``grammar.split`` defines it; "len" is six of a kind."""
    return split(suite, _all_prompts(), [counting(timbre, "six") for timbre in TIMBRES])
