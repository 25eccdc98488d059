"""The blocks of a network, which are sharded and compiled one by one."""

from __future__ import annotations

from torch import nn


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the modules in the lists of ``network``: the blocks of a transformer, or the levels of a UNet."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]
