"""Every published row is recomputed from its per-seed, per-prompt records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from genalign.evaluation.records import PromptRecord, gain_row
from genalign.runtime.files import without_infinities
from scripts.benchmarks.guards import outcomes, standing
from scripts.benchmarks.method_comparisons import arrivals, at_equal_cost
from scripts.benchmarks.overoptimization import predictors
from scripts.benchmarks.published_results import Measurement, median_row, read_records, result_rows
from scripts.benchmarks.steering_table import level_of
from tests.packages import ROOT

RESULTS = ROOT / "docs" / "results"
REQUIRED = {
    "demo_shapes": {"demo", "demo.partial", "demo.content"},
}
_LEARNED = {"verifier", "single", "ensemble", "half", "ensemble.difference"}
_FALLING = {"falling.single", "falling.ensemble", "falling.ensemble.difference"}
ONCE_MEASURED = {  # rows of results that are not there yet
    "overoptimization_shapes": {
        *("best_of_n.1000_pairs_10_flipped", "flow_grpo.1000_pairs_10_flipped", "flow_grpo.verifier", "dragon"),
        *("1000_pairs_10_flipped.turn", "1000_pairs_10_flipped.lost", "kl.turn_difference", "par.difference"),
        "early_stop.difference",
    },
    "learned_rewards_shapes": _LEARNED | _FALLING,
    "learned_rewards_tones": _LEARNED | _FALLING,
    "overrated_shapes": {"searched.turn_3", "searched.over_random", "flow_grpo.equal_distance", "flow_grpo.difference"},
    "references_shapes": {"pruned_references.difference", "plain_references.difference", "pruning.difference"},
    "credits_shapes": {"honest.flow_grpo", "honest.turning_point_over_dense_grpo", "rare.ngrpo.variety"},
    "guards_shapes": {"honest.flow_grpo", "planted.decorrelated.difference", "criteria.balance.least_cosine"},
    "pathwise_shapes": {"draft", "draft.difference", "draft.partial", "draft.alarms", "draft.minutes"},
    "pathwise_hacking_shapes": {"draft.alarm_lead", "draft.alarms", "draft.falls"},
    "pathwise_guards_shapes": {"none.reached", "half_weight.reached"},
    "gradient_growth_shapes": {"draft_8_over_1", "draft_8.memory", "draft_8.memory_kept", "draft_lv_2_over_0"},
    "soup_shapes": {"share-0.250.red.step", "share-1.000.bright", "middle.red", "middle.bright"},
    "users_shapes": {"users.red", "users.unseen", "users.unseen_over_bright", "users.red_over_unseen"},
    "few_step_base_shapes": {"cps_2.partial", "cps_2.partial.level"},
    "few_steps_shapes": {"consistency_2.partial", "rg_lcd_2.difference"},
    "few_step_rewards_shapes": {"reward_instruct.clip", "reward_instruct.distance", "reward_instruct.variety_kept"},
    "offline_shapes": {"sft", "gdro", "dp2o_sr - dpo_hybrid", "dp2o_sr - dp2o_sr_unweighted"},
    "matching_losses_shapes": {"crd", "dgpo", "crd - crd_uncentered", "crd - nft", "dgpo - flow_grpo"},
    "demo_tones": {"demo", "demo.partial"},
    "audio_tones": {"ddpo", "dragon_instance", "dragon_fad", "noise_aware_pruning"},
    "pathwise_tones": {"draft.clap", "draft.strict", "sft.strict"},
}


def test_required_results_are_published() -> None:
    assert REQUIRED.keys() <= {path.stem for path in (RESULTS / "raw").glob("*.jsonl")}


@pytest.mark.parametrize("path", sorted((RESULTS / "raw").glob("*.jsonl")), ids=lambda path: path.stem)
def test_published_rows_are_recomputed_from_records(path: Path) -> None:
    result, records = json.loads((RESULTS / f"{path.stem}.json").read_text()), read_records(path)
    published = {row["name"]: row for row in result["rows"]}
    assert {**REQUIRED, **ONCE_MEASURED}.get(path.stem, set()) <= published.keys()
    for row in result.get("steering", ()):
        assert row["scores"] == pytest.approx(level_of(records, row)["scores"], abs=1e-9)
    if "equal" in result:
        assert result["equal"] == at_equal_cost(result["evaluations"])
    if "arrivals" in result:
        assert result["arrivals"] == arrivals(result["evaluations"])
    if "predictors" in result.get("measures", {}):
        assert result["measures"]["predictors"] == predictors(result["measures"]["rewards"])
    gains = [record for record in records if isinstance(record, PromptRecord)]
    if "guards" in result:
        assert result["guards"] == outcomes(gains)
    if "credits" in result:
        assert result["credits"] == standing(gains)
    recomputed = result_rows(records)
    assert {row.name for row in recomputed} == published.keys()
    for row in recomputed:
        for name, value in without_infinities(vars(row)).items():
            assert published[row.name][name] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value)


def _record(seed: int, task: str, prompt: str, before: float, after: float) -> PromptRecord:
    return PromptRecord("m", "strict", seed, task, prompt, before, after, 4)


def test_gain_row_matches_hand_computed_numbers() -> None:
    gains = {"a": (0.1, 0.1, 0.3, 0.3), "b": (0.4, 0.4, 0.5, 0.5)}
    records = [
        _record(seed, task, f"{task}{number}", 0.0, gain + 0.01 * seed)
        for seed in (0, 1, 2)
        for task, values in gains.items()
        for number, gain in enumerate(values)
    ]
    row = gain_row(records)
    assert row.mean == pytest.approx((0.2 + 0.45) / 2 + 0.01)
    assert row.n == 8
    # over seeds: 0.325, 0.335, 0.345 -> +-4.303 * 0.01 / sqrt(3); over prompts: variances 0.04 / 3 and 0.01 / 3, of the
    # mean a sixteenth of their sum, times Student's 2.677 with Welch and Satterthwaite's 4.41 degrees; in squares both
    # add
    over_prompts, over_seeds = 2.677174 * (0.05 / 48) ** 0.5, 4.302653 * 0.01 / 3**0.5
    assert row.high - row.mean == pytest.approx((over_prompts**2 + over_seeds**2) ** 0.5, abs=1e-6)
    few = gain_row([record for record in records if record.task == "a" or record.prompt == "b0"])
    assert few.n == 5 and few.high == math.inf  # the spread of the only prompt of task b is unknown


def test_a_number_of_the_whole_run_has_the_interval_of_its_runs() -> None:
    """Gains of 0.1, 0.2 and 0.3: Student's 4.302653 * 0.1 / sqrt(3); no alarm in three runs: the exact 0.707598."""
    row = gain_row([_record(seed, "all", "the whole run", 0.0, 0.1 * seed) for seed in (1, 2, 3)])
    assert (row.mean, row.n) == (pytest.approx(0.2), 3)
    assert row.high - row.mean == pytest.approx(4.302653 * 0.1 / 3**0.5, abs=1e-6)
    none = gain_row([_record(seed, "all", "the whole run", 0.0, 0.0) for seed in (1, 2, 3)])
    assert (none.mean, none.n) == (0.0, 3) and none.high == pytest.approx(0.707598, abs=1e-6)


def test_median_row_matches_hand_computed_numbers() -> None:
    values = [1.0, 5.0, 2.0, 4.0, 3.0, 7.0, 6.0]
    row = median_row([Measurement("speed", "images/s", value) for value in values])
    assert (row.mean, row.low, row.high, row.n) == (4.0, 1.0, 7.0, 7)  # of 7, the range covers 98 %, the next 87 %
    many = median_row([Measurement("speed", "images/s", float(value)) for value in range(1, 16)])
    assert (many.low, many.high) == (4.0, 12.0)  # P(X <= 3) = 0.0176 for 15 fair coins


def test_gain_row_refuses_records_of_two_names() -> None:
    other = PromptRecord("n", "strict", 0, "a", "p", 0.0, 1.0, 4)
    with pytest.raises(ValueError, match="a gain is computed for one name and one metric"):
        gain_row([_record(0, "a", "p", 0.0, 1.0), other])
