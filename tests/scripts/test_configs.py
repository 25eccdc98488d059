"""Shipped configurations parse, say whether they were run, and are what accelerate launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from genalign import assets
from genalign.algorithms.credit import GroupRelative
from genalign.algorithms.losses import kl_penalty
from genalign.algorithms.step_credit import RewardGain
from genalign.algorithms.step_schedules import AllSteps
from genalign.cli.compare import Compare, own_settings, run_settings
from genalign.cli.parsing import ConfigurationError, parse
from genalign.cli.steer import Steer
from genalign.cli.train_noise_aware import TrainNoiseAware
from genalign.cli.train_settings import Train
from genalign.diffusion.completion import Completion
from genalign.diffusion.paths import FlowPath
from genalign.diffusion.transitions import transition
from genalign.runtime.distributed import ProcessGroup
from genalign.runtime.fsdp import Sharding, sharding_from_environment
from genalign.training.trust_region import TrustRegion
from genalign.types import Grid, PromptSet
from tests.packages import ROOT, folder_of
from tests.rewards.tiny_clap import write_clap

CONFIGS = ROOT / "scripts" / "configs"
DEMOS = sorted((folder_of("genalign") / "assets").glob("demo*.yaml"))
PUBLISHED = [path for path in sorted((CONFIGS / "train").glob("*.yaml")) if not path.stem.startswith("shapes_")]
PRESETS = [assets.preset(name) for name in assets.presets()]
EMBEDDED = [*DEMOS, CONFIGS / "train" / "shapes_flow_grpo_partial.yaml", *sorted(CONFIGS.glob("compare/base_*.yaml"))]
TUNING = CONFIGS / "compare" / "shapes_tuning.yaml"
COMPARISONS = [  # those without runs are variants of another one's
    path
    for path in sorted(CONFIGS.glob("compare/*.yaml"))
    if not path.stem.startswith("base_") and "runs" in yaml.safe_load(path.read_text())
]
SEARCHES = {"steer": Steer, "noise_aware": TrainNoiseAware}


@pytest.mark.parametrize("path", [*EMBEDDED, *PUBLISHED], ids=lambda path: path.stem)
def test_training_configurations_parse(path: Path) -> None:
    reward = ["--rewards.mine.function", "rewards.shapes.ShapesReward"]
    settings, plain = parse(Train, ["--config", str(path), *reward], "train")
    written = yaml.safe_load(path.read_text())
    assert settings.rewards["mine"].weight == 1.0 and set(settings.rewards) == {"mine", *written["rewards"]}
    assert plain["model"]["path"] == written["model"]["path"]
    assert plain["recipe"]["class_path"] == f"genalign.{written['recipe']['class_path'].split('.')[-1]}"


@pytest.mark.parametrize("path", [*PUBLISHED, *PRESETS], ids=lambda path: path.stem)
def test_a_configuration_of_a_large_model_has_nothing_of_a_world_and_says_that_it_was_not_run(path: Path) -> None:
    text = path.read_text()
    assert any("NOT RUN" in line for line in text.splitlines()[:3])
    assert "shapes" not in text and "tones" not in text


@pytest.mark.parametrize("path", [*PUBLISHED, *PRESETS], ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16, 32, 64])
def test_every_configuration_is_shared_by_any_number_of_processes(path: Path, processes: int) -> None:
    reward = ["--rewards.mine.function", "rewards.shapes.ShapesReward", "--output", "unused", "--prompts", "any.txt"]
    settings, _ = parse(Train, ["--config", str(path), *reward], "train")
    prompts, unit = PromptSet.of([str(number) for number in range(64)]), settings.recipe.objective.unit
    fitted = settings.training.fit(prompts, unit, ProcessGroup(0, processes))
    batches = fitted.batch_sizes(unit, processes)
    assert min(batches) > 0 and max(batches) <= fitted.batch_size and len(batches) % processes == 0


def _penalty_by_its_published_form(name: str) -> tuple[Tensor, Tensor]:
    """The distances (S,) of the trained steps by a configuration, and by the published code's own formula."""
    settings, _ = parse(Train, ["--config", str(CONFIGS / "train" / name)], "train")
    sigma = torch.linspace(1, 0, 11, dtype=torch.float64)
    sigma = 3 * sigma / (1 + 2 * sigma)  # SD3's shift of 3
    grid, kernel = Grid(1000 * sigma[:-1], 1 - sigma, sigma), settings.recipe.kernel
    steps = torch.tensor(settings.recipe.steps(FlowPath(), grid, 0, 0))
    x, v, v_ref = (torch.randn(len(steps), 4, generator=torch.Generator().manual_seed(n)).double() for n in range(3))
    moves = [transition(FlowPath(), kernel, x, output, grid[steps]) for output in (v, v_ref)]
    ours = kl_penalty(settings.recipe.objective.kl_form, *moves, v, v_ref, grid[steps])
    last = torch.where(sigma[steps] == 1, sigma[1], sigma[steps])
    std_dev_t = 0.7 * (sigma[steps] / (1 - last)).sqrt()
    return ours, (moves[0].mean - moves[1].mean).square().mean(1) / (2 * std_dev_t**2)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_kl_of_published_settings_is_the_published_one(path: Path) -> None:
    ours, published = _penalty_by_its_published_form(path.name)
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=0)


@pytest.fixture
def any_clap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the embedded CLAP, which need not be there, by a tiny random one."""
    folder, resolve = write_clap(tmp_path / "clap"), assets.resolve
    monkeypatch.setattr(assets, "resolve", lambda name: str(folder) if name == "tones-clap" else resolve(name))


@pytest.mark.usefixtures("any_clap")
@pytest.mark.parametrize("kind", SEARCHES)
def test_searches_parse(kind: str) -> None:
    paths = sorted((CONFIGS / kind).glob("*.yaml"))
    assert paths
    for path in paths:
        if "runs/" in path.read_text().split("model:")[1]:
            continue  # a student of a reward that is trained first
        settings, _ = parse(SEARCHES[kind], ["--config", str(path)], kind)
        assert settings.rewards


def _runs() -> list[tuple[Path, str]]:
    comparisons = [(path, parse(Compare, ["--config", str(path)], "compare")[0]) for path in COMPARISONS]
    return [(path, name) for path, comparison in comparisons for name in comparison.runs]


@pytest.mark.usefixtures("any_clap")
@pytest.mark.parametrize(("path", "name"), _runs())
def test_every_run_of_a_comparison_parses(
    path: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    comparison, plain = parse(Compare, ["--config", str(path)], "compare")
    own = tmp_path / "own.json"
    own.write_text(json.dumps(plain["runs"][name]))
    settings, _ = parse(Train, ["--config", str(path.parent / comparison.base), "--config", str(own)], "train")
    limits = settings.training.max_nfe, settings.max_seconds
    assert any(limits) and (limits[0] or 0) <= 150_000 and (limits[1] or 0) <= 900
    grid = Grid(
        torch.arange(len(sigmas := settings.sampling.sigmas)),
        1 - (sigma := torch.tensor([*sigmas, 0.0]).double()),
        sigma,
    )
    if path.stem.startswith("shapes"):
        settings.recipe.steps(FlowPath(), grid, 0, settings.training.seed)  # refuses too few steps for the recipe


@pytest.mark.parametrize("name", ["shapes_methods", "shapes_finalists", "shapes_finalists_20_steps"])
def test_the_methods_have_equal_budgets_and_their_own_seeds(name: str) -> None:
    comparison, plain = parse(Compare, [str(CONFIGS / "compare" / f"{name}.yaml")], "compare", first="config")
    assert 100 not in comparison.seeds and comparison.budgets == "equal" and not comparison.first_seed_only
    base = yaml.safe_load((CONFIGS / "compare" / comparison.base).read_text())
    budgets = set()
    for own in own_settings(plain).values():
        training, sampling = base["training"] | own.get("training", {}), base["sampling"] | own.get("sampling", {})
        assert "held_out" not in own and sampling["guidance"] == 1 and "learning_rate_schedule" not in training
        budgets.add((own.get("max_seconds", base["max_seconds"]), training["rounds"], training.get("max_nfe")))
    assert len(budgets) == 1 and base["held_out"]["every_seconds"] == 60


ABLATIONS = {  # arms that change one thing of a method, and take its learning rate
    "flow_grpo_every_step": "flow_grpo",
    "flow_grpo_cps": "flow_grpo",
    "dense_grpo_floor": "dense_grpo",
    "dense_grpo_half": "dense_grpo",
    "dense_grpo_recalibrated": "dense_grpo",
    "prdp_4": "prdp",
}


def test_every_method_is_tuned_by_the_same_settings_beforehand() -> None:
    stage = [str(CONFIGS / "compare" / "shapes_methods.yaml")]
    arms = own_settings(parse(Compare, stage, "compare", first="config")[1])
    tuning, plain = parse(Compare, [*stage, "--config", str(TUNING)], "compare", first="config")
    runs, settings = own_settings(plain), list(plain["variants"].values())
    assert tuning.seeds == [100] and tuning.output != "runs/compare-methods"
    assert set(tuning.only) == arms.keys() - ABLATIONS.keys() and len(runs) == 3 * len(tuning.only)
    for variant in settings:
        assert variant.keys() == {"max_seconds", "before_after", "training"}
        assert variant["max_seconds"] == 240 and variant["before_after"]["prompts"] == "shapes:iid"  # comp stays unseen
    rates = [variant["training"] for variant in settings]
    far = {"trust_region": {"target": 2 * TrustRegion().target}}
    assert rates == [{"learning_rate": "auto"}, {"learning_rate": "auto", **far}, {"learning_rate": 3e-3}]
    base = yaml.safe_load((CONFIGS / "compare" / tuning.base).read_text())
    rate_of = {
        name: {
            key: value
            for key, value in {**base["training"], **own.get("training", {})}.items()
            if key in ("learning_rate", "trust_region")
        }
        for name, own in arms.items()
    }
    assert all(rate in rates for rate in rate_of.values())
    assert all(rate_of[arm] == rate_of[method] for arm, method in ABLATIONS.items())


@pytest.mark.usefixtures("any_clap")
@pytest.mark.parametrize("name", ["flow_grpo", "adv_grpo", "guard_grpo", "mix_grpo", "ddpo"])
def test_methods_differ_in_nothing_but_their_idea(name: str) -> None:
    """All of them divide advantages by the global standard deviation."""
    file = CONFIGS / "compare" / "shapes_methods.yaml"
    comparison, plain = parse(Compare, [str(file)], "compare", first="config")
    settings, _ = run_settings(str(file.parent / comparison.base), name, own_settings(plain)[name])
    assert settings.recipe.credit == GroupRelative("global")


@pytest.mark.parametrize("name", ["shapes_methods", "shapes_finalists"])
def test_dense_credit_is_as_published(name: str) -> None:
    file = CONFIGS / "compare" / f"{name}.yaml"
    comparison, plain = parse(Compare, [str(file)], "compare", first="config")
    settings, _ = run_settings(str(file.parent / comparison.base), "dense_grpo", own_settings(plain)["dense_grpo"])
    recipe = settings.recipe
    assert (recipe.schedule, recipe.completion, recipe.credit) == (AllSteps(), Completion(None), RewardGain(0.0))


def test_runs_by_time_end_by_their_time_alone() -> None:
    base = yaml.safe_load((CONFIGS / "compare" / "base_shapes_by_time.yaml").read_text())["training"]
    assert base["max_rounds_without_credit"] is None and base["max_skipped_updates"] >= base["rounds"]


@pytest.mark.parametrize(
    ("kind", "method"), [(Train, ["--recipe", "genalign.flow_grpo"]), (Steer, ["--strategy", "genalign.BestOfN"])]
)
def test_required_settings_suffice_on_the_command_line(kind: type, method: list[str]) -> None:
    required = ["--output", "x", "--model.path", "shapes-sd3", "--prompts", "p.txt", *method]
    settings, _ = parse(kind, [*required, "--rewards.mine.function", "rewards.shapes.ShapesReward"], "t")
    assert list(settings.rewards) == ["mine"]
    with pytest.raises(ConfigurationError, match="rewards is empty: name at least one"):
        parse(kind, required, "t")


def test_evaluations_are_off_by_default() -> None:
    required = ["--output", "x", "--model.path", "m", "--prompts", "p.txt", "--recipe", "genalign.nft"]
    settings, _ = parse(Train, [*required, "--rewards.mine.function", "rewards.jpeg.compressibility"], "train")
    assert settings.evaluation_prompts() == {} and settings.before_after is None
    assert settings.held_out.every == settings.reward_hacking.every == 0


ACCELERATE = {
    "ddp": (8, None),
    "two_nodes": (16, None),
    "fsdp2": (8, Sharding(8, reshard_after_forward=True)),
    "zero2": (8, Sharding(8, reshard_after_forward=False)),
    "fsdp2_two_nodes": (16, Sharding(16, replicas=2)),
}


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_passes_on_the_settings_of_a_launcher_file(name: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = str(CONFIGS / "accelerate" / f"{name}.yaml")
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "train.py"]))
    assert launch.multi_gpu or launch.use_fsdp
    processes, sharding = ACCELERATE[name]
    assert launch.num_processes == processes
    assert sharding_from_environment(prepare_multi_gpu_env(launch), processes) == sharding
