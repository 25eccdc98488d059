"""``genalign soup``: a mixture that diffusers and genalign load, the front of two adapters, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import pipelines
from genalign.cli.lora_formats import TrainedAdapter
from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from pipelines import SD3


def _adapter(tiny_folder: Path, folder: Path, rank: int, seed: int) -> Path:
    """Write an adapter with random weights, of alpha = 2 rank."""
    pipeline = SD3.load(tiny_folder)
    policy = Policy(pipeline.denoiser, Lora(rank=rank, alpha=2 * rank), seed=seed)
    for parameter in policy.parameters:
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed + parameter.numel()))
    assert policy.config is not None
    pipeline.save_lora(folder, policy.adapter_state(), policy.config)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [_adapter(tiny_folder, folder / f"rank-{rank}", rank, seed=rank) for rank in (1, 3)]


def _changes(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each layer's weights."""
    adapter = TrainedAdapter.read(folder)
    folded = {name.removeprefix(f"{adapter.component}."): tensor for name, tensor in adapter.folded().items()}
    return {layer: folded[f"{layer}.lora_B.weight"] @ folded[f"{layer}.lora_A.weight"] for layer in adapter.alphas}


def test_a_mixture_is_an_adapter_like_any_other(tiny_folder: Path, adapters: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "mixed"
    arguments = ["--adapters", json.dumps([*map(str, adapters)]), "--output", str(output)]
    assert main(["soup", *arguments, "--weights", "[0.25, 0.75]"]) == 0
    one, other = map(_changes, adapters)
    mixed = _changes(output)
    assert mixed.keys() == one.keys()
    for layer, change in mixed.items():
        torch.testing.assert_close(change, 0.25 * one[layer] + 0.75 * other[layer])
    pipeline = pipelines.load(tiny_folder)
    before = {name: tensor.clone() for name, tensor in pipeline.denoiser.state_dict().items()}
    pipeline.load_lora(output)
    pipeline.save_merged(tmp_path / "merged", whole=False)
    after = pipeline.denoiser.state_dict()
    for layer, change in mixed.items():
        torch.testing.assert_close(after[f"{layer}.weight"] - before[f"{layer}.weight"], change, atol=1e-5, rtol=1e-4)
    assert main(["soup", *arguments, "--weights", "[1, 1]"]) == 2  # it exists


@pytest.mark.slow
def test_a_front_evaluates_the_mixtures_of_two_adapters(
    tiny_folder: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a circle\ntwo squares\n")
    config = {
        "output": "unused",
        "model": {"path": str(tiny_folder)},
        "prompts": str(tmp_path / "prompts.txt"),
        "sampling": {"num_steps": 2, "guidance": 1.0},
        "seeds": 1,
        "rewards": {
            "size": {"function": "rewards.jpeg.incompressibility"},
            "small": {"function": "rewards.jpeg.compressibility"},
        },
    }
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "front"
    arguments = ["--adapters", json.dumps([*map(str, adapters)]), "--output", str(output), "--points", "3"]
    assert main(["soup", *arguments, "--evaluate", str(tmp_path / "evaluation.yaml")]) == 0
    front = json.loads((output / "front.json").read_text())
    assert [point["share"] for point in front] == [0, 0.5, 1] and front[0]["scores"].keys() == {"size", "small"}
    assert len({point["scores"]["size"]["low"] for point in front}) == 3
    page = (output / "front.html").read_text()
    assert "3 mixtures of rank-1 and rank-3" in page and "small against size" in page
    torch.testing.assert_close(_changes(output / "share-0.000" / "lora"), _changes(adapters[0]), check_dtype=False)
    assert main(["soup", *arguments, "--evaluate", str(tmp_path / "evaluation.yaml")]) == 0  # nothing is left to do
    assert json.loads((output / "front.json").read_text()) == front
    arguments[1] = json.dumps([*map(str, reversed(adapters))])
    assert main(["soup", *arguments, "--evaluate", str(tmp_path / "evaluation.yaml")]) == 2
    assert "share-0.000/lora has another mixture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "[1.0]"], "give one weight for each adapter: there are 2 adapters and 1 weights"),
        ([], "give weights for one mixture, or evaluate: CONFIG"),
        (["--weights", "[1, 1]", "--rank", "0"], "rank must be at least 1, not 0"),
        (["--evaluate", "x.yaml", "--points", "1"], "a front is between two adapters, with at least 2 points"),
    ],
)
def test_wrong_settings_are_named(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    own = ["--adapters", json.dumps([*map(str, adapters)]), "--output", str(tmp_path / "x")]
    assert main(["soup", *own, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_other_base_models_are_refused(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name in ("one", "two"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"model": {"path": f"base-{name}"}}))
        runs.append(str(run))
    assert main(["soup", "--adapters", json.dumps(runs), "--weights", "[1, 1]", "--output", str(tmp_path / "x")]) == 2
    assert "the adapters have different base models" in capsys.readouterr().err
