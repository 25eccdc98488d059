"""Relations between bounding boxes, as GenEval decides them."""

from __future__ import annotations

import numpy as np

Box = tuple[float, float, float, float]
"""Corners (x1, y1, x2, y2) in pixels, with y pointing down."""


def relations(a: Box, b: Box, margin: float = 0.1) -> frozenset[str]:
    """Return the relations of box ``a`` to box ``b`` by GenEval's ``relative_position`` (evaluate_images.py).

    The offset of the centers is shrunk by ``margin`` times the summed box sizes, then divided by its unshrunk norm;
    a component beyond 0.5 in absolute value is a relation.
    """
    offset = np.array([(a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2])
    extent = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - margin * extent, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return frozenset()
    dx, dy = shrunk / np.linalg.norm(offset)
    names = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, true in names.items() if true)
