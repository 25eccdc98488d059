"""Deterministic splits of a world's prompt grammar."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from genalign.types import Prompt, PromptSet

SUITES = ("train", "val", "iid", "comp", "len")


def digest(text: str) -> bytes:
    """The SHA-1 of ``text``, which decides its split."""
    return hashlib.sha1(text.encode()).digest()


def split(suite: str, grammar: Iterable[tuple[Prompt, bool]], longer: Iterable[Prompt]) -> PromptSet:
    """The prompts of a split of ``grammar``: (prompt, whether it is held out).

    train: seen prompts without ``val``; val: a tenth of each task's seen prompts, two at least; iid: all seen prompts,
    for new noise; comp: held-out compositions; len: the ``longer`` prompts, of a count that is never trained.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    if suite == "len":
        return PromptSet("len", tuple(longer))
    prompts = [prompt for prompt, held_out in grammar if held_out == (suite == "comp")]
    if suite in ("train", "val"):
        validation: set[str] = set()  # the lowest by hash; one prompt of a task would leave its interval open
        for group in PromptSet("seen", tuple(prompts)).by_task().values():
            validation.update(sorted((prompt.text for prompt in group), key=digest)[: max(2, -(-len(group) // 10))])
        prompts = [prompt for prompt in prompts if (prompt.text in validation) == (suite == "val")]
    return PromptSet(suite, tuple(prompts))


def vocabulary(prompts: Callable[[str], PromptSet]) -> list[str]:
    """Every word of the prompts of all splits, sorted."""
    return sorted({word for suite in SUITES for prompt in prompts(suite).prompts for word in prompt.text.split()})
