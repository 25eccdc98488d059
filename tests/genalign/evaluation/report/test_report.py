import base64
import json
import math
import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from genalign.evaluation.evaluate import Evaluation, SampleRecord, load_evaluation
from genalign.evaluation.report import write_report
from genalign.evaluation.report.curves import Axis, Point, binned, line_chart, ticks, whisker
from genalign.evaluation.report.reading import Comparison, read_run
from genalign.evaluation.report.samples import samples_over_rounds, thumbnail
from genalign.evaluation.report.sections import flattened, tables
from genalign.evaluation.report.summary import subject
from genalign.evaluation.report.words import (
    Verdict,
    call_words,
    count,
    duration,
    gain_verdict,
    interval,
    number,
    possible,
    scored,
    signed,
    titled,
)
from genalign.metrics.intervals import Estimate
from genalign.runtime.media import Thumbnail, writer
from genalign.runtime.waveforms import spectrogram
from tests.genalign.evaluation.report.pages import Page
from tests.genalign.evaluation.still_pipeline import PROTOCOL


def evaluation(folder, scores, size=64, protocol=PROTOCOL):
    """Saved evaluation of one task with an image of noise for every (strict, partial), three images of a prompt."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for index, (strict, partial) in enumerate(scores):
        name = f"images/{index:05d}.png"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / name)
        values = {"strict": strict, "partial": partial}
        records.append(SampleRecord(f"a circle {index // 3}", "color_attr", index, index, name, values))
    Evaluation(protocol, tuple(records)).save(folder)


def rows(rounds, **changes):
    """Rows of metrics.jsonl; a change is a value, or a function of the round."""
    held_out = {"strict": {"mean": 0.4, "low": 0.35, "high": 0.45, "n": 96}}
    recorded = []
    for index in range(rounds):
        row = {
            "round": index,
            "reward": 0.5 + index / 1000,
            "rewards": {"ocr": 0.5 + index / 10, "style/a": 0.5 - index / 10},
            "kl": None if index == 1 else index / 100,
            **{"reward_std": 0.2, "clip_fraction": 0.1, "zero_std_share": 0.25, "grad_norm": 1.0, "loss": 0.1},
            **{"log_ratio_max": 0.2, "failed_rewards": 0, "skipped_updates": 0, "learning_rate": 3e-4},
            "metrics": {"anchor": {"weight": 0.7}, "critic/accuracy": 0.9},
            "samples": (index + 1) * 96,
            "nfe": (index + 1) * 960,
            "calls": {"nfe": (index + 1) * 960, "reward/ocr": (index + 1) * 96, "nfe backward": 5},
            "held_out": held_out if index % 2 == 0 else None,
            "machine": {"seconds": (index + 1) * 90.0, "samples_per_second": 2.0, "peak_memory_bytes": 2_500_000_000},
        }
        recorded.append(row | {name: value(index) if callable(value) else value for name, value in changes.items()})
    return recorded


def write_rows(run, recorded):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in recorded))


@pytest.fixture
def run(tmp_path):
    """A finished run of 24 prompts: one image of 72 gets worse, 40 get better."""
    write_rows(tmp_path, rows(5))
    config = {"optim": {"betas": [0.9, 0.99]}, "training": {"rounds": 5}, "before_after": {}, "held_out": {"every": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "environment.json").write_text(json.dumps({"torch": "2.14.1", "accelerator": None, "cores": 2}))
    evaluation(tmp_path / "before", [(1.0, 1.0), *[(0.0, 0.5)] * 71])
    evaluation(tmp_path / "after", [(0.0, 0.25), *[(1.0, 1.0)] * 40, *[(0.0, 0.5)] * 31])
    return tmp_path


def test_a_run_is_introduced_by_its_model_method_rewards_and_prompts():
    rewards = {"my_ocr": {"weight": 2.0}, "watched": {"weight": 0.0}}
    recipe = {"class_path": "genalign.flow_grpo", "init_args": {}}
    config = {"model": {"path": "my/model"}, "recipe": recipe, "rewards": rewards, "prompts": "prompts.txt"}
    assert subject(config) == "my/model · trained by flow_grpo · rewards: my ocr · prompts: prompts.txt"
    assert subject({}) == ""


def test_intervals_of_shares_stay_within_what_is_possible():
    estimate = Estimate(0.5, -3.0, 4.0, 2)
    assert interval("partial", estimate, scored) == "0.0 % to 100.0 %"
    assert interval("partial", estimate, signed) == "\N{MINUS SIGN}100.0 to +100.0"
    assert interval("aesthetic", estimate, scored) == "\N{MINUS SIGN}3 to 4"
    assert possible("partial", estimate, least=-1.0) == Estimate(0.5, -1.0, 1.0, 2)
    without = Estimate(0.5, -math.inf, math.inf, 1)
    assert possible("partial", without, least=-1.0) == without and not without.has_interval


def test_drawn_intervals_of_shares_end_where_the_printed_ones_do(run):
    """Uncut, the one over tasks, from -2 to 3, would end short of its frame on the left."""
    before, after = (load_evaluation(run / name) for name in ("before", "after"))
    gain = Estimate(0.0, -3.0, 3.0, 30)
    comparison = Comparison({"strict": Estimate(0.5, -2.0, 3.0, 30)}, {"color_attr": {"strict": gain}}, ())
    drawn = tables(before, after, comparison)["strict"][-1].whisker
    ends = re.search(r'class="reach even" x1="([\d.]+)" x2="([\d.]+)"', drawn)
    assert ends and [float(end) for end in ends.groups()] == [6.0, 154.0] and 'class="zero" x1="80.0"' in drawn
    write_rows(run, rows(5, held_out={"partial": {"mean": 0.9, "low": 0.6, "high": 1.2, "n": 3}}))
    assert "90 % (60 % to 100 %) at 5 rounds" in page(run).text


def test_a_held_out_score_without_an_interval_is_one_chart(run):
    estimate = {"mean": 0.4, "low": None, "high": None, "n": 3}
    write_rows(run, rows(5, held_out={"strict": estimate}))
    text = page(run).text
    assert "Held-out strict" in text and "Held-out strict/n" not in text


def test_labels_of_a_chart_stay_within_it():
    """At 17 pixels, the largest size of labels in small panels, a digit is about 10 pixels wide."""
    points = [Point(index, value) for index, value in enumerate((0.00001, 0.00018, 0.00021))]
    chart = line_chart(points, Axis("rounds", count), Axis("KL", number), "KL")
    labels = re.findall(r'class="tick end" x="([\d.]+)" y="([\d.]+)">([^<]+)<', chart)
    assert "0.00015" in [text for _, _, text in labels]
    assert all(float(right) >= 10 * len(text) and float(y) >= 30 for right, y, text in labels)  # below the axis' name


def page(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


# --- the first screen -------------------------------------------------------------------------------------------------


def test_a_finished_run_says_what_it_gained(run):
    parsed = page(run)
    worked = parsed.within("worked")
    gain = read_run(run).comparison.overall["strict"]
    assert gain.low > 0
    interval = f"{signed('strict', gain.low)} to {signed('strict', gain.high)} points, from 72 pairs of samples of 24"
    assert (
        "Strict accuracy on 24 prompts of iid: 1.4 % → 55.6 %, +54.2 points: a clear improvement, effect size" in worked
    )
    assert f"(95 % interval of the gain {interval} prompts)" in worked
    assert "Partial score on 24 prompts of iid" in worked
    assert "During training, strict score: 40.0 % → 40.0 %, no change (round 1 to 5, 96 prompts" in worked
    assert "Training reward: 0.5 → 0.504" in worked
    assert "missing" not in worked and "not finished" not in parsed.text
    assert "color attr" in parsed.text and "optim.betas [0.9, 0.99]" in parsed.text and "torch 2.14.1" in parsed.text
    assert PROTOCOL.hash in parsed.text


def test_a_gain_over_few_prompts_has_no_verdict(tmp_path):
    evaluation(tmp_path / "before", [(0.0, 0.5)] * 9)
    evaluation(tmp_path / "after", [(1.0, 0.5)] * 9)
    parsed = page(tmp_path)
    assert "+100.0 points: no verdict from 3 prompts, at least 20 needed (" in parsed.within("worked")
    text = (tmp_path / "report.html").read_text()
    assert 'class="up"' not in text and 'class="mean up"' not in text and 'verdict up"' not in text


def test_a_gain_without_an_interval_says_what_would_give_one(run):
    for when in ("before", "after"):
        saved = load_evaluation(run / when)
        alone = replace(saved.records[0], task="alone", prompt="a ring")
        scores = [{"aesthetic": 5.0 + index + (when == "after") * (index % 3)} for index in range(73)]
        records = [replace(r, scores=s) for r, s in zip((*saved.records, alone), scores, strict=True)]
        replace(saved, records=tuple(records)).save(run / when)
    worked = page(run).within("worked")
    assert "no verdict, no interval: it needs 2 or more prompts in every task, effect size" in worked
    assert worked.count("it needs 2") == 1 and "(from 73 pairs of samples of 25 prompts)" in worked


def test_the_page_says_which_prompts_are_trained_on(run):
    facts = {"suite": "prompts", "prompts": 24, "suite_hash": "a", "also_trained": 0}
    sections = {"training": facts, "before_after": facts, "held_out": facts | {"suite": "other", "suite_hash": "b"}}
    (run / "prompts.json").write_text(json.dumps(sections))
    worked = page(run).within("worked")
    assert "Measured before and after training: prompts, a set of 24 prompts; none of them is trained on." in worked
    assert "The headline and the held-out curve are of different prompt sets" in worked
    (run / "prompts.json").write_text(json.dumps(sections | {"before_after": facts | {"also_trained": 24}}))
    worked = page(run).within("worked")
    assert "Strict accuracy on 24 prompts of iid, 24 of them trained on: 1.4 %" in worked
    assert "24 of them are trained on: scores of these say nothing about new prompts." in worked


def test_a_reward_of_few_training_prompts_has_no_verdict(run):
    write_rows(run, rows(20, reward=lambda index: index))
    (run / "prompts.json").write_text(json.dumps({"training": {"prompts": 5}}))
    assert "Training reward: 1.5 → 17.5, +16: no verdict from 5 prompts, at least 20 needed" in page(run).within(
        "worked"
    )


def test_a_comparison_has_no_report(tmp_path):
    (tmp_path / "comparison.html").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds a comparison of runs, not a run: open .*comparison\.html"):
        write_report(tmp_path)


def test_a_run_without_any_evaluation_is_judged_by_its_rewards(tmp_path):
    write_rows(tmp_path, rows(20, held_out=None, metrics={}, reward=lambda index: index / 20))
    (tmp_path / "config.json").write_text(json.dumps({"before_after": None, "held_out": {"every": 0}}))
    parsed = page(tmp_path)
    worked = parsed.within("worked")
    assert "Training reward: 0.075 → 0.875, +0.8: a clear rise (mean of the first and last 4 rounds" in worked
    assert "before and after training (before_after is null): no gain is measured" in worked
    assert "No held-out prompts were evaluated during training (held_out.every is 0)" in worked
    assert "Reward style/a: 0.35 → \N{MINUS SIGN}1.25, \N{MINUS SIGN}1.6: a clear fall" in parsed.within("worse")
    assert "Reward ocr" not in parsed.within("worse")


def test_the_sum_of_rewards_is_not_compared_over_rounds_while_one_of_them_is_trained(tmp_path):
    write_rows(tmp_path, rows(20, rewards=lambda index: {"ocr": index / 20, "critic": -index}))
    parsed = page(tmp_path)
    assert "Training reward" not in parsed.within("worked") and "Reward ocr" in parsed.within("worked")
    assert "critic" not in parsed.within("worked") + parsed.within("worse")


def signal(name, mean, status):
    shift = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 9}
    return {"name": name, "before": 0.5, "now": 0.5 + mean, "shift": shift, "status": status}


def test_everything_that_got_worse_is_listed(run):
    report = [signal("saturation", 0.9, "red"), signal("grid", 0.0, "green"), signal("entropy", 0.1, None)]
    changes = {"failed_rewards": 2, "skipped_updates": 1, "clip_fraction": 0.7, "zero_std_share": 0.6}
    changes["held_out"] = lambda i: {
        "strict": Estimate(*((0.2, 0.15, 0.25) if i > 2 else (0.4, 0.35, 0.45)), 96).as_dict()
    }
    changes["reward_hacking"] = lambda i: report if i > 2 else None
    write_rows(run, rows(5, **changes))
    config = json.loads((run / "config.json").read_text())
    limits = {"reward_hacking": {"limits": {"kl": {"amber": 0.02, "red": 1.0}}}}
    (run / "config.json").write_text(json.dumps(config | limits))
    better, worse = (run / "before").rename(run / "other"), (run / "after").rename(run / "before")
    better.rename(run / "after")
    parsed = page(run)
    worse = parsed.within("worse")
    for sentence in (
        "Strict accuracy on 24 prompts of iid: 55.6 % → 1.4 %, \N{MINUS SIGN}54.2 points: a clear regression",
        "During training, strict score: 40.0 % → 20.0 %, \N{MINUS SIGN}20.0 points: a clear fall",
        "Strict score of task color attr: \N{MINUS SIGN}54.2 points",
        "The reward may be exploited: red: saturation 0.5 -> 1.4 (shift +0.90).",
        "2 of 2 checks raised an alarm, the first after round 4.",
        "Rewards failed on 10 of 480 samples (2.08 %).",
        "5 updates were skipped: their gradient was not finite.",
        "Clip fraction is 70 % in the last rounds, above 50 %",
        "Groups without signal is 60 % in the last rounds",
        "KL to the reference is 0.04 in the last rounds, above 0.02",
    ):
        assert sentence in worse
    assert "Nothing got clearly worse" not in worse
    statuses = [text for text in parsed.text.split() if text in ("red", "green")]
    assert statuses.count("green") == 1 and statuses.count("red") == 2  # of the section and of its signals


def test_checks_that_pass_are_named(run):
    worse = page(run).within("worse")
    assert "Nothing got clearly worse. Lowest gain of a task: color attr, strict score +54.2 points" in worse
    assert "Reward hacking was not monitored" in worse and "No reward failed, and no update was skipped." in worse
    assert "In the last rounds: clip fraction 10 %, groups without signal 25 %, KL to the reference 0.04." in worse
    write_rows(run, rows(5, reward_hacking=[signal("grid", 0.0, "green")]))
    assert "The last check for reward hacking is green; 0 of 5 checks raised an alarm." in page(run).within("worse")


def test_the_cost_is_a_list_of_numbers(run):
    environment = json.loads((run / "environment.json").read_text())
    times = {"started": {"date": "2026-11-29T10:00:00+00:00"}, "finished": "2026-11-29T10:09:30+00:00"}
    (run / "environment.json").write_text(json.dumps(environment | times | {"genalign": "0.2.0"}))
    assert page(run).within("cost") == (
        "What did it cost? wall-clock, evaluations included 9 min 30 s training time 7 min 30 s "
        "time per round 1 min 30 s rounds 5 samples 480 NFE 4.8k "
        "calls of reward ocr 480 backward passes of the denoiser 5 peak memory 2.5 GB evaluation samples 144 "
        "machine 2 CPU cores started 2026-11-29 10:00 UTC genalign 0.2.0"
    )


def test_an_interrupted_run_has_a_report(run):
    (run / "after" / "summary.json").unlink()
    config = json.loads((run / "config.json").read_text()) | {"training": {"rounds": 35, "max_nfe": None}}
    (run / "config.json").write_text(json.dumps(config))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "rew')
    parsed = page(run)
    worked = parsed.within("worked")
    assert "The run is not finished: 5 of 35 rounds are recorded." in worked and f"--resume {run}" in worked
    assert "The evaluation after training is missing: the gain is not known yet." in worked
    assert "not finished: 5 of 35 rounds" in parsed.text and "not measured" in parsed.text
    assert "Worst regressions" not in parsed.text
    (run / "config.json").write_text(json.dumps(config | {"training": {"rounds": 35, "max_nfe": 4800}}))
    assert "not finished" not in page(run).text


def test_a_run_that_just_began_has_a_report(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"training": {"rounds": 9}}))
    text = page(tmp_path).text
    assert "Nothing is measured yet" in text and "No training round is recorded yet." in text
    assert "0 of 9 rounds are recorded" in text and "no cost is recorded" in text


def test_different_protocols_are_not_compared(run):
    saved = read_run(run).after
    replace(saved, protocol=replace(PROTOCOL, guidance=1.0)).save(run / "after")
    parsed = page(run)
    assert "shown without a gain" in parsed.within("worked") and "guidance is 4.0 before and 1.0" in parsed.text
    assert "points:" not in parsed.text and "55.6 %" in parsed.text


# --- the rest of the page ---------------------------------------------------------------------------------------------


def test_cards_of_the_largest_changes_have_their_scores(run):
    parsed = page(run)
    _, regressions, improvements = re.split("Worst regressions|Best improvements", parsed.text)
    assert "strict 100.0 % → 0.0 % partial 100.0 % → 25.0 %" in regressions and regressions.count("strict") == 1
    assert improvements.count("strict 0.0 % → 100.0 %") == 12
    assert parsed.tags.count("img") == 2 * 13
    assert "script" not in parsed.tags and "default-src 'none'" in (run / "report.html").read_text()
    files = [address for address in parsed.addresses if not address.startswith("data:")]
    assert len(files) == 2 * 13 and all((run / file).is_file() for file in files)  # a click opens the full size


def test_the_gallery_draws_what_was_put_right_before_what_was_cleaned(run):
    """Of the 40 images that became correct the last 20 were recognized before: 12 of these are shown, not the first."""
    for when in ("before", "after"):
        saved = load_evaluation(run / when)
        details = [{"strict": {"recognized": index > 20 or when == "after"}} for index in range(72)]
        records = [replace(r, details=d) for r, d in zip(saved.records, details, strict=True)]
        replace(saved, records=tuple(records)).save(run / when)
    parsed = page(run)
    assert "Of the 40 samples that became correct, 20 (50 %) had nothing unknown" in parsed.within("worked")
    _, improvements = parsed.text.split(
        "Improvements Drawn by a fixed seed from the 20 samples that became correct and"
    )
    files = [address for address in parsed.addresses if address.startswith("before/images")]
    numbers = [int(file.split("/")[-1].split(".")[0]) for file in files[1:]]  # the first is the regression
    assert len(numbers) == improvements.count("strict 0.0 %") == 12 and min(numbers) > 20
    assert numbers != sorted(numbers) and max(numbers) > 32


def test_phones_show_every_column_with_its_name(run):
    text = page(run) and (run / "report.html").read_text()
    labels = re.findall(r'data-label="([^"]+)"', text)
    assert labels[:4] == ["gain in points", "before", "after", "prompts"] and ".cards thead" in text


def test_a_number_of_a_whole_set_has_no_band(run):
    shift = {"mean": 0.2, "low": 0.2, "high": 0.2, "n": 1}
    write_rows(run, rows(5, reward_hacking=[signal("variety", 0.2, "green") | {"shift": shift}]))
    text = page(run) and (run / "report.html").read_text()
    assert "0.2 at 3 rounds" in text and "0.2 (0.2 to 0.2)" not in text


def test_every_number_of_a_row_has_a_curve(run):
    (estimate,) = rows(1)[0]["held_out"].values()
    changes = {"held_out": lambda i: {"strict": estimate, "mine": estimate} if i % 2 == 0 else None, "new_number": 3}
    write_rows(run, rows(5, reward_hacking=[signal("grid", 0.0, "green")], **changes))
    labels = [label for label in page(run).labels if label]
    for axis in ("rounds", "minutes", "NFE"):
        for title in (
            "Held-out strict",
            "Held-out mine",
            "Training reward",
            "Reward ocr",
            "Reward style/a",
            "KL to the reference",
        ):
            assert f"{title} against {axis}" in labels
        assert f"grid against {axis}" in labels
    for title in (
        *("Learning rate", "Loss", "Gradient norm", "Largest log-ratio", "Spread of the reward", "Failed rewards"),
        *("Skipped updates", "anchor/weight", "critic/accuracy", "NFE", "Samples", "calls of reward ocr", "new number"),
        *("backward passes of the denoiser", "Training time", "Samples per second", "Peak memory"),
    ):
        assert labels.count(f"{title} against rounds") == 1 and f"{title} against minutes" not in labels
    text = (run / "report.html").read_text()
    assert "40 % (35 % to 45 %) at 3 rounds" in text
    before, folded = text.index("Reward ocr against rounds"), text.index('<details class="more">')
    assert before < folded < text.index("Learning rate against rounds")


def test_the_curves_of_a_long_run_stay_small(tmp_path):
    write_rows(tmp_path, rows(5000))
    path = write_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    longest = max(re.findall(r'<polyline class="raw" points="([^"]*)"', path.read_text()), key=len)
    assert 300 < len(longest.split()) <= 400


# --- samples over rounds ----------------------------------------------------------------------------------------------


def decoded(uri):
    return base64.b64decode(uri.partition(",")[2])


def test_sample_grids_stand_side_by_side_from_the_first_round_to_the_last(tmp_path):
    (tmp_path / "samples").mkdir()
    names = [f"samples/round-{done:06d}.png" for done in range(1, 21)]
    for index, name in enumerate(names):
        size = 1300 if index == 19 else 90
        Image.new("RGB", (size, size), (10 * index, 0, 0)).save(tmp_path / name)
    write_rows(tmp_path, rows(20, sample_grid=lambda index: [names[index]]))
    parsed = page(tmp_path)
    assert re.findall(r"after (\d+) round", parsed.within("samples")) == ["1", "5", "9", "12", "16", "20"]
    images = [
        Image.open(BytesIO(decoded(address))) for address in parsed.addresses if address.startswith("data:image/")
    ]
    assert [image.size for image in images] == [(90, 90)] * 5 + [(640, 640)]
    assert abs(images[-1].convert("RGB").getpixel((5, 5))[0] - 190) < 4
    assert decoded(parsed.addresses[2]) == (tmp_path / names[0]).read_bytes()  # after the page's icon and the link
    assert parsed.addresses[1] == names[0]


def test_sample_grids_of_clips_are_players(tmp_path):
    (tmp_path / "samples").mkdir()
    names = [[f"samples/round-{done:06d}-{clip:02d}.wav" for clip in range(6)] for done in range(1, 6)]
    for name in (name for grid in names for name in grid):
        soundfile.write(tmp_path / name, np.zeros(4000), 8000)
    write_rows(tmp_path, rows(5, sample_grid=lambda index: names[index]))
    parsed = page(tmp_path)
    assert re.findall(r"after (\d+) round", parsed.within("samples")) == ["1", "3", "5"]
    assert parsed.tags.count("audio") == 3 * 4
    for name in names[4]:
        (tmp_path / name).unlink()
    assert "after 5 rounds" not in page(tmp_path).text


def test_the_last_grid_stays_where_not_all_fit(tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    rng, names = np.random.default_rng(0), [f"samples/{index}.png" for index in range(4)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name)
    monkeypatch.setattr("genalign.evaluation.report.samples.LIST_BYTES", 40_000)
    grids = samples_over_rounds(tmp_path, rows(4, sample_grid=lambda index: [names[index]]))
    assert list(grids) == [1, 4]
    assert samples_over_rounds(tmp_path, rows(4)) == {}


# --- clips ------------------------------------------------------------------------------------------------------------


def clips(folder, scores, waveforms, rate=8000):
    """Saved evaluation with a WAV file for every score, of ``waveforms`` in turn."""
    in_turn = waveforms[torch.arange(len(scores)) % len(waveforms)]
    names = writer(rate)(in_turn, folder, 0)
    records = [
        SampleRecord(f"a tone {i}", "pitch", i, i, name, {"strict": score})
        for i, (name, score) in enumerate(zip(names, scores, strict=True))
    ]
    protocol = replace(PROTOCOL, resolution=(waveforms.shape[2],), verifier="tones-1")
    Evaluation(protocol, tuple(records)).save(folder)


def played(uri):
    assert uri.startswith("data:audio/flac;base64,")
    samples, rate = soundfile.read(BytesIO(decoded(uri)), always_2d=True, dtype="float32")
    return torch.from_numpy(samples.T.copy()), rate


def test_clips_are_played_and_drawn_before_and_after(tmp_path):
    waves = tones([440.0, 880.0])
    clips(tmp_path / "before", [0.0, 1.0, 0.0], waves[:1])
    clips(tmp_path / "after", [1.0, 0.0, 0.0], waves[1:])
    parsed = page(tmp_path)
    assert parsed.tags.count("audio") == parsed.tags.count("img") == 2 * 2
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert "media-src data:;" in (tmp_path / "report.html").read_text()
    assert "1.5 s, 50 to 4000 Hz" in parsed.text
    sounds = [address for address in parsed.addresses if address.startswith("data:audio")]
    for sound, wave in zip(sounds[:2], waves, strict=True):
        waveform, rate = played(sound)
        assert rate == 8000
        torch.testing.assert_close(waveform, wave, rtol=0, atol=1e-4)


def tones(frequencies, seconds=1.5, rate=8000):
    """Sines at -12 dB of full scale, (n, 1, L)."""
    time = torch.arange(round(seconds * rate)) / rate
    return 0.25 * (2 * math.pi * torch.tensor(frequencies)[:, None, None] * time).sin()


@pytest.mark.parametrize("frequency", [110.0, 440.0, 1760.0])
def test_a_tone_is_a_line_at_the_logarithm_of_its_frequency(frequency):
    picture = np.asarray(spectrogram(tones([frequency])[0], 8000))
    rows, columns = picture.shape
    line = rows - 1 - rows * math.log(frequency / 50) / math.log(4000 / 50)
    assert abs(picture[:, columns // 2].argmax() - line) <= 1
    quieter = np.asarray(spectrogram(0.1 * tones([frequency])[0], 8000))
    change = int(picture.max()) - int(quieter.max())
    assert change == pytest.approx(20 / 80 * 255, abs=2)  # 20 dB of the 80 that the colors span
    assert np.asarray(spectrogram(torch.zeros(1, 12000), 8000)).max() == 0


def test_a_long_recording_is_played_in_part_and_drawn_whole(tmp_path):
    stereo = torch.cat([tones([440.0], 9.0, 44100), torch.zeros(1, 1, 9 * 44100)], 1)
    (name,) = writer(44100)(stereo, tmp_path, 0)
    drawn = thumbnail(tmp_path, name)
    waveform, rate = played(drawn.sound)
    assert rate == 16000 and waveform.shape == (1, 6 * 16000)
    torch.testing.assert_close(waveform[:, 200:-200], tones([440.0], 6.0, 16000)[0, :, 200:-200] / 2, rtol=0, atol=1e-3)
    assert drawn.note == "the first 6 of 9 s, 50 to 22050 Hz" and drawn.picture.startswith("data:image/png;base64,")


def test_clips_of_any_length_and_rate_are_drawn(tmp_path):
    for rate, length in ((16, 40), (8000, 3), (48000, 100)):
        (name,) = writer(rate)(torch.zeros(1, 1, length), tmp_path, 0)
        assert played(thumbnail(tmp_path, name).sound)[0].shape[1] >= 1
    assert thumbnail(tmp_path, "audio/9.wav") == thumbnail(tmp_path, None) == Thumbnail()
    (tmp_path / "audio" / "00000.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"expected audio \(WAV or FLAC\), but .*00000\.wav cannot be read"):
        thumbnail(tmp_path, "audio/00000.wav")


@pytest.mark.parametrize("tag", ["img", "audio"])
def test_large_samples_are_reduced_and_rationed(tmp_path, tag):
    noise = torch.rand(1, 1, 6 * 16000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, first in (("before", 0), ("after", 1)):
        if tag == "img":
            evaluation(tmp_path / name, [((index + first) % 2, 0.5) for index in range(24)], size=512)
        else:
            clips(tmp_path / name, [(index + first) % 2 for index in range(24)], noise, 16000)
    assert write_report(tmp_path).stat().st_size < 3_000_000
    assert 0 < page(tmp_path).tags.count(tag) < 48


# --- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0.0, 1.0, 5, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1.0, 120.0, 7, [20.0, 40.0, 60.0, 80.0, 100.0, 120.0]),
        (-0.03, 0.021, 5, [-0.02, 0.0, 0.02]),
        (0.0, 2.5e6, 5, [0.0, 5e5, 1e6, 1.5e6, 2e6, 2.5e6]),
    ],
)
def test_ticks_are_round(low, high, count, expected):
    assert ticks(low, high, count) == expected


def test_binning_averages_neighbors():
    assert binned([Point(x, 2 * x) for x in range(5)], 3) == [Point(0.5, 1), Point(2.5, 5), Point(4, 8)]
    assert binned([Point(0, 1, (0.5, 1.5))], 3) == [Point(0, 1, (0.5, 1.5))]


def test_tick_labels_differ_and_rounds_are_whole():
    points = [Point(1, 0.11401), Point(2, 0.11404)]
    svg = line_chart(points, Axis("rounds", count, whole=True), Axis("y", number), "title")
    labels = re.findall(r'class="tick (?:end|mid)"[^>]*>([^<]+)<', svg)
    assert labels == ["0.11401", "0.11402", "0.11403", "0.11404", "1", "2"]


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0, 0.0], [1.0, 1.0], [-3.0, 2.0]])
def test_charts_stay_in_their_frame(values):
    svg = line_chart([Point(x, y) for x, y in enumerate(values)], Axis("x", str), Axis("y", str), "title")
    heights = [float(y) for y in re.findall(r'cy="([-\d.]+)"', svg)]
    assert len(heights) == 2 * len(values)
    assert all(20 <= height <= 216 for height in heights)


@pytest.mark.parametrize(("low", "high", "sign"), [(0.1, 0.3, "up"), (-0.3, -0.1, "down"), (-0.1, 0.1, "even")])
def test_whisker_marks_what_the_interval_says(low, high, sign):
    svg = whisker(Estimate((low + high) / 2, low, high, 24), (-0.5, 0.5), "gain")
    assert f'class="mean {sign}"' in svg and 'class="zero" x1="80.0"' in svg


@pytest.mark.parametrize(
    ("gain", "effect", "text", "direction"),
    [
        (Estimate(0.3, 0.1, 0.5, 24), 0.45, "a clear improvement, effect size 0.45", "up"),
        (Estimate(-0.3, -0.5, -0.1, 24), -0.45, "a clear regression, effect size \N{MINUS SIGN}0.45", "down"),
        (Estimate(0.3, 0.1, 0.5, 24), 0.05, "a small improvement, effect size 0.05", "up"),
        (Estimate(5e-5, 4e-5, 6e-5, 24), 0.002, "no change, effect size 0.002", "even"),
        (Estimate(0.0, -0.1, 0.1, 24), 0.0, "no change, effect size 0", "even"),
        (Estimate(0.3, -0.1, 0.5, 24), 0.45, "no clear change, effect size 0.45", "even"),
        (
            Estimate(0.3, 0.1, 0.5, 19),
            0.45,
            "no verdict from 19 prompts, at least 20 needed, effect size 0.45",
            "even",
        ),
        (Estimate(0.3, 0.3, 0.3, 24), math.inf, "no verdict, no interval: all values are equal", "even"),
    ],
)
def test_verdicts_need_prompts_an_interval_and_an_effect(gain, effect, text, direction):
    assert gain_verdict(gain, effect) == Verdict(text, direction)


# --- words ------------------------------------------------------------------------------------------------------------


def test_numbers_in_words():
    assert [count(value) for value in (7, 999, 1000, 999_999, 1_234_567)] == ["7", "999", "1k", "1M", "1.23M"]
    assert [duration(value) for value in (0.4, 59.7, 61, 3725)] == ["0.4 s", "1 min 0 s", "1 min 1 s", "1 h 2 min"]
    calls = [call_words(call) for call in ("nfe", "decode backward", "reward/my_ocr", "reward/x backward")]
    assert calls == ["NFE", "backward passes of the decoder", "calls of reward my ocr", "backward passes of reward x"]
    assert (signed("strict", -0.0123), signed("aesthetic", 0.5)) == ("\N{MINUS SIGN}1.2", "+0.5")
    assert (titled("HPSv2 score"), titled("clip"), titled("")) == ("HPSv2 score", "Clip", "")
    assert (scored("size", -80812.0), signed("size", 80812.0)) == ("\N{MINUS SIGN}80.8k", "+80.8k")


def test_flattened_json():
    nested = {"a": {"b": None, "c": [1, {"d": "é"}]}, "e": "text"}
    assert flattened(nested) == {"a.b": "null", "a.c": '[1, {"d": "é"}]', "e": "text"}
