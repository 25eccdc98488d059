"""The diversity of a set of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genalign.metrics.frechet import as_features

_ROUND_OFF = 1e-12  # an eigenvalue below this fraction of the trace counts as 0


def vendi_score(features: Tensor) -> float:
    """Compute the Vendi score of n features (n, d) with the cosine kernel, in [1, n] (arXiv 2210.02410).

    It is the exponential of the entropy of the eigenvalues of K / n, and falls when a set is smaller: compare sets of
    equal size only. Raises ValueError for a feature of length 0, which has no direction.
    """
    features = as_features(features, at_least=1)
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    if bool((length == 0).any()):
        raise ValueError("a feature of length 0 has no direction: leave such samples out of the set")
    rows = features / length / math.sqrt(len(features))
    # X^T X and X X^T have the same eigenvalues other than 0: take the smaller.
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    eigenvalues = torch.linalg.eigvalsh(gram)
    return math.exp(float(torch.special.entr(eigenvalues[eigenvalues > _ROUND_OFF]).sum()))
