"""Sums of LoRAs are exact, whatever their ranks and scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genalign.diffusion.lora_soup import Factors, lora_soup


def _factors(rank: int, seed: int, out: int = 3, inner: tuple[int, ...] = (4,)) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, *inner, generator=generator), torch.randn(out, rank, generator=generator)


def _product(factors: Factors) -> Tensor:
    a, b = factors
    return b.flatten(1) @ a.flatten(1)


def test_a_soup_is_the_sum_of_the_products() -> None:
    """And not the product of the sums, which is off by half of its length here."""
    one, other = {"x": _factors(2, 0)}, {"x": _factors(2, 1)}
    mixed = lora_soup([one, other], [0.3, 0.7])
    expected = 0.3 * _product(one["x"]) + 0.7 * _product(other["x"])
    torch.testing.assert_close(_product(mixed["x"]), expected)
    naive = _product(tuple(0.3 * p + 0.7 * q for p, q in zip(one["x"], other["x"], strict=True)))  # type: ignore[arg-type]
    assert float((naive - expected).norm() / expected.norm()) > 0.3
    assert len(mixed["x"][0]) == 4


def test_layers_and_ranks_may_differ() -> None:
    one, other = {"x": _factors(1, 0), "y": _factors(1, 2)}, {"x": _factors(3, 1)}
    mixed = lora_soup([one, other], [0.5, -1.0])
    assert {name: len(a) for name, (a, _) in mixed.items()} == {"x": 4, "y": 4}  # one rank, padded with zeros
    torch.testing.assert_close(_product(mixed["y"]), 0.5 * _product(one["y"]))
    torch.testing.assert_close(_product(mixed["x"]), 0.5 * _product(one["x"]) - _product(other["x"]))


def test_a_cut_rank_keeps_the_largest_singular_values() -> None:
    adapters = [{"x": _factors(2, 0, 6, (5,))}, {"x": _factors(2, 1, 6, (5,))}]
    exact = _product(lora_soup(adapters, [1.0, 1.0])["x"])
    u, values, v = torch.linalg.svd(exact)
    mixed = lora_soup(adapters, [1.0, 1.0], rank=2)
    best = (u[:, :2] * values[:2]) @ v[:2]
    torch.testing.assert_close(_product(mixed["x"]), best, atol=1e-5, rtol=1e-5)
    wide = lora_soup(adapters, [1.0, 1.0], rank=9)
    torch.testing.assert_close(_product(wide["x"]), exact, atol=1e-5, rtol=1e-5)


def test_adapters_of_other_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"layer x has other sizes in another adapter \(3 x \(4,\) and 3 x \(5,\)\)"):
        lora_soup([{"x": _factors(1, 0)}, {"x": _factors(1, 1, 3, (5,))}], [1.0, 1.0])
    with pytest.raises(ValueError, match="give one weight for each adapter: there are 1 adapters, 2 weights"):
        lora_soup([{"x": _factors(1, 0)}], [1.0, 1.0])
