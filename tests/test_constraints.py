"""The pins for clusters, whose torch is built for another CUDA, are those that the tests run with."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
_OF_THE_TORCH_BUILD = ("nvidia-", "cuda-", "triton==")


def test_the_pins_for_clusters_are_all_but_those_of_a_torch_build() -> None:
    pins, cluster = ((ROOT / f"{name}.txt").read_text().splitlines() for name in ("constraints", "constraints-cluster"))
    left_out = [pin for pin in pins if pin.startswith(_OF_THE_TORCH_BUILD)]
    assert cluster == [pin for pin in pins if pin not in left_out] and len(left_out) > 10
