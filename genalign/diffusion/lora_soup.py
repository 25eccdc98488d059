"""Weighted sums of LoRAs that were trained from one base model (rewarded soups, arXiv 2306.04488)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""The matrices A (r, ...) and B (out, r, ...) of a layer, whose change of the weights is B A: the scale is in B."""


def lora_soup(
    adapters: Sequence[Mapping[str, Factors]], weights: Sequence[float], rank: int | None = None
) -> dict[str, Factors]:
    """Add up the changes that adapters make to each layer, w_1 B_1 A_1 + w_2 B_2 A_2 + ..., exactly.

    The sum of two products is the product of [A_1; A_2] and [w_1 B_1, w_2 B_2]: their ranks add up. An average of the A
    and of the B would be another change. Layers that only some adapters have count as 0 in the others, and all layers
    are padded to one rank with zeros.

    Args:
        adapters: The factors by layer, of each adapter.
        weights: The weight of each. They need not add up to 1: a single adapter of weight 0.5 is half as strong.
        rank: The rank to cut the sums to, by their largest singular values; None keeps them exact.

    Raises:
        ValueError: There are not as many weights as adapters, or a layer has other shapes in another adapter.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            f"give one weight for each adapter: there are {len(adapters)} adapters, {len(weights)} weights"
        )
    layers = list(dict.fromkeys(layer for adapter in adapters for layer in adapter))
    summed = {layer: _sum([a.get(layer) for a in adapters], weights, layer) for layer in layers}
    if rank is not None:
        summed = {layer: _truncated(*factors, rank) for layer, factors in summed.items()}
    common = max(len(a) for a, _ in summed.values())
    padded = {}
    for layer, (a, b) in summed.items():
        missing = common - len(a)  # the zeros change nothing
        padded_a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        padded[layer] = padded_a, torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], dim=1)
    return padded


def _sum(factors: Sequence[Factors | None], weights: Sequence[float], layer: str) -> Factors:
    """Join the factors of one layer."""
    present = [(pair, weight) for pair, weight in zip(factors, weights, strict=True) if pair is not None]
    own = [(a.float(), weight * b.float()) for (a, b), weight in present]
    shapes = {(a.shape[1:], b.shape[:1]) for a, b in own}
    if len(shapes) > 1:
        sizes = " and ".join(sorted(f"{b[0]} x {tuple(a)}" for a, b in shapes))
        raise ValueError(f"layer {layer} has other sizes in another adapter ({sizes}): mix adapters of one base model")
    return torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], dim=1)


def _truncated(a: Tensor, b: Tensor, rank: int) -> Factors:
    """Keep the largest ``rank`` singular values of B A, without forming the product."""
    (left, upper), (right, lower) = (torch.linalg.qr(m.double()) for m in (b.flatten(1), a.flatten(1).T))
    u, values, v = torch.linalg.svd(upper @ lower.T)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    cut_a = (root[:, None] * (v[:rank] @ right.T)).float().view(rank, *a.shape[1:])
    return cut_a, ((left @ u[:, :rank]) * root).float().view(len(b), rank, *b.shape[2:])
