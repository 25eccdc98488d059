"""``genalign demo``: training of an embedded model with a shipped configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files

from genalign.cli.context import CommandContext
from genalign.cli.train import train_command

DEMOS = {"shapes": "demo.yaml", "tones": "demo-tones.yaml"}
"""The shipped configurations in genalign.assets, by world."""


def demo_command(context: CommandContext, arguments: Sequence[str]) -> int:
    """Run ``genalign demo [shapes | tones]``: training of an embedded model with a shipped configuration."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    world, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in DEMOS else ("shapes", arguments)
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"there is no demo of {rest[0]!r}: choose from {', '.join(DEMOS)}")
    shipped = str(files("genalign.assets").joinpath(DEMOS[world]))
    return train_command(context, ["--config", shipped, *rest])
