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
    PAIRS,
    REFERENCES,
    Guard,
    best_of,
    harmless,
    resists,
    verdict,
)
from scripts.benchmarks.learned_proxies import PROXIES, Overrating, fitted
from scripts.benchmarks.planted_rewards import LIKED, Taste, TinyGaps, UnsureBeyond
from scripts.benchmarks.published_results import result_rows
from scripts.benchmarks.results_tables import credits as credits_table
from scripts.benchmarks.results_tables import guards as guards_table
from tests.packages import ROOT

COMPARISONS = ROOT / "scripts" / "configs" / "compare"
BENCHES = ("honest", "planted", "planted_apart", "tiny_gaps", "rare", "criteria", "proxies", "judges")


def settings(bench: str) -> dict[str, Any]:
    """The settings of the arms of a bench, from its file."""
    runs: dict[str, Any] = yaml.safe_load((COMPARISONS / f"shapes_{bench}.yaml").read_text())["runs"]
    return runs


def arms(bench: str) -> list[str]:
    return list(settings(bench))


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
        (0.1, 0.01, 0.0, None),  # no shift to resist was shown
        (-0.1, 0.01, 0.0, None),
        (0.1, None, None, True),  # nothing planted: strict accuracy alone
        (-0.1, None, None, False),
    ],
)
def test_a_guard_resists(
    difference: float, unguarded: float | None, guarded: float | None, expected: bool | None
) -> None:
    shifts = [None if shift is None else row(shift) for shift in (unguarded, guarded)]
    assert resists(row(difference), *shifts) is expected


def test_a_guard_is_harmless() -> None:
    assert harmless(row(0.1), row(0.05)) and not harmless(row(0.1), row(0.049))
    assert not harmless(row(0.03), row(0.02))  # its interval touches 0
    words = [verdict(resisted, harmed_nothing) for resisted in (True, False) for harmed_nothing in (True, False, None)]
    assert words == [
        *("resists and harmless", "resists, not harmless", "resists, no honest run"),
        *("harmless, does not resist", "neither", "does not resist, no honest run"),
    ]
    assert verdict(None, True) == verdict(None, None) == "not decided: the reward was not exploited"


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
    table = guards.outcomes(made_up())
    assert {one["seeds"] for one in table} == {3}
    assert [(one["bench"], one["arm"]) for one in table] == [(guard.bench, guard.arm) for guard in GUARDS]
    verdicts = {(one["bench"], one["arm"]): one["verdict"] for one in table}
    assert verdicts["planted", "decorrelated"] == "resists and harmless"
    assert verdicts["planted", "elastic_reset"] == "resists, not harmless"
    assert verdicts["planted", "discounted"] == "resists, no honest run"
    assert verdicts["planted", "chi_squared"] == "harmless, does not resist"  # the KL penalty halves the shift already
    assert verdicts["judges", "both_orders"] == "resists and harmless"  # a bench without a planted statistic
    lines = guards_table(json.loads(json.dumps({"guards": table}))).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(GUARDS)
    shown = next(line for line in lines if line.startswith("| planted | decorrelated |"))
    assert "| 3 | -0.097 | -0.097 | +0.103 (" in shown and "| +0.303 | +0.103 | +0.103 (" in shown
    assert shown.endswith("| resists and harmless |") and "| planted | decorrelated from another\\* |" in "\n".join(
        lines
    )
    assert "| none planted | none planted |" in next(line for line in lines if "both orders" in line)
    assert lines[-1] == "\\* ought not to help: it does not see what is planted."


def test_a_reward_that_was_not_exploited_and_runs_that_stopped_decide_nothing() -> None:
    made = [r for r in made_up() if r.name not in ("planted.frozen.planted", "judges.both_orders.difference")]
    made += records("planted.frozen.planted", 0.0, 0.0)  # a shift of 0.003, whose interval holds 0
    by_arm = {(one["bench"], one["arm"]): one for one in guards.outcomes(made)}
    assert by_arm["planted", "decorrelated"]["verdict"] == "not decided: the reward was not exploited"
    assert by_arm["planted", "decorrelated"]["resists"] is None and by_arm["planted", "decorrelated"]["harmless"]
    stopped = by_arm["judges", "both_orders"]
    assert (stopped["verdict"], stopped["seeds"], stopped["difference"]) == ("not decided: no finished runs", 0, None)
    assert "| not measured |" in guards_table({"guards": [stopped]})


def standing_records() -> list[PromptRecord]:
    """Every credit gains as much, and ends below the usual one."""
    made = [r for bench, own in CREDITS.items() for arm in own for r in records(f"{bench}.{arm}", 0.3, 0.4)]
    for bench, own in CREDITS.items():
        made += [r for arm in own[1:] for r in records(f"{bench}.{arm}.difference", 0.4, 0.3)]
    return made


def test_standing_of_credits() -> None:
    made = [r for r in standing_records() if r.seed == 1 or not r.name.startswith("honest.vgpo_min")]
    table = guards.standing(made)
    assert all(one["rises"] for one in table) and table[0]["difference"] is None
    assert table[1]["difference"]["mean"] == pytest.approx(-0.097) and len(table) == sum(map(len, CREDITS.values()))
    by_credit = {one["credit"]: one for one in table}
    assert by_credit["tempflow_grpo_branching"]["compared_with"] == "flow_grpo_fixed"  # of the same learning rate
    assert by_credit["vgpo_min"]["seeds"] == 1 and by_credit["vgpo"]["seeds"] == 3
    lines = credits_table(json.loads(json.dumps({"credits": table}))).splitlines()
    assert lines[2].startswith("| honest | flow grpo | 3 | +0.103 (") and lines[2].endswith("| yes |  |  |")
    assert "| rare | ngrpo | 3 | +0.103 (" in "\n".join(lines) and "| yes | group | -0.097 (" in "\n".join(lines)
    none = guards.standing([r for r in made if r.name != "rare.ngrpo"])
    assert [(one["gain"], one["rises"]) for one in none if one["credit"] == "ngrpo"] == [(None, False)]


def test_the_parts_write_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have names of their own, as the published ones must, and the verdicts stand beside them."""
    trained: list[str] = []

    def compared(_: Path, name: str, allow_failed: bool) -> dict[str, dict[int, Path]]:
        trained.append(name)
        return {arm: {81: tmp_path / arm} for arm in arms(name.removeprefix("shapes_"))}

    made = made_up()
    monkeypatch.setattr(guards, "write_proxies", lambda: trained.append("proxies"))
    monkeypatch.setattr(guards, "write_references", lambda own: trained.append(own.name))
    monkeypatch.setattr(guards, "compared", compared)
    monkeypatch.setattr(guards, "zero_variance_share", lambda runs: 0.5)
    monkeypatch.setattr(guards, "RESULTS", tmp_path)
    own = {"honest_records": "honest", "guard_records": None, "credit_records": None}
    for function, bench in own.items():
        monkeypatch.setattr(
            guards,
            function,
            lambda *given, bench=bench: [r for r in made if r.name.split(".")[0] == (bench or given[0])],
        )
    guards.guards_part(tmp_path)
    assert trained[0] == "proxies" and set(trained[1:]) == {
        *("calibrated.json", "shapes_honest", "shapes_step_credits"),
        *(f"shapes_{guard.bench}" for guard in GUARDS),
    }
    result = json.loads((tmp_path / "guards_shapes.json").read_text())
    names = [found["name"] for found in result["rows"]]
    assert len(set(names)) == len(names) == len({r.name for r in made}) and result["kind"] == "gain"
    assert result["guards"] == guards.outcomes(made) and result["failed"] == []
    assert len(result["guards"]) == len(GUARDS) and result["command"] == "python scripts/benchmarks/proofs.py guards"

    made = standing_records()
    guards.credits_part(tmp_path)
    result = json.loads((tmp_path / "credits_shapes.json").read_text())
    assert len(result["credits"]) == sum(map(len, CREDITS.values()))
    assert result["groups_without_signal"] == dict.fromkeys(arms("rare"), 0.5)
    assert result["credits"] == guards.standing(made)


def test_every_arm_of_a_verdict_is_trained() -> None:
    trained = {*ARMS, *(("honest", arm) for arm in arms("step_credits"))}
    wanted = {(guard.bench, arm) for guard in GUARDS for arm in (guard.unguarded, guard.arm)}
    wanted |= {("honest", guard.honest) for guard in GUARDS if guard.honest}
    wanted |= {(bench, arm) for bench, own in CREDITS.items() for arm in own}
    wanted |= {("honest", arm) for pair in (*PAIRS, *guards.COMPARED_WITH.items()) for arm in pair}
    assert wanted <= trained


def test_pilots_have_the_settings_of_the_arms_without_a_guard() -> None:
    """But for the evaluation, on val, and for what is reported beside; every such arm has a pilot."""
    pilots = settings("guard_pilots")
    files = {bench: bench for bench in (*guards.BENCHES, "rare")} | {"pathwise": "pathwise_guards"}
    wanted = {(guard.bench, guard.unguarded) for guard in GUARDS} | {("rare", "group"), ("pathwise", "none")}
    assert set(pilots) == {f"{bench}_{arm}" for bench, arm in wanted}
    for bench, arm in wanted:
        pilot, own = dict(pilots[f"{bench}_{arm}"]), dict(settings(files[bench])[arm])
        assert pilot.pop("before_after")["prompts"] == "shapes:val:colors,position,color_attr"
        for name in ("before_after", "checkpoint"):
            own.pop(name, None)
        beside = {name: pilot["rewards"][name] for name in pilot["rewards"].keys() - own["rewards"].keys()}
        assert all(reward["weight"] == 0 for reward in beside.values())
        pilot["rewards"] = {name: reward for name, reward in pilot["rewards"].items() if name not in beside}
        assert pilot == own, (bench, arm)


def test_benches_are_evaluated_on_many_prompts_with_noises_that_win_rates_can_compare() -> None:
    for bench in guards.BENCHES:
        evaluated = [own["before_after"] for own in settings(bench).values()]
        assert all(one == evaluated[0] for one in evaluated)  # or no two arms could be compared
        assert evaluated[0]["prompts"] == "shapes:comp:colors,position,color_attr"
        compares = "WinRateReward" in (COMPARISONS / f"shapes_{bench}.yaml").read_text()
        assert evaluated[0]["seeds"] == (2 if compares else 1), bench


def test_a_guard_is_as_on_its_bench_where_it_must_not_harm() -> None:
    honest = settings("honest")

    def own(bench: dict[str, Any], arm: str) -> dict[str, Any]:
        return {name: value for name, value in bench[arm]["recipe"]["init_args"].items() if name != "recipe"}

    assert own(honest, "elastic_reset") == own(settings("planted"), "elastic_reset") == {"every": 6, "decay": 0.9}
    asked = [
        rates["function"]["init_args"]
        for bench, name in ((honest, "wins_in_both_orders"), (settings("judges"), "wins_in_both_orders"))
        for rates in [bench["both_orders"]["rewards"][name]]
    ]
    assert [(one["preference"]["class_path"], one["margin"], one["opponents"]) for one in asked] == [
        ("rewards.pairwise.BothOrders", 0.05, 4)
    ] * 2
    scales = [
        bench["win_rate"]["rewards"]["wins"]["function"]["init_args"]["preference"]["init_args"]["scale"]
        for bench in (honest, settings("tiny_gaps"))
    ]
    assert scales == [20.0, 20.0]


def test_criteria_are_measured_in_their_deviation_before_training(tmp_path: Path) -> None:
    """Of two prompts the count of one rises by 1, two deviations of 1/2; clean was 1 from the start and has no unit."""

    def evaluation(*counts: float) -> Evaluation:
        scores = [
            {"count": count, "color": 0.5 * n, "position": 1.0 * n, "clean": 1.0} for n, count in enumerate(counts)
        ]
        protocol = EvaluationProtocol("s", "h", 1.0, (1.0, 0.0), "ODE", "float32", 4, (64, 64), 1, 2, "v")
        rows = [SampleRecord(f"prompt {n}", "t", 0, n, None, own) for n, own in enumerate(scores)]
        return Evaluation(protocol, tuple(rows))

    evaluation(0.0, 1.0).save(tmp_path / "before")
    evaluation(1.0, 1.0).save(tmp_path / "after")
    cosines = [{}, {"balance/least_cosine": -0.1}, {"balance/least_cosine": 0.2}, {"balance/least_cosine": 0.3}]
    lines = [json.dumps({"metrics": own}) for own in cosines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    rows = {found.name: found for found in result_rows(guards.criteria_records("balance", {81: tmp_path}))}
    assert list(rows) == ["balance.count", "balance.color", "balance.position", "balance.least_cosine"]
    assert rows["balance.count"].mean == pytest.approx(1.0) and rows["balance.color"].mean == 0
    assert rows["balance.least_cosine"].mean == pytest.approx(2 / 3)


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
    assert gaps[0] == pytest.approx(1.0 + 5e-3 * float(taste[0]), abs=1e-6)
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
    run = runs["group"][81]
    best = guards.best_of_records("a", 81, run / "before", run / "after")
    assert len(best) == prompts and all(record.n == 1 for record in best)
    assert 0 <= guards.zero_variance_share(runs["group"].values()) <= 1
