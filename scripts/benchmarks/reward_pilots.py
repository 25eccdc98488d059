"""What is decided on seed 100 and val prompts before the proofs of learned rewards are run; nothing of it is published.

    python scripts/benchmarks/reward_pilots.py turn         whether the runs of overoptimization are long enough to turn
    python scripts/benchmarks/reward_pilots.py smoothing    TRAINING of put_to_use.py: with label smoothing, or plain
    python scripts/benchmarks/reward_pilots.py falling      FALLING_FLIPS of learned_rewards.py: with which it falls
    python scripts/benchmarks/reward_pilots.py tones        whether the verifier gains enough on tones, about 0.12

A run takes about 6 minutes on two cores: ``turn``, ``smoothing`` and ``falling`` have two each, ``tones`` has one. The
first that needs pairs collects them, 20 minutes, for the proofs as well. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.benchmarks.learned_rewards import (
    PILOT_SEED,
    PLAIN,
    SHAPES,
    SMOOTHED,
    TONES,
    BenchWorld,
    Proxy,
    at_equal_nfe,
    learned,
    optimized,
)
from scripts.benchmarks.overoptimization import curve
from scripts.benchmarks.put_to_use import NOISY, TRAINING
from scripts.benchmarks.trained_runs import metrics

Runs = Mapping[str, Mapping[int, Path]]
"""The folders of runs, by name and seed."""


def turn(work: Path) -> Runs:
    """Optimize rewards of 1,000 pairs with few and with many flipped labels, as ``overoptimization`` does."""
    proxies = [Proxy(1000, flips) for flips in (0.1, 0.4)]
    return {
        proxy.name: optimized(
            work, SHAPES, f"pilot_{proxy.name}", learned(work, SHAPES, proxy, (PILOT_SEED,)), _on_val(SHAPES)
        )
        for proxy in proxies
    }


def smoothing(work: Path) -> Runs:
    """Train on rewards of 2,000 noisy pairs that were learned by each configuration."""
    runs = {}
    for training in (PLAIN, SMOOTHED):
        rewards = learned(work, SHAPES, NOISY, (PILOT_SEED,), training)
        runs[training.stem] = at_equal_nfe(work, SHAPES, f"pilot_{training.stem}", rewards, own=_on_val(SHAPES))
    return runs


def falling(work: Path) -> Runs:
    """Train on single rewards of 100 pairs with few and with many flipped labels, at a constant rate."""
    runs = {}
    for proxy in (Proxy(100, flips) for flips in (0.1, 0.4)):
        rewards = learned(work, SHAPES, proxy, (PILOT_SEED,), TRAINING)
        name = f"pilot_falling_{proxy.name}"
        runs[proxy.name] = at_equal_nfe(work, SHAPES, name, rewards, "constant", _on_val(SHAPES))
    return runs


def tones(work: Path) -> Runs:
    """Train on the verifier's partial credit on tones."""
    rewards = {PILOT_SEED: TONES.score("partial")}
    return {"verifier": at_equal_nfe(work, TONES, "pilot_verifier", rewards, own=_on_val(TONES))}


PILOTS: dict[str, Callable[[Path], Runs]] = {"turn": turn, "smoothing": smoothing, "falling": falling, "tones": tones}


def _on_val(world: BenchWorld) -> dict[str, Any]:
    """The evaluations of a run before and after training, on val in place of the prompts that are published."""
    return {"before_after": {**world.settings()["before_after"], "prompts": f"{world.name}:val"}}


def described(name: str, run: Path) -> str:
    """Describe a run: the gain in strict accuracy, the minutes, and a line for each evaluation in between."""
    gain = json.loads((run / "gain.json").read_text(encoding="utf-8"))["gain"]["strict"]
    bounds = ["none" if gain[side] is None else f"{gain[side]:+.3f}" for side in ("low", "high")]
    minutes = metrics(run)[-1]["machine"]["seconds"] / 60
    lines = [f"{name}: strict {gain['mean']:+.3f} ({' to '.join(bounds)}), {minutes:.1f} minutes of training"]
    if any(row["held_out"] for row in metrics(run)):
        lines += [
            f"  distance {distance:.4f}: reward {reward:+.3f}, strict {strict:.3f} ({low:.3f} to {high:.3f})"
            for distance, reward, strict, low, high in curve(run)
        ]
    return "\n".join(lines)


def main() -> None:
    """Train what a pilot needs, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pilot", choices=PILOTS)
    parser.add_argument("--work", type=Path, default=Path("runs/proofs"))
    options = parser.parse_args()
    for name, by_seed in PILOTS[options.pilot](options.work).items():
        for run in by_seed.values():
            print(described(name, run))


if __name__ == "__main__":
    main()
