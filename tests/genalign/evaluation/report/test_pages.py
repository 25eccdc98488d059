"""The pages about a search and about several recipes, texts that contain HTML on every page, and pages in a browser."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from genalign.evaluation.compare_runs import RecipeSummary
from genalign.evaluation.evaluate import EXTERNAL, Evaluation, SampleRecord, SetValue
from genalign.evaluation.report import write_comparison, write_evaluation, write_report, write_search
from genalign.evaluation.report.reward_training_page import write_reward_training
from genalign.evaluation.report.search_page import tree
from genalign.evaluation.standings import Look, standings
from genalign.runtime.media import writer
from tests.genalign.evaluation.report.pages import HOSTILE, PROTOCOL, Page, chromium, reward_training, save


def candidate(ended, score, parent=None, born=0):
    scores = [] if score is None else [[ended, [score]]]
    return {"prompt": 0, "parent": parent, "born": born, "scores": scores, "ended": ended}


def search(folder, lineages, chosen, **changes):
    """A search folder with the candidates of every prompt, and ``changes`` of the prompts' rows."""
    (folder / "lineage").mkdir(parents=True)
    row = {"prompt": "a dog", "scores": {"ocr": 0.5}, "image": "0.png", "seconds": 3.0}
    row["calls"] = {"nfe": 12, "decode": 3, "reward/ocr": 3}
    for index, candidates in enumerate(lineages):
        (folder / "lineage" / f"{index:05d}.json").write_text(json.dumps({"chosen": chosen, "lives": candidates}))
    rows = [json.dumps(row | {"index": index} | changes) for index in range(len(lineages))]
    (folder / "scores.jsonl").write_text("\n".join(rows))
    return write_search(folder)


def test_the_best_reward_so_far_never_falls(tmp_path):
    """The second prompt's candidates finish later, so the curve starts when both prompts have a score."""
    first = [candidate(4, 0.9), candidate(4, 0.1), candidate(4, 0.95)]
    second = [candidate(2, 0.8), candidate(4, None), candidate(4, 0.3, parent=0, born=2)]
    page = search(tmp_path, [first, second], 2).read_text()
    assert re.findall(r">([\d.]+) at (\d+) denoising steps per prompt<", page) == [("0.6", "8"), ("0.625", "12")]
    assert page.count('class="returned"') == 4 and page.count('class="pruned"') == 3  # a copy has two lines
    tiles = "Best sample of each prompt ocr 0.5 denoiser calls (NFE) per prompt 12 VAE decodes per prompt 3"
    assert tiles in Page(page).text
    assert page.count(">denoising steps</text>") == 2 and page.count('class="base"') == 3  # of two trees and the curve


def test_a_search_page_has_settings_and_the_gain_over_plain_sampling_with_both_costs(tmp_path):
    config = {
        "model": {"path": "my/model"},
        "strategy": {"class_path": "genalign.search.pruning.Prune", "init_args": {"steps": [1], "candidates": None}},
        "budget": {"nfe": 60.0, "seconds": None},
        "sampling": {"num_steps": 20, "guidance": 4.5},
        "seed": 3,
        "lora": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = {"scores": {"ocr": 0.125}, "image": "plain/0.png", "calls": {"nfe": 20}, "extra": True}
    finished = "2026-05-04T03:02:01+00:00"
    page = search(tmp_path, [[candidate(4, 0.5)]], 0, plain=base, finished=finished).read_text()
    text = Page(page).text
    assert "model my/model strategy Prune(steps=[1]) budget per prompt 60 NFE sampling 20 steps, guidance 4.5" in text
    assert "rewards ocr seed 3 prompts 1 finished 2026-05-04 03:02 UTC" in text
    assert "ocr 0.5 ocr, gain over plain sampling +0.375 NFE of plain sampling per prompt 20" in text
    assert "plain sampling, 20 NFE: ocr 0.125" in text and "best sample, 12 NFE: ocr 0.5" in text


def test_a_search_page_writes_shares_in_percent_and_their_gains_in_points(tmp_path):
    base = {"scores": {"partial": 0.25}, "image": "plain/0.png", "calls": {"nfe": 4}, "extra": True}
    page = search(tmp_path, [[candidate(4, 0.5), candidate(4, 0.75)]], 1, scores={"partial": 0.75}, plain=base)
    text = Page(page.read_text()).text
    assert "partial 75.0 % partial, gain over plain sampling +50.0 points" in text
    assert "plain sampling, 4 NFE: partial 25.0 %" in text and "best sample, 12 NFE: partial 75.0 %" in text
    assert "50 % at 4 denoising steps" in text and "75 % at 8 denoising steps" in text


def test_the_curve_of_a_search_by_several_rewards_says_that_it_is_of_the_first(tmp_path):
    single = Page(search(tmp_path / "single", [[candidate(4, 0.5)]], 0).read_text()).text
    both = Page(search(tmp_path / "both", [[candidate(4, 0.5)]], 0, scores={"ocr": 0.5, "style": 1.0}).read_text()).text
    assert "Highest ocr of a candidate so far" in single and "Highest ocr of a candidate so far" in both
    assert "chosen by all rewards" in both and "chosen by all rewards" not in single


def test_a_comparison_has_its_model_and_the_settings_of_its_recipes(tmp_path):
    numbers = {"minutes": 2.0, "nfe": 100.0, "prompts": 24, "effect": 0.5, "minutes_range": (2, 2), "nfe_range": (9, 9)}
    summaries, recipes = [], {}
    for name, rate in (("slow", 1e-4), ("fast", 1e-3)):
        recipes[name] = {1: tmp_path / name}
        (tmp_path / name).mkdir()
        config = {"output": name, "model": {"path": "my/model"}, "training": {"rounds": 5, "learning_rate": rate}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        summaries.append(RecipeSummary(name, 1, 0.1, 0.0, 0.2, {"strict": 0.1}, {}, 0.01, {}, **numbers))
    write_comparison(tmp_path / "comparison.html", summaries, recipes)
    text = Page((tmp_path / "comparison.html").read_text()).text
    assert f"genalign comparison · {tmp_path.name} my/model" in text
    assert "Settings that all recipes share model.path my/model training.rounds 5 Settings of" in text
    assert "Settings of slow training.learning_rate 0.0001 Settings of fast training.learning_rate 0.001" in text


def test_an_evaluation_names_its_model_and_explains_its_scores(tmp_path):
    save(tmp_path, {"strict": 1.0, "partial": 1.0})
    model = {"path": "my/model"}
    (tmp_path / "evaluation.json").write_text(json.dumps({"subject": {"model": model, "lora": "runs/mine/lora"}}))
    text = Page(write_evaluation(tmp_path).read_text()).text
    assert f"{tmp_path.name} my/model · adapter runs/mine/lora · {len(PROTOCOL.sigmas) - 1} steps by " in text
    assert "partial is the share of the prompt's parts that are right" in text
    save(tmp_path, {"aesthetic": 5.0})
    assert "the prompt's parts" not in Page(write_evaluation(tmp_path).read_text()).text


def test_an_evaluation_of_another_programs_samples_names_their_folder(tmp_path):
    save(tmp_path, {"strict": 1.0}, protocol=replace(PROTOCOL, kernel=EXTERNAL))
    (tmp_path / "evaluation.json").write_text(json.dumps({"subject": {"model": {"samples": "my_images"}}}))
    assert f"{tmp_path.name} samples of my_images Strict" in Page(write_evaluation(tmp_path).read_text()).text


def test_numbers_of_a_benchmark_and_scores_of_whole_sets_in_the_order_of_all_tables(tmp_path):
    record = SampleRecord("a circle", "single", 0, 0, None, {"strict": 1.0})
    for name, value in {"before": -9.0, "after": -7.0}.items():
        Evaluation(PROTOCOL, (record,), {"fd": SetValue(value, 60)}).save(tmp_path / name)
    numbers = {"dpg": 56.25, "missing answers": 0.0, "left out": None}
    (tmp_path / "after" / "benchmark.json").write_text(json.dumps(numbers))
    text = Page(write_evaluation(tmp_path / "after", tmp_path / "before").read_text()).text
    assert "dpg 56.25 missing answers 0 left out none" in text
    assert "score difference before after samples fd +2 \N{MINUS SIGN}9 \N{MINUS SIGN}7 60" in text


def test_pages_have_a_date_and_numbers_stay_beside_their_percent_signs(tmp_path):
    save(tmp_path, {"strict": 1.0})
    page = write_evaluation(tmp_path).read_text()
    assert re.search(r"Page written \d{4}-\d\d-\d\d \d\d:\d\d UTC by genalign \d", page)
    assert ">100.0\N{NO-BREAK SPACE}%<" in page


@pytest.mark.parametrize("candidates", [1, 8, 400])
def test_labels_of_a_search_page_are_legible_at_any_width(candidates, tmp_path):
    """A unit of a drawing is at most 1.2 pixels wide, and at 400 pixels two thirds of one, with larger text."""
    page = search(tmp_path, [[candidate(4, 0.5) for _ in range(candidates)]], 0).read_text()
    sizes = re.findall(r'<svg class="(\w+)" viewBox="0 0 ([\d.]+) ([\d.]+)"', page)
    chart, tree = (next(size[1:] for size in sizes if size[0] == kind) for kind in ("chart", "tree"))
    (widest,) = re.findall(r"\.panel\.best { max-width: (\d+)px", page)
    assert (int(widest) - 34) / float(chart[0]) <= 1.2  # its padding and border aside
    assert "@media (max-width: 560px) { .panel.best svg text { font-size: 18px; } }" in page
    assert float(tree[0]) == 240 and float(tree[1]) <= 240  # cards are 230 to 460 pixels wide
    assert "max-height: none" in page and 'class="panel large best"' in page  # the rule for small panels leaves it out


def test_recipes_of_unequal_cost_are_not_called_equal(tmp_path):
    def summary(name, gain, nfe):
        scores, diversity = {"strict": gain, "aesthetic": 1.5}, {"color": math.nan, "cell": -0.25}
        ranges = {"minutes_range": (1.5, 2.5), "nfe_range": (nfe - 20, nfe)}
        costs = {"minutes": 2.0, "nfe": nfe, "prompts": 24, "effect": 0.5, **ranges}
        return RecipeSummary(name, 2, gain, gain - 0.1, gain + 0.1, scores, {"two": gain}, 0.01, diversity, **costs)

    path = tmp_path / "comparison.html"
    write_comparison(path, [summary("slow", 0.05, 2820.0), summary("fast", 0.25, 4610.0)])
    page = path.read_text()
    assert page.index("fast") < page.index("slow") and "2 recipes: gain in strict score on 24 prompts</h1>" in page
    assert "The runs took 2.8k to 4.61k NFE (not equal), and 1 min 30 s to 2 min 30 s of training (not equal)." in page
    assert "+25.0" in page and "not measured" in page and "\N{MINUS SIGN}0.250<" in page and "2.8k to 2.82k" in page
    assert "a clear improvement, effect size 0.5" in page and "no clear change, effect size 0.5" in page
    assert 'class="scores total' not in page  # the best recipe, or the last, is no total
    write_comparison(path, [summary("slow", 0.05, 4600.0), summary("fast", 0.25, 4610.0)])
    page = path.read_text()
    assert (
        "2 recipes at equal NFE: gain in strict score" in page
        and "4.58k to 4.61k NFE (equal within 5 %)" in Page(page).text
    )


def test_standings_stand_on_the_page_of_recipes_with_their_intervals(tmp_path):
    def looks(*ends):
        rises = ([(0.2, 20, 10.0), (end, 400, 90.0)] for end in ends)
        return {seed: [Look(nfe, t, {"strict": score}) for score, nfe, t in rise] for seed, rise in enumerate(rises)}

    def summary(name):
        costs = {"minutes": 2.0, "nfe": 400.0, "prompts": 24, "effect": 0.5, "minutes_range": (1.5, 1.5)}
        scores = {"strict": 0.1}
        return RecipeSummary(name, 2, 0.1, 0.0, 0.2, scores, {"two": 0.1}, 0.01, {}, nfe_range=(200, 400), **costs)

    recipes = {"flow": looks(0.5, 0.52), "dense": looks(0.4, 0.41), "noisy": looks(0.3, 0.7)}
    equal = [standings(recipes, cost, "strict") for cost in ("nfe", "seconds")]
    write_comparison(tmp_path / "page.html", [summary(name) for name in recipes], equal=equal)
    text = Page(page := (tmp_path / "page.html").read_text()).text
    assert "Held-out strict score at equal NFE (400)" in text and "at equal seconds of training (1 min 30 s)" in text
    assert "flow is ahead by" in text and "not told apart within \N{PLUS-MINUS SIGN}" in text
    assert re.search(r"dense 0\.405 \(0\.\d+ to 0\.\d+\) \+0\.105 \(\+0\.0\d+ to \+0\.1\d+\)", text)
    assert "noisy 0.500 (0.000 to 1.000)" in text  # a share, whatever Student's interval says
    assert "Set training.max_nfe" not in text  # to have what the standings give
    (chart,) = re.findall(r"<svg[^>]*against minutes of training.*?</svg>", page)
    assert len(re.findall(r'<line style="stroke:hsl[^>]*>', chart)) == 3  # the intervals at the end of the curves
    assert text.count("flow minus dense") == 2


# --- texts that contain HTML ------------------------------------------------------------------------------------------


def trained(folder):
    """The report of a training in which every text is hostile."""
    for name, value in (("before", 0.0), ("after", 1.0)):
        save(folder / name, {HOSTILE: value}, HOSTILE, HOSTILE, protocol=replace(PROTOCOL, suite=HOSTILE))
    (folder / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    machine = {"seconds": 9.0, "samples_per_second": 2.0, "peak_memory_bytes": 10**9}
    row = {"round": 0, "samples": 4, "nfe": 40, "machine": machine, "calls": {f"reward/{HOSTILE}": 3}}
    row |= {"reward": 0.5, "rewards": {HOSTILE: 0.5}, "metrics": {HOSTILE: 0.5}}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return write_report(folder)


def searched(folder):
    """The page of a search in which every text is hostile."""
    hostile = {"prompt": HOSTILE, "scores": {HOSTILE: 0.5}, "image": f"javascript:{HOSTILE}", "calls": {HOSTILE: 2}}
    return search(folder, [[candidate(2, 0.5)]], 0, **hostile)


def evaluated(folder):
    """The page of an evaluation against itself whose texts are all hostile, with one image of two prompts."""
    protocol = replace(PROTOCOL, suite=HOSTILE)
    details = {HOSTILE: {"reason": HOSTILE}}
    records = [SampleRecord(HOSTILE + text, HOSTILE, 0, 0, HOSTILE, {HOSTILE: 0.5}, details) for text in "ab"]
    Evaluation(protocol, tuple(records), sets={HOSTILE: SetValue(0.5, 2)}).save(folder)
    manifest = {"hash": HOSTILE, "protocol_hash": HOSTILE, "subject": {HOSTILE: HOSTILE}}
    (folder / "evaluation.json").write_text(json.dumps(manifest))
    (folder / "benchmark.json").write_text(json.dumps({HOSTILE: 0.5}))
    return write_evaluation(folder, folder)


def evaluated_alone(folder):
    """The page of an evaluation alone whose texts are all hostile."""
    evaluated(folder)
    return write_evaluation(folder)


def reward_trained(folder):
    """The page of a reward's training whose texts are all hostile."""
    accuracy = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    held_out = {"loss": 0.5, "accuracy": {HOSTILE: accuracy}, "calibration": 0.25, "members": {HOSTILE: [accuracy] * 2}}
    held_out["nuisances"] = {HOSTILE: {"score": 0.0, "own": 0.5}}
    counts = {"read": 3, "left_out": {HOSTILE: 1}, "kinds": {HOSTILE: 2}, "annotators": {HOSTILE: 2}}
    counts |= {"prompts": 1, "samples": 2}
    changed = {"prompt": HOSTILE, "dimension": HOSTILE, "annotator": HOSTILE, "preferred": 1.0, "mean": -1.0}
    changed |= {"deviation": 0.5, "voters": 2, "files": ["a.png", "a.png"]}
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "card.md").write_text(HOSTILE)
    return write_reward_training(
        reward_training(
            folder,
            [{"step": 1, "epoch": 1.0, "loss": 0.5, "held_out": held_out}],
            {"training": counts, "held_out": counts, "votes": {"labels": 2, "changed": 1}},
            [changed],
            preferences=HOSTILE,
            encoder={"class_path": HOSTILE},
            votes={"change": HOSTILE, "members": HOSTILE},
        )
    )


@pytest.mark.parametrize("make", [trained, searched, evaluated, evaluated_alone, reward_trained])
def test_html_in_a_text_is_text(make, tmp_path):
    page = Page(make(tmp_path / "run").read_text())
    assert "p" in page.tags and "script" not in page.tags and "x" not in page.addresses  # the picture in the text
    assert page.text.count(HOSTILE) >= 2


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_browser_reads_and_paints_the_report_and_complains_of_nothing(tmp_path):
    """A report with one round and one pair: black before, white after."""
    trained(tmp_path)
    for name, value in (("before", 0), ("after", 255)):
        Image.new("RGB", (64, 64), (value, value, value)).save(tmp_path / name / "0.png")
        save(tmp_path / name, {"strict": value / 255, "partial": value / 255}, file="0.png")
    page, picture = write_report(tmp_path).as_uri(), tmp_path / "page.png"
    dom, complaints = chromium(tmp_path, "--dump-dom", page)
    assert complaints == [] and "</footer>" in dom
    chromium(tmp_path, f"--screenshot={picture}", "--hide-scrollbars", page)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (2400, 1100, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert (pixels == 0).all(2).sum() > 64 * 64


@pytest.mark.slow
def test_clips_are_decoded_and_painted(tmp_path):
    """A page's own script, which the policy forbids, asks the players how long their clips last."""
    wave = 0.25 * torch.sin(torch.arange(12000) * 2 * math.pi * 440 / 8000).expand(1, 1, -1)
    for name, score in (("before", 0.0), ("after", 1.0)):
        (file,) = writer(8000)(wave, tmp_path / name, 0)
        save(tmp_path / name, {"strict": score}, "a tone", "pitch", file)
    page = write_report(tmp_path)
    _, complaints = chromium(tmp_path, "--dump-dom", page.as_uri())
    assert complaints == []
    script = """<script>addEventListener("load", () => { for (const one of document.querySelectorAll("audio"))
      one.onloadedmetadata = () => document.title += " " + one.duration, one.load() })</script></head>"""
    text = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    page.write_text(text.replace("</head>", script))
    dom, complaints = chromium(tmp_path, "--dump-dom", "--virtual-time-budget=5000", page.as_uri())
    assert complaints == [] and re.search(r"<title>.* 1\.5 1\.5</title>", dom)


@pytest.mark.slow
@pytest.mark.parametrize("make", [trained, searched, evaluated, evaluated_alone, reward_trained])
def test_the_browser_does_not_run_html_in_a_text(make, tmp_path):
    page = make(tmp_path / "run")
    policy = '<meta http-equiv="Content-Security-Policy"'
    assert policy in page.read_text()
    page.write_text(page.read_text().replace(policy, "<meta"))  # what escapes must hold by itself
    dom, complaints = chromium(tmp_path, "--dump-dom", page.as_uri())
    assert complaints == [] and "<title>run</title>" not in dom


@pytest.mark.slow
def test_the_browser_reports_messages_and_runs_html_that_is_not_escaped(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><title>x</title><script>console.error('a message')</script><p>{HOSTILE}")
    dom, complaints = chromium(tmp_path, "--dump-dom", page.as_uri())
    assert "<title>run</title>" in dom and any("a message" in line for line in complaints)


def test_a_lineage_that_was_edited_into_a_circle_is_drawn() -> None:
    lives = [{"born": 0, "ended": 3, "parent": 1}, {"born": 1, "ended": 3, "parent": 0}]
    assert str(tree(lives, 0)).count("returned") >= 2
