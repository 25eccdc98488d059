"""Readers for the prompt files of other benchmarks, which this package does not contain."""

from __future__ import annotations

import re
from pathlib import Path

from genalign.runtime.prompt_files import load_prompts
from genalign.types import Prompt, PromptSet


def read_compbench(*paths: Path) -> PromptSet:
    """Read files of T2I-CompBench (arXiv:2307.06350) such as ``color_val.txt``, with one prompt per line.

    The task is the category in the file's name.
    """
    prompts: list[Prompt] = []
    for path in paths:
        task = re.sub(r"_(train|val)\w*$", "", path.stem)
        prompts += [Prompt(prompt.text, {"tag": task, "prompt": prompt.text}) for prompt in load_prompts(path).prompts]
    return PromptSet("t2i-compbench", tuple(prompts))


def read_ocr(path: Path) -> PromptSet:
    """Read prompts that quote the text to draw, one per line, such as Flow-GRPO's (arXiv:2505.05470).

    The first text in double quotes becomes ``text`` in the metadata. Raises ValueError for a prompt without quotes.
    """
    prompts: list[Prompt] = []
    for number, prompt in enumerate(load_prompts(path).prompts, start=1):
        match = re.search(r'"([^"]+)"|“([^”]+)”', prompt.text)
        if match is None:
            raise ValueError(f"{path}, prompt {number}: no text in double quotes to be drawn in {prompt.text!r}")
        prompts.append(Prompt(prompt.text, {"tag": "ocr", "text": match[1] or match[2], "prompt": prompt.text}))
    return PromptSet(path.stem, tuple(prompts))
