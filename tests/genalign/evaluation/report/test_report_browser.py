import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from genalign.evaluation.evaluate import Evaluation, EvaluationProtocol, SampleRecord
from genalign.evaluation.geneval.result_files import ImageResult, write_results
from genalign.evaluation.report import write_geneval, write_report, write_search
from genalign.runtime.media import writer

CHROMIUM = shutil.which("chromium")
PROTOCOL = EvaluationProtocol("iid", "0" * 16, 4.0, (1.0, 0.0), "ODE()", "float32", 16, (64, 64), 3, 96, "test 1")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium (apt-get install chromium)"),
]


def chromium(profile, *arguments):
    """Output and console messages of a headless browser that stays off the network."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    headless = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command = [CHROMIUM, *headless, *quiet, f"--user-data-dir={profile}", "--window-size=1100,2400", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def save(folder, scores, prompt="a circle", task="single", file=None, protocol=PROTOCOL):
    """Saved evaluation of one sample."""
    Evaluation(protocol, (SampleRecord(prompt, task, 0, 0, file, scores),)).save(folder)


@pytest.fixture
def report(tmp_path):
    """A report with one round and one pair: black before, white after."""
    interval = {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 96}
    row = {"round": 0, "reward": 0.5, "kl": 0.1, "clip_fraction": 0.1, "zero_std_share": 0.2, "failed_rewards": 0}
    row |= {"samples": 96, "nfe": 960, "held_out": {"strict": interval}}
    row |= {"machine": {"seconds": 9.0, "samples_per_second": 2.0, "peak_memory_bytes": 10**9}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for name, value in (("before", 0), ("after", 255)):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), (value, value, value)).save(tmp_path / name / "images" / "0.png")
        save(tmp_path / name, {"strict": value / 255, "partial": value / 255}, file="images/0.png")
    return write_report(tmp_path)


def test_the_browser_parses_the_report_and_complains_of_nothing(report, tmp_path):
    page, complaints = chromium(tmp_path / "profile", "--dump-dom", report.as_uri())
    assert complaints == []
    assert page.count("<svg") == 5 * 3 + 6 + 2 * 2
    assert "</footer>" in page


def test_a_console_message_is_reported(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><script>console.error('a message')</script>")
    _, complaints = chromium(tmp_path / "profile", "--dump-dom", page.as_uri())
    assert len(complaints) == 1
    assert "a message" in complaints[0]


def test_the_report_is_painted(report, tmp_path):
    picture = tmp_path / "page.png"
    chromium(tmp_path / "profile", f"--screenshot={picture}", "--hide-scrollbars", report.as_uri())
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (2400, 1100, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    black = (pixels == 0).all(2).sum()
    assert black > 64 * 64


def test_clips_are_decoded_and_painted(tmp_path):
    """A page's own script, which the policy forbids, asks the players how long their clips last."""
    wave = 0.25 * torch.sin(torch.arange(12000) * 2 * math.pi * 440 / 8000).expand(1, 1, -1)
    for name, score in (("before", 0.0), ("after", 1.0)):
        (file,) = writer(8000)(wave, tmp_path / name, 0)
        save(tmp_path / name, {"strict": score}, "a tone", "pitch", file)
    page = write_report(tmp_path)
    _, complaints = chromium(tmp_path / "profile", "--dump-dom", page.as_uri())
    assert complaints == []
    script = """<script>addEventListener("load", () => { for (const one of document.querySelectorAll("audio"))
      one.onloadedmetadata = () => document.title += " " + one.duration, one.load() })</script></head>"""
    text = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    page.write_text(text.replace("</head>", script))
    dom, complaints = chromium(tmp_path / "profile", "--dump-dom", "--virtual-time-budget=5000", page.as_uri())
    assert complaints == [] and re.search(r"<title>.* 1\.5 1\.5</title>", dom)


# --- prompts that contain HTML --------------------------------------------------------------------------------

HOSTILE = '"><script>document.title="run"</script><img src=x onerror=document.title="run"><b>bold</b>'
ESCAPED = HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def trained(folder):
    """The report of a training in which every text is hostile."""
    for name, value in (("before", 0.0), ("after", 1.0)):
        save(folder / name, {HOSTILE: value}, HOSTILE, HOSTILE, protocol=replace(PROTOCOL, suite=HOSTILE))
    (folder / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    return write_report(folder)


def searched(folder):
    """The page of a search in which every text is hostile."""
    candidate = {"born": 0, "ended": 2, "parent": None, "scores": [[2, [0.5]]]}
    row = {"index": 0, "prompt": HOSTILE, "scores": {HOSTILE: 0.5}, "image": f"javascript:{HOSTILE}"}
    (folder / "lineage").mkdir(parents=True)
    (folder / "lineage" / "00000.json").write_text(json.dumps({"chosen": 0, "lives": [candidate]}))
    (folder / "scores.jsonl").write_text(json.dumps({**row, "calls": {HOSTILE: 2}, "seconds": 1.0}) + "\n")
    return write_search(folder)


def geneval(folder):
    """The page of a GenEval evaluation whose only image is wrong and whose texts are hostile."""
    save(folder, {"relaxed": 0.0}, HOSTILE, HOSTILE, "x.png")
    result = ImageResult("x.png", HOSTILE, HOSTILE, False, HOSTILE, {"prompt": HOSTILE}, {HOSTILE: []})
    write_results(folder / "results.jsonl", [result])
    manifest = {"hash": "0", "protocol_hash": "1", "subject": {HOSTILE: HOSTILE}, "protocol": PROTOCOL.as_dict()}
    (folder / "evaluation.json").write_text(json.dumps(manifest))
    return write_geneval(folder)


@pytest.mark.parametrize("make", [trained, searched, geneval])
def test_html_in_a_prompt_is_text(make, tmp_path):
    page = make(tmp_path / "run")
    policy = '<meta http-equiv="Content-Security-Policy"'
    text = page.read_text()
    assert policy in text
    page.write_text(text.replace(policy, "<meta"))  # what escapes must hold by itself
    dom, complaints = chromium(tmp_path / "profile", "--dump-dom", page.as_uri())
    assert complaints == [] and "<title>run</title>" not in dom
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(dom)
    assert "p" in tags and not {"script", "img"} & set(tags)
    assert ESCAPED in dom


def test_html_that_is_not_escaped_runs(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><title>x</title><p>{HOSTILE}")
    assert "<title>run</title>" in chromium(tmp_path / "profile", "--dump-dom", page.as_uri())[0]
