"""The proofs of few-step students: their commands, one tiny round of every arm, and the configuration of the docs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from genalign.cli.evaluate_settings import EvaluateShapes
from genalign.cli.main import main
from genalign.cli.parsing import parse
from genalign.diffusion.transitions import CPS, ODE
from genalign.evaluation.evaluate import load_evaluation
from genalign.worlds import shapes
from rewards.regressor import Regressor
from rewards.shapes import ShapesReward
from scripts.benchmarks.few_steps import (
    KERNELS,
    STEPS,
    base_evaluations,
    base_records,
    collect_pool,
    evaluation_arguments,
    renders,
)
from scripts.benchmarks.learned_proxies import PROXIES
from scripts.benchmarks.shapes_sampling import shapes_sampling
from tests.packages import ROOT

COMPARISONS = ROOT / "scripts" / "configs" / "compare"
TINY = ["--samples_per_task", "1", "--seeds", "1", "--batch_size", "4"]
ROUND = {
    "max_seconds": None,
    "before_after": None,
    "training": {"rounds": 1, "prompts_per_round": 2, "group_size": 2, "batch_size": 4, "updates_per_round": 1},
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(prompt.metadata) for prompt in shapes.prompts("train").prompts[:2]))
    return path


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("steps", STEPS)
def test_the_base_is_evaluated_on_a_shifted_grid(kernel: str, steps: int, tmp_path: Path) -> None:
    settings, _ = parse(EvaluateShapes, evaluation_arguments(kernel, steps, tmp_path)[2:], "evaluate shapes")
    assert settings.sampling.kernel == {"ode": ODE(), "cps": CPS(1.0)}[kernel]
    expected = [3 * sigma / (1 + 2 * sigma) for sigma in (1 - step / steps for step in range(steps))]
    assert list(settings.sampling.sigmas) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_the_base_in_few_steps_is_compared_with_its_most(tmp_path: Path) -> None:
    folders = base_evaluations(tmp_path, TINY)
    protocols = {load_evaluation(folder).protocol.kernel for folder in folders.values()}
    assert protocols == {"ODE()", "CPS(eta=1.0)"}
    records = base_records(folders)
    assert {record.name for record in records} >= {"ode_1.partial", "cps_8.strict", "cps_8.strict.level"}
    best = {record.name: record for record in records if record.name.startswith("ode_8.")}
    assert best.keys() == {f"ode_8.{score}{end}" for score in ("partial", "strict") for end in ("", ".level")}
    assert best["ode_8.partial"].before == best["ode_8.partial"].after == best["ode_8.partial.level"].after
    assert best["ode_8.partial.level"].before == 0


def test_students_are_sampled_at_the_noise_levels_at_which_the_base_is_measured() -> None:
    base = yaml.safe_load((COMPARISONS / "base_few_steps.yaml").read_text())
    grids = [base["sampling"]]
    for name in ("few_steps", "few_step_rewards"):
        runs = yaml.safe_load((COMPARISONS / f"shapes_{name}.yaml").read_text())["runs"]
        grids += [own["sampling"] for own in runs.values() if "sampling" in own]
    assert {grid["num_steps"] for grid in grids} == {2, 4}
    for grid in grids:
        assert grid["sigmas"] == pytest.approx(list(shapes_sampling(grid["num_steps"]).sigmas or ()), abs=1e-4)


def test_renders_show_what_the_prompts_of_an_evaluation_ask_for() -> None:
    prompts = [prompt for task in shapes.prompts("comp").by_task().values() for prompt in task[:3]]
    images = renders(prompts).load(range(len(prompts)))
    assert float(ShapesReward("strict")(images, prompts).mean()) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["few_steps", "few_step_rewards"])
def test_a_tiny_round_of_every_arm(name: str, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Regressor("shapes-clip").save(PROXIES / "head-1.safetensors")
    pool = tmp_path / "pool"
    collect_pool(pool, ["--prompts", str(prompts), "--sampling.num_steps", "2", "--batch_size", "4"])
    for arm, own in yaml.safe_load((COMPARISONS / f"shapes_{name}.yaml").read_text())["runs"].items():
        learns = own.get("training", {}).get("data", "") is not None
        training = {**ROUND["training"], "data": str(pool) if learns else None}  # type: ignore[dict-item]
        settings = {**own, **ROUND, "training": training, "prompts": str(prompts), "output": str(tmp_path / arm)}
        file = tmp_path / f"{arm}.yaml"
        file.write_text(yaml.safe_dump(settings))
        assert main(["train", "--config", str(COMPARISONS / "base_few_steps.yaml"), "--config", str(file)]) == 0
        assert (tmp_path / arm / "denoiser" / "config.json").is_file()


@pytest.mark.slow
def test_the_configuration_of_the_docs_runs(tmp_path: Path, prompts: Path) -> None:
    text = (ROOT / "docs" / "methods" / "few_steps.md").read_text()
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    pool = tmp_path / "pool"
    reward = [
        "--rewards.partial.function",
        "rewards.shapes.ShapesReward",
        "--rewards.partial.function.score",
        "partial",
    ]
    own = ["--model.path", "shapes-sd3", "--prompts", str(prompts), "--samples_per_prompt", "2"]
    assert main(["collect", "--output", str(pool), *own, *reward, "--sampling.num_steps", "2"]) == 0
    settings["training"] |= {"rounds": 1, "data": str(pool)}
    settings |= {"prompts": str(pool), "output": str(tmp_path / "student"), "before_after": None}
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(file)]) == 0
