"""The page about the training of a reward, from folders of finished, interrupted and unmeasured trainings."""

import json

import numpy as np
import pytest
from PIL import Image

from genalign.cli.main import main
from genalign.evaluation.report.reward_training_page import write_reward_training
from tests.genalign.evaluation.report.pages import Page, chromium, reward_training


def estimate(mean):
    return {"mean": mean, "low": mean - 0.125, "high": mean + 0.0625, "n": 40}


def row(epoch, loss, held_out_loss, accuracy, **held_out):
    """A line of metrics.jsonl of a training in one dimension."""
    measured = {"loss": held_out_loss, "accuracy": {"overall": accuracy and estimate(accuracy)}, **held_out}
    plain = {"step": 3 * epoch, "epoch": float(epoch), "loss": loss, "gradient_norm": 1.5, "learning_rate": 1e-3}
    return plain | {"held_out": measured | {"calibration": held_out.get("calibration", 0.0625 * epoch)}}


def counts(used, left_out=0):
    skipped = {"of another kind": left_out} if left_out else {}
    counted = {"read": used + left_out, "left_out": skipped, "kinds": {"pair": used - 3, "ranking": 3}}
    return counted | {"annotators": {"ada": used - 1, "": 1}, "prompts": used, "samples": 2 * used}


DATA = {"training": counts(90, 7), "held_out": counts(40)}
FIT = {"epochs": 4, "members": 1, "patience": None}


def text_of(folder):
    return Page(write_reward_training(folder).read_text()).text


def test_a_finished_training_has_its_last_numbers_data_settings_and_card(tmp_path):
    rows = [row(1, 0.75, 0.625, 0.5), row(2, 0.5, 0.5, 0.75), row(3, 0.4, 0.6, 0.625), row(4, 0.3, 0.7, 0.8125)]
    reward_training(tmp_path, rows, DATA, preferences="runs/pairs", fit=FIT)
    (tmp_path / "reward.safetensors").touch()
    (tmp_path / "card.md").write_text("# A card\nof this reward")
    text = text_of(tmp_path)
    assert f"genalign reward train \N{MIDDLE DOT} {tmp_path.name} A reward learned from runs/pairs" in text
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    tiles = "held-out accuracy 81.2 % calibration error 25 % held-out loss 0.7 epochs 4 of 4 members 1"
    assert f"{tiles} training judgments 90" in text and "not finished" not in text
    assert "Held-out accuracy measure value interval prompts overall 81.2 % 68.8 % to 87.5 % 40" in text
    assert "81.2 % (68.8 % to 87.5 %) at 4 epochs" in text  # the read-out of the curve with its band
    assert "Judgments read 97 40 Used, of the kind pair 87 37 Used, of the kind ranking 3 3" in text
    assert "Left out, of another kind 7 0 Prompts 90 40 Samples 180 80 Annotators who are named 1 1" in text
    assert "ada 89 not named 1" in text and "# A card of this reward" in text and "fit.members 1" in text
    for absent in ("Members of the ensemble", "Nuisances", "Votes on the labels"):
        assert absent not in text


def test_with_patience_the_numbers_are_of_the_weights_that_are_saved(tmp_path):
    rows = [row(1, 0.75, 0.625, 0.5), row(2, 0.5, 0.5, 0.75), row(3, 0.4, 0.5, 0.8125)]
    reward_training(tmp_path, rows, DATA, fit=FIT | {"patience": 1})
    (tmp_path / "reward.safetensors").touch()
    text = text_of(tmp_path).replace("\N{NO-BREAK SPACE}", " ")
    assert "held-out accuracy 75 % calibration error 12.5 % held-out loss 0.5 epochs 3 of 4" in text
    assert "stopped early: the held-out loss was not lower in 1 evaluation." in text
    assert "of the weights after epoch 2, whose held-out loss is the lowest and which are saved" in text


def test_an_interrupted_training_has_a_page(tmp_path):
    reward_training(tmp_path, [row(1, 0.75, 0.625, 0.5)], {}, fit=FIT)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')
    text = text_of(tmp_path)
    assert "not finished: 1 of 4 epochs" in text
    assert f"Continue an interrupted one with: genalign reward train --config {tmp_path}/config.json" in text
    text = text_of(reward_training(tmp_path, [], {}, fit=FIT))
    assert "No epoch is recorded yet." in text and "0 of 4 epochs" in text


def test_without_held_out_judgments_the_page_says_so(tmp_path):
    plain = row(4, 0.5, 0.5, None)
    del plain["held_out"]
    nothing = counts(0) | {"read": 0, "kinds": {}, "annotators": {}}
    text = text_of(reward_training(tmp_path, [plain], DATA | {"held_out": nothing}, fit=FIT))
    assert "Nothing was held out: accuracy and calibration are not measured." in text
    assert "held-out accuracy" not in text and "calibration error" not in text and "0.5 at" not in text


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_what_is_not_measured_or_not_finite_is_named(loss, tmp_path):
    text = text_of(reward_training(tmp_path, [row(1, 0.5, loss, None, calibration=None)], DATA, fit=FIT))
    assert "The accuracy of overall is not measured: no held-out judgment decides it." in text
    assert "The held-out loss is not finite: lower fit.optimizer.learning_rate." in text
    assert "nan" not in text and "None" not in text.split("Settings")[0]


def test_an_ensemble_has_its_members_and_disentangled_nuisances_their_correlations(tmp_path):
    members = {"overall": [estimate(0.625), estimate(0.6875)]}
    bins = [{"confidence": value, "accuracy": estimate(value), "pairs": 20} for value in (0.5, 0.75)]
    both = [
        row(1, 0.5, 0.5, 0.75, nuisances={"redness": {"score": 0.5, "own": 0.25}}),
        row(2, 0.4, 0.4, 0.75, members=members, bins=bins, nuisances={"redness": {"score": -0.125, "own": 0.875}}),
    ]
    page = write_reward_training(reward_training(tmp_path, both, DATA, fit=FIT | {"members": 2})).read_text()
    parsed = Page(page)
    text = parsed.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "member 1 62.5 % 50 % to 68.8 % 40 member 2 68.8 % 56.2 % to 75 % 40" in text
    assert "Correlation with redness on held-out samples: score \N{MINUS SIGN}0.125, its own output 0.875" in text
    assert "Calibration how often the preferred sample is right" in text and "measured calibrated" in text
    assert {"Loss against epochs", "Correlation with redness against epochs"} <= set(parsed.labels)


def changed(folder, preferred=0.0):
    """Add the samples of a changed pair, black and white, and return its line."""
    for name, value in (("black", 0), ("white", 255)):
        Image.new("RGB", (64, 64), (value, value, value)).save(folder / f"{name}.png")
    line = {"prompt": "a white square", "dimension": "overall", "annotator": "bob", "preferred": preferred}
    return line | {"mean": -1.5, "deviation": 0.25, "voters": 3, "files": ["black.png", "white.png"]}


def test_changed_pairs_are_counted_and_drawn_with_the_preferred_sample_first(tmp_path):
    lines = [changed(tmp_path), changed(tmp_path) | {"mean": -3.0, "prompt": "a cube"}]
    lines.append(lines[0] | {"files": None, "prompt": "not saved"})
    votes = {"votes": {"members": 4, "change": "flip"}}
    data = DATA | {"votes": {"labels": 60, "changed": 3}}
    text = text_of(reward_training(tmp_path, [row(4, 0.5, 0.5, 0.75)], data, lines, fit=FIT, **votes))
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Labels flipped by the vote of 4 members: 3 of 60 (5 %)." in text
    first = (
        "preferred not preferred a cube overall: lead of the preferred sample \N{MINUS SIGN}3, deviation 0.25, 3 voters"
    )
    assert first in text and text.index("a cube") < text.index("a white square") and "voters; bob" in text
    assert "not saved" not in text
    page = (tmp_path / "report.html").read_text()
    assert page.index('href="white.png"') < page.index('href="black.png"')


def test_the_report_of_another_commands_folder_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"strategy": {}}))
    (tmp_path / "report.html").write_text("a page")
    assert main(["report", str(tmp_path)]) == 2
    wanted = (
        f"error: {tmp_path} is not a run folder: its config.json is of another command. Give the output of genalign"
    )
    assert capsys.readouterr().err == f"{wanted} train or genalign reward train\n"
    assert (tmp_path / "report.html").read_text() == "a page"


@pytest.mark.slow
def test_the_browser_paints_the_page_and_complains_of_nothing(tmp_path):
    data = DATA | {"votes": {"labels": 60, "changed": 1}}
    rows = [row(1, 0.75, 0.625, 0.5), row(2, 0.5, 0.5, 0.75)]
    folder = reward_training(tmp_path, rows, data, [changed(tmp_path)], fit=FIT, votes={"members": 4, "change": "drop"})
    page, picture = write_reward_training(folder).as_uri(), tmp_path / "page.png"
    dom, complaints = chromium(tmp_path, "--dump-dom", page)
    assert complaints == [] and "</footer>" in dom
    chromium(tmp_path, f"--screenshot={picture}", "--hide-scrollbars", page)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50 and (pixels == 0).all(2).sum() > 64 * 64
