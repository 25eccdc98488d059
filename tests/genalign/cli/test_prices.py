"""genalign prices from the command line on the tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

from genalign.cli.main import main


def test_prices_writes_json(tiny_folder: Path, tmp_path: Path) -> None:
    reward = "--rewards.partial.function=rewards.shapes.ShapesReward"
    small = ["--prompts", "shapes:val", "--batch_size", "2", "--repeats", "1", "--sampling.num_steps", "3"]
    path = tmp_path / "prices.json"
    assert main(["prices", "--output", str(path), "--model.path", str(tiny_folder), reward, *small]) == 0
    prices = json.loads(path.read_text())
    assert set(prices) == {"nfe", "decode", "reward/partial"} and min(prices.values()) > 0
    options = [reward, *small, "--gradients", "true"]  # the verifier has none
    assert main(["prices", "--output", str(path), "--model.path", str(tiny_folder), *options]) == 0
    assert set(json.loads(path.read_text())) == {*prices, "nfe backward", "decode backward"}
