"""The Vendi score against the numbers of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genalign.metrics.vendi import vendi_score


def features_of(kernel: Tensor) -> Tensor:
    """Return features whose inner products are ``kernel``."""
    values, vectors = torch.linalg.eigh(kernel.double())
    return vectors * values.clamp(min=0).sqrt()


def test_vendi_score_worked_by_hand() -> None:
    block = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert vendi_score(features_of(block)) == pytest.approx(2.1573, abs=5e-5)
    places = torch.tensor([0.0, 0.0, 10.0, 10.0, 20.0, 20.0])
    kernel = (-(places[:, None] - places).abs()).exp()
    assert vendi_score(features_of(kernel)) == pytest.approx(3 - 4.1223e-9, abs=1e-12)


def test_vendi_score_counts_different_samples() -> None:
    assert vendi_score(torch.ones(7, 3)) == pytest.approx(1)
    assert vendi_score(3 * torch.eye(5)) == pytest.approx(5)
    assert vendi_score(torch.eye(5).repeat(4, 1)) == pytest.approx(5)


def test_more_samples_than_features_give_the_same_score() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    assert vendi_score(x) == pytest.approx(vendi_score(torch.cat([x, torch.zeros(30, 40)], 1)))


def test_a_feature_without_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="no direction"):
        vendi_score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
