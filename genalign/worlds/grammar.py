"""What the worlds' prompts share: English, and the deterministic splits of a grammar."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from genalign.types import Prompt, PromptSet

SUITES = ("train", "val", "iid", "comp", "len")


def digest(text: str) -> bytes:
    """The SHA-1 of ``text``, by which splits are drawn."""
    return hashlib.sha1(text.encode()).digest()


def split(suite: str, grammar: Iterable[tuple[Prompt, bool]], longer: Iterable[Prompt]) -> PromptSet:
    """The prompts of a split of ``grammar``: (prompt, whether it is held out).

    train: seen prompts without ``val``; val: a tenth of each task's seen prompts; iid: all seen prompts, for new
    noises; comp: held-out compositions; len: the ``longer`` prompts, of a count that is never trained.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    if suite == "len":
        return PromptSet("len", tuple(longer))
    chosen = [prompt for prompt, held_out in grammar if held_out == (suite == "comp")]
    if suite in ("train", "val"):
        validation = _validation(PromptSet("seen", tuple(chosen)))
        chosen = [prompt for prompt in chosen if (prompt.text in validation) == (suite == "val")]
    return PromptSet(suite, tuple(chosen))


def _validation(seen: PromptSet) -> frozenset[str]:
    """A tenth of every task's prompts, rounded up, the lowest by hash."""
    texts = [
        sorted((prompt.text for prompt in group), key=digest)[: -(-len(group) // 10)]
        for group in seen.by_task().values()
    ]
    return frozenset(text for group in texts for text in group)


def fingerprint(prompts: Callable[[str], PromptSet]) -> str:
    """16 hexadecimal characters over every split, to be stored with anything trained or measured on them."""
    lines = [f"{suite}\t{prompt.text}" for suite in SUITES for prompt in prompts(suite).prompts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
