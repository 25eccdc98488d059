"""Verdicts on reward guards from made-up records, and one tiny round of every arm of their benches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genalign.cli.main import main
from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord
from genalign.evaluation.records import PromptRecord, ResultRow
from genalign.scoring.judge_orders import both_orders
from genalign.types import Prompt
from genalign.worlds import shapes
from rewards.pairwise import BothOrders, WinRateReward
from rewards.regressor import Regressor
from rewards.shapes import rendered
from scripts.benchmarks import guards, trained_runs
from scripts.benchmarks.biased_judge import BiasedJudge
from scripts.benchmarks.guards import (
    CREDITS,
    GUARDS,
    PROXIES,
    REFERENCES,
    Guard,
    best_of,
    harmless,
    resists,
    verdict,
)
from scripts.benchmarks.learned_proxies import Overrating, fitted
from scripts.benchmarks.planted_rewards import LIKED, Taste, TinyGaps, UnsureBeyond
from scripts.benchmarks.published_results import result_rows
from scripts.benchmarks.results_tables import guards as guards_table
from tests.packages import ROOT

COMPARISONS = ROOT / "scripts" / "configs" / "compare"
BENCHES = ("honest", "planted", "planted_apart", "tiny_gaps", "rare", "criteria", "proxies", "judges")


def arms(bench: str) -> list[str]:
    return list(yaml.safe_load((COMPARISONS / f"shapes_{bench}.yaml").read_text())["runs"])


ARMS = [(bench, arm) for bench in BENCHES for arm in arms(bench)]
PROMPTS = shapes.prompts("train").prompts[:2]


def row(mean: float, reach: float = 0.02) -> ResultRow:
    return ResultRow("a", "strict", mean, mean - reach, mean + reach, 88)


@pytest.mark.parametrize(
    ("difference", "unguarded", "guarded", "expected"),
    [
        (0.1, 0.2, 0.1, True),  # half of the shift is allowed
        (0.1, 0.2, 0.11, False),
        (0.1, 0.2, -0.11, False),  # as far the other way is no resistance
        (0.02, 0.2, 0.0, False),  # the interval touches 0
        (0.1, 0.01, 0.0, False),  # no shift to resist was shown
        (0.1, None, None, True),  # nothing planted: strict accuracy alone
        (-0.1, None, None, False),
    ],
)
def test_a_guard_resists(difference: float, unguarded: float | None, guarded: float | None, expected: bool) -> None:
    shifts = [None if shift is None else row(shift) for shift in (unguarded, guarded)]
    assert resists(row(difference), *shifts) is expected


def test_a_guard_is_harmless() -> None:
    assert harmless(row(0.1), row(0.05)) and not harmless(row(0.1), row(0.049))
    assert not harmless(row(0.03), row(0.02))  # its interval touches 0
    words = [verdict(resisted, harmed_nothing) for resisted in (True, False) for harmed_nothing in (True, False, None)]
    assert words == [
        *("resists and harmless", "resists, not harmless", "resists, harm not measured"),
        *("harmless, does not resist", "neither", "does not resist, harm not measured"),
    ]


def records(name: str, before: float, after: float) -> list[PromptRecord]:
    """Four prompts and three seeds that hardly differ."""
    return [
        PromptRecord(name, "strict", seed, "a", f"prompt {n}", before, after + 2e-3 * n, 4)
        for seed in (1, 2, 3)
        for n in range(4)
    ]


def made_up() -> list[PromptRecord]:
    """Every guard resists and halves the shift, and all but the elastic reset leave the honest gain as it is."""
    made = records("honest.flow_grpo", 0.3, 0.4)
    for arm in {guard.honest for guard in GUARDS if guard.honest}:
        made += records(f"honest.{arm}", 0.3, 0.32 if arm == "elastic_reset" else 0.4)
    for guard in GUARDS:
        made += records(f"{guard.bench}.{guard.arm}.difference", 0.2, 0.3)
    for bench in guards.PLANTED:
        own = [guard for guard in GUARDS if guard.bench == bench]
        made += [r for arm in {guard.arm for guard in own} for r in records(f"{bench}.{arm}.planted", 0.0, 0.1)]
        unguarded = {guard.unguarded for guard in own} - {guard.arm for guard in own}
        made += [r for arm in unguarded for r in records(f"{bench}.{arm}.planted", 0.0, 0.3)]
    strict = {f"{guard.bench}.{arm}" for guard in GUARDS for arm in (guard.unguarded, guard.arm)}
    return made + [r for name in strict for r in records(name, 0.3, 0.2)]


def test_outcomes_and_their_table() -> None:
    table = guards.outcomes(result_rows(made_up()))
    assert [(one["bench"], one["arm"]) for one in table] == [(guard.bench, guard.arm) for guard in GUARDS]
    verdicts = {(one["bench"], one["arm"]): one["verdict"] for one in table}
    assert verdicts["planted", "decorrelated"] == "resists and harmless"
    assert verdicts["planted", "elastic_reset"] == "resists, not harmless"
    assert verdicts["planted", "discounted"] == "resists, harm not measured"
    assert verdicts["planted", "chi_squared"] == "harmless, does not resist"  # the KL penalty halves the shift already
    assert verdicts["judges", "both_orders"] == "resists and harmless"  # a bench without a planted statistic
    lines = guards_table(json.loads(json.dumps({"guards": table}))).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(GUARDS)
    shown = next(line for line in lines if line.startswith("| planted | decorrelated |"))
    assert "| -0.097 | -0.097 | +0.103 (" in shown and "| +0.303 | +0.103 | +0.103 (" in shown
    assert shown.endswith("| resists and harmless |") and "| planted | decorrelated from another\\* |" in "\n".join(
        lines
    )
    assert "| none planted | none planted |" in next(line for line in lines if "both orders" in line)
    assert lines[-1] == "\\* ought not to help: it does not see what is planted."


def standing_records() -> list[PromptRecord]:
    """Every credit gains as much, and ends below the usual one."""
    made = [r for bench, own in CREDITS.items() for arm in own for r in records(f"{bench}.{arm}", 0.3, 0.4)]
    for bench, own in CREDITS.items():
        made += [r for arm in own[1:] for r in records(f"{bench}.{arm}.difference", 0.4, 0.3)]
    return made


def test_standing_of_credits() -> None:
    table = guards.standing(result_rows(standing_records()))
    assert all(one["rises"] for one in table) and table[0]["difference"] is None
    assert table[1]["difference"]["mean"] == pytest.approx(-0.097) and len(table) == sum(map(len, CREDITS.values()))


def test_the_parts_write_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have names of their own, as the published ones must, and the verdicts stand beside them."""
    trained: list[str] = []

    def compared(_: Path, name: str) -> dict[str, dict[int, Path]]:
        trained.append(name)
        return {arm: {} for arm in arms(name.removeprefix("shapes_"))}

    made = made_up()
    monkeypatch.setattr(guards, "write_proxies", lambda folder: trained.append(str(folder)))
    monkeypatch.setattr(guards, "write_references", lambda own: trained.append(own.name))
    monkeypatch.setattr(guards, "compared", compared)
    monkeypatch.setattr(guards, "silent_share", lambda runs: 0.5)
    monkeypatch.setattr(guards, "RESULTS", tmp_path)
    own = {"honest_records": "honest", "guard_records": None, "credit_records": None}
    for function, bench in own.items():
        monkeypatch.setattr(
            guards,
            function,
            lambda *given, bench=bench: [r for r in made if r.name.split(".")[0] == (bench or given[0])],
        )
    guards.guards_part(tmp_path)
    assert trained[0] == str(PROXIES) and set(trained[1:]) == {
        *("calibrated.json", "shapes_honest", "shapes_step_credits"),
        *(f"shapes_{guard.bench}" for guard in GUARDS),
    }
    result = json.loads((tmp_path / "guards_shapes.json").read_text())
    names = [found["name"] for found in result["rows"]]
    assert len(set(names)) == len(names) == len({r.name for r in made}) and result["kind"] == "gain"
    assert len(result["guards"]) == len(GUARDS) and result["command"] == "python scripts/benchmarks/proofs.py guards"

    made = standing_records()
    guards.credits_part(tmp_path)
    result = json.loads((tmp_path / "credits_shapes.json").read_text())
    assert len(result["credits"]) == sum(map(len, CREDITS.values()))
    assert result["groups_without_signal"] == dict.fromkeys(arms("rare"), 0.5)


def test_every_arm_of_a_verdict_is_trained() -> None:
    trained = {*ARMS, *(("honest", arm) for arm in arms("step_credits"))}
    wanted = {(guard.bench, arm) for guard in GUARDS for arm in (guard.unguarded, guard.arm)}
    wanted |= {("honest", guard.honest) for guard in GUARDS if guard.honest}
    wanted |= {(bench, arm) for bench, own in CREDITS.items() for arm in own}
    assert wanted <= trained


def test_the_best_of_several_noises() -> None:
    def record(prompt: str, sample: int, partial: float, strict: float) -> SampleRecord:
        return SampleRecord(prompt, "t", sample, 0, None, {"partial": partial, "strict": strict})

    rows = [record("a", n, partial, strict) for n, (partial, strict) in enumerate([(0.5, 0), (1, 1), (0, 0), (1, 1)])]
    rows += [record("b", n, 0.1 * n, float(n == 0)) for n in range(3)]
    protocol = EvaluationProtocol("s", "h", 1.0, (1.0, 0.0), "ODE", "float32", 4, (64, 64), 3, 3, "v")
    assert best_of(Evaluation(protocol, tuple(reversed(rows))), 3) == {("t", "a"): [1], ("t", "b"): [0.0]}


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, list[Prompt]]:
    """Two right images of each of two prompts; the second of each is spoiled, so that the first is better."""
    images = rendered("train", per_prompt=1).images.load([0, 0, 1, 1])
    images[1::2] = 0.5
    prompts = [shapes.prompts("train").prompts[place] for place in (0, 0, 1, 1)]
    return images, prompts


def test_a_biased_judge_is_as_biased_as_it_says(scenes: tuple[torch.Tensor, list[Prompt]]) -> None:
    images, prompts = scenes
    left, right, asked = images[::2], images[1::2], prompts[::2]
    fair = BiasedJudge(bias=0.0)
    assert bool((fair(left, right, asked) > 0.99).all()) and bool((fair(left, left, asked) == 0.5).all())
    judge = BiasedJudge(bias=0.2)
    _, consistency = both_orders(judge(left, right, asked), judge(right, left, asked))
    assert consistency.bias == pytest.approx(0.2, abs=1e-6) and consistency.share == 1.0
    first = BiasedJudge(bias=0.5)
    assert bool((WinRateReward(BothOrders(first))(images, prompts) == 0.5).all())  # it knows nothing
    assert WinRateReward(first)(images.flip(0), prompts[::-1]).tolist() == [1.0, 0.0, 1.0, 0.0]
    forgetful = BiasedJudge(failures=0.999)
    assert bool(forgetful(left, right, asked).isnan().all())
    with pytest.raises(ValueError, match=r"bias must be in \[0, 0.5\]"):
        BiasedJudge(bias=0.6)


def test_planted_rewards(scenes: tuple[torch.Tensor, list[Prompt]]) -> None:
    images, prompts = scenes
    red, green, blue = (LIKED[name](images) for name in ("red", "green", "blue"))
    torch.testing.assert_close(red + green + blue, torch.zeros(4), atol=1e-6, rtol=0)
    taste = Taste("saturation", 2.0)(images, prompts)
    assert taste[1] == 0 and bool((taste[::2] > 0).all())
    gaps = TinyGaps()(images, prompts)
    assert gaps[0] == pytest.approx(1.0 + 5e-4 * float(taste[0]), abs=1e-6)
    sure, unsure = UnsureBeyond(level=1.0), UnsureBeyond(level=0.0, taste=0.0)
    assert sure(images, prompts)[0] == 2.0
    noisy, again = unsure(images, prompts), unsure(images, prompts)
    moved = unsure((images + 1e-3).clamp(0, 1), prompts)
    assert bool((noisy == again).all()) and noisy[0] != 2.0 and abs(float(noisy[0] - moved[0])) > 1e-4


def test_a_head_is_fitted_to_gold_scores(scenes: tuple[torch.Tensor, list[Prompt]], tmp_path: Path) -> None:
    images, prompts = scenes

    def gold(samples: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.tensor([1.0, 0.0, 0.5, 0.0])[: len(samples)]

    network = fitted(images, prompts, gold, seed=1, steps=150)
    with torch.no_grad():
        torch.testing.assert_close(network(images, prompts), gold(images, prompts), atol=0.1, rtol=0)
    network.save(tmp_path / "head.safetensors")
    overrated = Overrating(str(tmp_path / "head.safetensors"))(images, prompts)
    assert overrated[0] == pytest.approx(0.0, abs=0.1) and overrated[2] == pytest.approx(-0.5, abs=0.1)


TINY = {
    "prompts": "prompts.jsonl",
    "training": {"rounds": 1, "max_nfe": None, "prompts_per_round": 2, "group_size": 4, "batch_size": 8},
    "lora": {"rank": 2, "alpha": 2},
    "before_after": None,
}


@pytest.fixture(scope="module")
def bench_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A working directory with two prompts, heads that were not fitted, and references of the tiny model."""
    folder = tmp_path_factory.mktemp("benches")
    lines = [json.dumps(prompt.metadata) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "tiny.json").write_text(json.dumps(TINY | {"model": {"path": str(tiny_folder)}}))
    torch.manual_seed(0)
    for number in range(1, 5):
        Regressor("shapes-clip").save(folder / PROXIES / f"head-{number}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(trained_runs, "COMPARISONS", COMPARISONS)
        guards.write_references(folder / "calibrated.json", "--config", "tiny.json", "--samples", "2")
    assert (folder / REFERENCES).exists()
    return folder


@pytest.mark.slow  # all arms take 45 seconds; that they are configured is tested by test_configs
@pytest.mark.parametrize(("bench", "arm"), ARMS)
def test_a_round_of_every_arm(bench: str, arm: str, bench_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench_folder)
    comparison = yaml.safe_load((COMPARISONS / f"shapes_{bench}.yaml").read_text())
    assert comparison["seeds"] == [81, 82, 83] and "NOT RUN" in (COMPARISONS / f"shapes_{bench}.yaml").read_text()
    Path("own.json").write_text(json.dumps(comparison["runs"][arm]))
    configs = [str(COMPARISONS / comparison["base"]), "own.json", "tiny.json"]
    output = f"{bench}-{arm}"
    assert main(["train", *(part for path in configs for part in ("--config", path)), "--output", output]) == 0
    (line,) = (Path(output) / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["failed_rewards"] == 0 and metrics["nfe"] > 0


@pytest.mark.slow
def test_records_of_finished_runs(bench_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms of a bench with evaluations before and after: differences, planted shifts, and the best of three."""
    monkeypatch.chdir(bench_folder)
    guard = Guard("tiny_gaps", "leave_one_out", "group")
    monkeypatch.setattr(guards, "GUARDS", (guard,))
    comparison = yaml.safe_load((COMPARISONS / "shapes_tiny_gaps.yaml").read_text())
    evaluated = {"before_after": {"prompts": "shapes:comp", "samples_per_task": 6, "seeds": 3, "batch_size": 32}}
    Path("evaluated.json").write_text(json.dumps(evaluated))
    for arm in (guard.arm, guard.unguarded):
        Path("own.json").write_text(json.dumps(comparison["runs"][arm]))
        configs = [str(COMPARISONS / comparison["base"]), "own.json", "tiny.json", "evaluated.json"]
        arguments = [part for path in configs for part in ("--config", path)]
        assert main(["train", *arguments, "--output", f"finished/{arm}"]) == 0
    runs = {arm: {81: Path("finished") / arm} for arm in (guard.arm, guard.unguarded)}
    rows = {found.name: found for found in result_rows(guards.guard_records("tiny_gaps", runs))}
    arms_of_rows = [f"tiny_gaps.{arm}{part}" for arm in ("group", "leave_one_out") for part in ("", ".planted")]
    assert list(rows) == [*arms_of_rows, "tiny_gaps.leave_one_out.difference"]
    prompts = rows["tiny_gaps.leave_one_out.difference"].n
    assert all(found.n == prompts for found in rows.values()) and prompts > 6
    planted = guards.planted_records("a", 81, runs["group"][81], Taste("saturation"))
    assert all(0 < record.before < 1 and record.n == 3 for record in planted)
    best = guards.best_of_records("a", 81, runs["group"][81])
    assert len(best) == prompts and all(record.n == 1 for record in best)
    assert 0 <= guards.silent_share(runs["group"].values()) <= 1
