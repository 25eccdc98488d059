"""Every shipped configuration parses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genalign import assets
from genalign.cli.config import Compare, ConfigurationError, Steer, Train, TrainNoiseAware, parse
from tests.packages import ROOT, folder_of
from tests.rewards.tiny_clap import write_clap

SHIPPED = sorted((ROOT / "scripts" / "configs").glob("*/*.yaml"))
COMPARISONS = [path for path in SHIPPED if path.parent.name == "compare" and not path.stem.startswith("base_")]
SEARCHES = {"steer": Steer, "noise_aware": TrainNoiseAware}
CONFIGS = [path for path in SHIPPED if path.parent.name == "train" or path.stem.startswith("base_")]


DEMOS = sorted((folder_of("genalign") / "assets").glob("demo*.yaml"))


@pytest.mark.parametrize("path", [*CONFIGS, *DEMOS], ids=lambda path: path.stem)
def test_configurations_parse(path: Path) -> None:
    reward = ["--rewards.mine.function", "rewards.shapes.ShapesReward"]
    settings, plain = parse(Train, ["--config", str(path), *reward], "train")
    assert settings.rewards["mine"].weight == 1.0
    assert plain["recipe"]["class_path"].startswith("genalign.algorithms.recipes.")


@pytest.fixture
def any_clap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random CLAP stands in for the embedded one, which need not be there for a configuration to be sound."""
    folder, resolve = write_clap(tmp_path / "clap"), assets.resolve
    monkeypatch.setattr(assets, "resolve", lambda name: str(folder) if name == "tones-clap" else resolve(name))


@pytest.mark.usefixtures("any_clap")
@pytest.mark.parametrize("kind", SEARCHES)
def test_searches_parse(kind: str) -> None:
    found = [path for path in SHIPPED if path.parent.name == kind]
    assert found
    for path in found:
        if "runs/" in path.read_text().split("model:")[1]:
            continue  # a student of a reward that is trained before it
        settings, _ = parse(SEARCHES[kind], ["--config", str(path)], kind)
        assert settings.rewards


def _compared() -> list[tuple[Path, str]]:
    made = [(path, parse(Compare, ["--config", str(path)], "compare")[0]) for path in COMPARISONS]
    return [(path, name) for path, comparison in made for name in comparison.runs]


@pytest.mark.usefixtures("any_clap")
@pytest.mark.parametrize(("path", "name"), _compared())
def test_what_a_comparison_compares_parses(
    path: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    comparison, plain = parse(Compare, ["--config", str(path)], "compare")
    own = tmp_path / "own.json"
    own.write_text(json.dumps(plain["runs"][name]))
    settings, _ = parse(Train, ["--config", str(path.parent / comparison.base), "--config", str(own)], "train")
    assert settings.training.max_nfe and settings.training.max_nfe <= 150_000


@pytest.mark.parametrize(
    ("kind", "required"),
    [
        (Train, ["--recipe", "genalign.algorithms.recipes.flow_grpo"]),
        (Steer, ["--prompts", "p.txt", "--strategy", "genalign.search.BestOfN"]),
    ],
)
def test_rewards_are_named_on_the_command_line(kind: type, required: list[str]) -> None:
    reward = ["--rewards.mine.function", "rewards.shapes.ShapesReward"]
    settings, _ = parse(kind, ["--output", "x", *required, *reward], "t")
    assert list(settings.rewards) == ["mine"]
    with pytest.raises(ConfigurationError, match="rewards is empty: name at least one"):
        parse(kind, ["--output", "x", *required], "t")
