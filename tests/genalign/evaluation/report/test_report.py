import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch
from markupsafe import Markup
from PIL import Image

from genalign.evaluation.evaluate import Evaluation, Protocol, Record
from genalign.evaluation.paired import gain
from genalign.evaluation.report import write_report
from genalign.evaluation.report.curves import Axis, Point, binned, line_chart, ticks, whisker
from genalign.evaluation.report.reading import read_run
from genalign.evaluation.report.samples import thumbnail
from genalign.evaluation.report.sections import flattened
from genalign.evaluation.report.words import count, duration, signed
from genalign.metrics.intervals import Estimate
from genalign.runtime.media import Thumbnail, writer
from genalign.runtime.spectrogram import spectrogram

PROTOCOL = Protocol("iid", "0" * 16, 4.0, (1.0, 0.5, 0.0), "ODE()", "float32", 16, (64, 64), 3, 96, "test 1")
HOSTILE = """"><script>alert('x')</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & a 'circle'"""


def evaluation(folder, scores, prompt="a circle", size=64, protocol=PROTOCOL):
    """Saved evaluation of one task with an image of noise for every (strict, partial)."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for index, (strict, partial) in enumerate(scores):
        name = f"images/{index:05d}.png"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / name)
        records.append(
            Record(f"{prompt} {index // 3}", "color_attr", index, index, name, {"strict": strict, "partial": partial})
        )
    result = Evaluation(protocol, tuple(records))
    result.save(folder)
    return result


def rows(rounds):
    held_out = {"strict": {"mean": 0.4, "low": 0.35, "high": 0.45, "n": 96}}
    return [
        {
            "round": index,
            "reward": 0.5 + index / 1000,
            "reward_std": 0.2,
            "kl": None if index == 2 else index / 100,
            "clip_fraction": 0.1,
            "zero_std_share": 0.25,
            "grad_norm": 1.0,
            "loss": 0.1,
            "log_ratio_max": 0.2,
            "failed_rewards": 1,
            "samples": index * 96,
            "nfe": index * 960,
            "held_out": held_out if index % 2 else None,
            "machine": {"seconds": index * 90.0, "samples_per_second": 2.0, "peak_memory_bytes": 2_500_000_000},
        }
        for index in range(1, rounds + 1)
    ]


def write_rows(run, made):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


@pytest.fixture
def run(tmp_path):
    """A finished run: of nine images one gets worse, four get better."""
    write_rows(tmp_path, rows(5))
    (tmp_path / "config.json").write_text(json.dumps({"optim": {"lr": 0.0003, "betas": [0.9, 0.99]}, "recipe": "x"}))
    (tmp_path / "environment.json").write_text(json.dumps({"torch": "2.14.1"}))
    evaluation(tmp_path / "before", [(1.0, 1.0), *[(0.0, 0.5)] * 8])
    evaluation(tmp_path / "after", [(0.0, 0.25), *[(1.0, 1.0)] * 4, *[(0.0, 0.5)] * 4])
    return tmp_path


class Page(HTMLParser):
    """Tags, addresses and visible text of a page, and whether its tags close in order."""

    VOID = frozenset({"meta", "link", "input", "img", "line", "rect", "circle", "polyline", "polygon"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def page(run):
    parsed = Page(write_report(run).read_text(encoding="utf-8"))
    assert not parsed.open
    return parsed


# --- the page ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_tells_before_after_and_gain(run):
    text = page(run).text
    assert "Strict score on iid" in text
    assert "11.1 % → 44.4 %" in text
    difference = gain(read_run(run).before, read_run(run).after)["strict"]
    assert f"+33.3 points: {'a clear improvement' if difference.low > 0 else 'no clear change'}" in text
    assert f"95 % interval of the gain {signed('strict', difference.low)} to" in text
    assert "color attr" in text
    assert "optim.betas [0.9, 0.99]" in text
    assert "torch 2.14.1" in text
    assert PROTOCOL.hash in text


def test_pairs_that_changed_most_are_shown_with_their_scores(run):
    parsed = page(run)
    _, regressions, improvements = re.split("Worst regressions|Best improvements", parsed.text)
    assert "strict 1 → 0 partial 1 → 0.25" in regressions
    assert regressions.count("strict") == 1
    assert improvements.count("strict 0 → 1") == 4
    assert parsed.tags.count("img") == 2 * 5


def test_the_page_loads_nothing(run):
    parsed = page(run)
    assert "script" not in parsed.tags
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert "default-src 'none'" in (run / "report.html").read_text()


def test_hostile_text_is_escaped(run):
    for name, score in (("before", (1.0, 1.0)), ("after", (0.0, 0.0))):
        target = run / name
        saved = Evaluation(
            replace(PROTOCOL, suite=HOSTILE), (Record(HOSTILE, HOSTILE, 0, 0, None, {HOSTILE: score[0]}),)
        )
        saved.save(target)
    (run / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    parsed = page(run)
    assert not {"script", "img"} & set(parsed.tags)
    assert parsed.text.count("<script>alert('x')</script>") >= 5
    assert "{{ 7 * 7 }}" in parsed.text


def test_curves_are_drawn_against_each_axis(run):
    text = (write_report(run)).read_text()
    for axis in ("rounds", "minutes", "NFE"):
        assert f'aria-label="Held-out score against {axis}"' in text
        assert f'aria-label="KL to the reference against {axis}"' in text
    assert text.count('class="chart"') == 5 * 3
    assert "40 % (35 % to 45 %) at 3 rounds" in text


def test_size_with_many_images_stays_below_5_mb(tmp_path):
    write_rows(tmp_path, rows(2000))
    evaluation(tmp_path / "before", [(index % 2, 0.5) for index in range(480)])
    evaluation(tmp_path / "after", [(1 - index % 2, 0.5) for index in range(480)])
    path = write_report(tmp_path)
    assert path.stat().st_size < 5_000_000
    assert page(tmp_path).tags.count("img") == 2 * 2 * 12


def test_large_images_are_reduced_and_rationed(tmp_path):
    evaluation(tmp_path / "before", [(index % 2, 0.5) for index in range(24)], size=512)
    evaluation(tmp_path / "after", [(1 - index % 2, 0.5) for index in range(24)], size=512)
    assert write_report(tmp_path).stat().st_size < 3_000_000
    assert 0 < page(tmp_path).tags.count("img") < 48


# --- clips ------------------------------------------------------------------------------------------------------------


def clips(folder, scores, waveforms, rate=8000):
    """Saved evaluation with a WAV file for every score, of ``waveforms`` in turn."""
    chosen = waveforms[torch.arange(len(scores)) % len(waveforms)]
    names = writer(rate)(chosen, folder, 0)
    records = [
        Record(f"{HOSTILE} {i}", "pitch", i, i, name, {"strict": score})
        for i, (name, score) in enumerate(zip(names, scores, strict=True))
    ]
    protocol = replace(PROTOCOL, resolution=(waveforms.shape[2],), verifier="tones-1")
    Evaluation(protocol, tuple(records)).save(folder)


def heard(uri):
    kind, content = uri.split(",")
    assert kind == "data:audio/flac;base64"
    samples, rate = soundfile.read(BytesIO(base64.b64decode(content)), always_2d=True, dtype="float32")
    return torch.from_numpy(samples.T.copy()), rate


def test_clips_are_played_and_seen_before_and_after(tmp_path):
    waves = tones([440.0, 880.0])
    clips(tmp_path / "before", [0.0, 1.0, 0.0], waves[:1])
    clips(tmp_path / "after", [1.0, 0.0, 0.0], waves[1:])
    parsed = page(tmp_path)
    assert parsed.tags.count("audio") == parsed.tags.count("img") == 2 * 2
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert "script" not in parsed.tags and "<script>alert('x')</script>" in parsed.text
    assert "media-src data:;" in (tmp_path / "report.html").read_text()
    assert "1.5 s, 50 to 4000 Hz" in parsed.text
    sounds = [address for address in parsed.addresses if address.startswith("data:audio")]
    for sound, wave in zip(sounds[:2], waves, strict=True):
        found, rate = heard(sound)
        assert rate == 8000
        torch.testing.assert_close(found, wave, rtol=0, atol=1e-4)


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
    assert change == pytest.approx(20 / 80 * 255, abs=2)  # 20 dB of the 80 that the colours span
    assert np.asarray(spectrogram(torch.zeros(1, 12000), 8000)).max() == 0


def test_a_long_recording_is_played_in_part_and_seen_whole(tmp_path):
    stereo = torch.cat([tones([440.0], 9.0, 44100), torch.zeros(1, 1, 9 * 44100)], 1)
    (name,) = writer(44100)(stereo, tmp_path, 0)
    made = thumbnail(tmp_path, name)
    found, rate = heard(made.sound)
    assert rate == 16000 and found.shape == (1, 6 * 16000)
    torch.testing.assert_close(found[:, 200:-200], tones([440.0], 6.0, 16000)[0, :, 200:-200] / 2, rtol=0, atol=1e-3)
    assert made.note == "the first 6 of 9 s, 50 to 22050 Hz" and made.picture.startswith("data:image/png;base64,")


def test_clips_of_any_length_and_rate_are_shown(tmp_path):
    for rate, length in ((16, 40), (8000, 3), (48000, 100)):
        (name,) = writer(rate)(torch.zeros(1, 1, length), tmp_path, 0)
        assert heard(thumbnail(tmp_path, name).sound)[0].shape[1] >= 1
    assert thumbnail(tmp_path, "audio/9.wav") == thumbnail(tmp_path, None) == Thumbnail()
    (tmp_path / "audio" / "00000.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"expected audio \(WAV or FLAC\), but .*00000\.wav cannot be read"):
        thumbnail(tmp_path, "audio/00000.wav")


def test_size_with_many_clips_stays_below_5_mb(tmp_path):
    noise = torch.rand(1, 1, 6 * 16000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clips(tmp_path / "before", [index % 2 for index in range(24)], noise, 16000)
    clips(tmp_path / "after", [1 - index % 2 for index in range(24)], noise, 16000)
    assert write_report(tmp_path).stat().st_size < 3_000_000
    assert 0 < page(tmp_path).tags.count("audio") < 48


# --- runs with parts missing ------------------------------------------------------------------------------------------


def test_an_interrupted_run_has_a_report(run):
    (run / "after" / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "rew')
    text = page(run).text
    assert "from round 1 to round 5; the run is not finished" in text
    assert "40.0 % → 40.0 %" in text
    assert "interrupted or is still under way" in text
    assert "not measured" in text
    assert "Worst regressions" not in text


def test_an_empty_folder_has_a_report(tmp_path):
    text = page(tmp_path).text
    assert "nothing recorded yet" in text
    assert "No training metrics" in text


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        write_report(tmp_path / "absent")


def test_different_protocols_are_shown_but_not_compared(run, tmp_path):
    saved = read_run(run).after
    replace(saved, protocol=replace(PROTOCOL, guidance=1.0)).save(run / "after")
    text = page(run).text
    assert "guidance is 4.0 before and 1.0 after" in text
    assert "not comparable" in text
    assert "points" not in text


def test_a_stored_gain_replaces_the_overall_one(run):
    (run / "gain.json").write_text(json.dumps({"strict": Estimate(1 / 3, -0.2, 0.8, 9).as_dict()}))
    text = page(run).text
    assert "+33.3 points: no clear change" in text
    assert "\N{MINUS SIGN}20.0 to +80.0" in text


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


def test_ticks_need_a_range():
    with pytest.raises(ValueError, match="need a range"):
        ticks(1.0, 1.0, 5)


def test_binning_averages_neighbours():
    assert binned([Point(x, 2 * x) for x in range(5)], 3) == [Point(0.5, 1), Point(2.5, 5), Point(4, 8)]
    points = [Point(0, 1, 0.5, 1.5)]
    assert binned(points, 3) == points


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0, 0.0], [1.0, 1.0], [-3.0, 2.0]])
def test_charts_stay_in_their_frame(values):
    svg = line_chart([Point(x, y) for x, y in enumerate(values)], Axis("x", str), Axis("y", str), "made")
    heights = [float(y) for y in re.findall(r'cy="([-\d.]+)"', svg)]
    assert len(heights) == 2 * len(values)
    assert all(20 <= height <= 216 for height in heights)


def test_a_chart_escapes_its_labels_and_needs_points():
    svg = line_chart([Point(0, 1)], Axis("<b>", str), Axis("y", str), '"><script>')
    assert isinstance(svg, Markup)
    assert "<b>" not in svg
    assert "<script>" not in svg
    with pytest.raises(ValueError, match="no points"):
        line_chart([], Axis("x", str), Axis("y", str), "made")


@pytest.mark.parametrize(("low", "high", "sign"), [(0.1, 0.3, "up"), (-0.3, -0.1, "down"), (-0.1, 0.1, "even")])
def test_whisker_marks_what_the_interval_says(low, high, sign):
    svg = whisker(Estimate((low + high) / 2, low, high, 9), (-0.5, 0.5), "gain")
    assert f'class="mean {sign}"' in svg
    assert 'class="zero" x1="80.0"' in svg


# --- words ------------------------------------------------------------------------------------------------------------


def test_numbers_in_words():
    assert [count(value) for value in (7, 999, 1000, 999_999, 1_234_567)] == ["7", "999", "1k", "1M", "1.23M"]
    assert [duration(value) for value in (0.4, 59.7, 61, 3725)] == ["0 s", "1 min 0 s", "1 min 1 s", "1 h 2 min"]
    assert (signed("strict", -0.0123), signed("aesthetic", 0.5)) == ("\N{MINUS SIGN}1.2", "+0.5")


def test_flattened_json():
    facts = flattened({"a": {"b": None, "c": [1, {"d": "é"}]}, "e": "text"})
    assert [(fact.label, fact.value) for fact in facts] == [("a.b", "null"), ("a.c", '[1, {"d": "é"}]'), ("e", "text")]
    assert flattened(None) == []
