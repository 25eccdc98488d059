"""The label page: what is asked and stored, who may ask, and the page in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from genalign.reward_learning.examples import examples
from genalign.reward_learning.label_page import LabelPageSettings, serve_labels
from genalign.reward_learning.label_page import app as label_page_app
from genalign.reward_learning.label_page.agreement import label_agreement
from genalign.reward_learning.label_page.app import build_label_app
from genalign.reward_learning.label_page.questions import annotator_name
from genalign.reward_learning.label_page.store import LabelStore
from genalign.reward_learning.preferences import JudgedSample, Judgment, append_judgments, read_judgments
from genalign.runtime.files import Claims
from genalign.runtime.media import AudioMedium
from genalign.scoring.server import listen, server
from genalign.types import Prompt
from tests.devtools import Tab, browser

HOSTILE = "a <script>document.title = 'run'</script> & <img src=x onerror=\"document.title='run'\">"
PAIRS = LabelPageSettings()
HEADERS = {"X-Genalign-Label": "1"}


def dataset(folder: Path, count: int = 4, size: int = 2, prompt: str = "a cube") -> Path:
    """Comparisons of ``size`` images by secret-0, secret-1, ...; the level of an image says which it is."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        samples = [{"file": f"images/{number}_{place}.png", "generator": f"secret-{place}"} for place in range(size)]
        for place, sample in enumerate(samples):
            Image.new("RGB", (8, 8), (number, 50 * place, 0)).save(folder / sample["file"])
        lines.append(
            {"prompt": f"{prompt} {number}", "kind": {1: "label", 2: "pair"}.get(size, "ranking"), "samples": samples}
        )
    (folder / "comparisons.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def client(folder: Path, settings: LabelPageSettings = PAIRS, token: str | None = None) -> TestClient:
    return TestClient(build_label_app(LabelStore(folder, settings), token), base_url="http://127.0.0.1:8322")


def post(page: TestClient, action: str, annotator: Any = "ada", **body: Any) -> Any:
    answer = page.post(f"/api/{action}", json={"annotator": annotator, **body}, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(page: TestClient, action: str, **body: Any) -> tuple[int, str]:
    answer = page.post(f"/api/{action}", json={"annotator": "ada"} | body, headers=HEADERS)
    return answer.status_code, answer.json()["error"]["code"]


def judge(page: TestClient, scores: Sequence[float], annotator: str = "ada") -> Any:
    """Judge what is asked next, in its only dimension."""
    asked = post(page, "next", annotator)
    return post(page, "judge", annotator, index=asked["current"], scores={asked["dimensions"][0]: list(scores)})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]


# --- what is asked and stored -----------------------------------------------------------------------------------------


def test_a_choice_of_the_left_sample_is_stored_in_the_order_of_the_comparison(tmp_path: Path) -> None:
    page, firsts = client(dataset(tmp_path, 12)), []
    for _ in range(12):
        asked = post(page, "next")
        left = page.get(asked["question"]["samples"][0]["url"])
        (tmp_path / "left.png").write_bytes(left.content)
        firsts.append(Image.open(tmp_path / "left.png", formats=["PNG"]).getpixel((0, 0))[1] // 50)  # type: ignore[index]
        judge(page, [1, 0])
    assert set(firsts) == {0, 1}
    for first, line in zip(firsts, lines(tmp_path), strict=True):
        assert line["shown"] == [first, 1 - first]
        assert line["scores"] == {"overall": [1.0 - first, float(first)]} and line["annotator"] == "ada"
        assert [sample["generator"] for sample in line["samples"]] == ["secret-0", "secret-1"]
    pairs = examples(read_judgments(tmp_path)).pairs
    assert pairs.preferred.tolist() == [[1.0]] * 12  # in the order in which they were shown


def test_the_order_is_drawn_by_seed_annotator_and_comparison(tmp_path: Path) -> None:
    store = LabelStore(dataset(tmp_path, 40), PAIRS)

    def orders(annotator: str, seed: int = 0) -> list[tuple[int, ...]]:
        return [question.order(annotator, seed) for question in store.questions.distinct]

    assert orders("ada") == orders("ada") != orders("bob") != orders("bob", 1)
    assert 8 < Counter(orders("ada"))[(0, 1)] < 32
    (tmp_path / "comparisons.jsonl").write_text((tmp_path / "comparisons.jsonl").read_text().partition("\n")[2])
    rest = LabelStore(tmp_path, PAIRS).questions.distinct
    assert [question.order("ada", 0) for question in rest] == orders("ada")[1:]  # whatever else there is


def test_neither_generators_nor_files_are_told(tmp_path: Path) -> None:
    page = client(dataset(tmp_path))
    asked = post(page, "next")
    urls = [sample["url"] for sample in asked["question"]["samples"]] + asked["upcoming"]
    answers = [page.get("/"), page.get("/api/about"), *map(page.get, urls)]
    told = json.dumps(asked) + "".join(answer.text + str(answer.headers) for answer in answers)
    assert len(answers) == 10 and all(answer.status_code == 200 for answer in answers)
    for secret in ("secret", "images/", ".png", str(tmp_path)):
        assert secret not in told
    other = client(tmp_path)
    assert {s["url"] for s in post(other, "next")["question"]["samples"]}.isdisjoint(urls)  # new numbers at each start


def test_judgments_survive_a_restart_and_are_not_asked_again(tmp_path: Path) -> None:
    dataset(tmp_path)
    page = client(tmp_path)
    judge(page, [1, 0])
    judge(page, [0.5, 0.5])
    judge(page, [0, 1], "bob")
    again = client(tmp_path)
    asked = post(again, "next")
    assert (asked["judged"], asked["total"], asked["current"], asked["undoable"]) == (2, 4, 2, True)
    assert post(again, "next", "bob")["current"] == 1 and post(again, "next", "eve")["current"] == 0
    for _ in range(2):
        judge(again, [0, 1])
    done = post(again, "next")
    assert done["question"] is None and done["judged"] == 4
    assert [line["annotator"] for line in lines(tmp_path)] == ["ada", "ada", "bob", "ada", "ada"]


def test_undo_takes_back_the_last_line_of_its_annotator_alone(tmp_path: Path) -> None:
    dataset(tmp_path)
    foreign = Judgment(Prompt("another"), (JudgedSample(tmp_path / "images/0_0.png"),), "label", {"x": (1,)}, "ada")
    append_judgments(tmp_path, [foreign])
    page = client(tmp_path)
    judge(page, [1, 0])
    judge(page, [0, 1])
    judge(page, [1, 0], "bob")
    before = (tmp_path / "preferences.jsonl").read_text().splitlines()
    assert post(page, "undo")["current"] == 1
    assert (tmp_path / "preferences.jsonl").read_text().splitlines() == [*before[:2], before[3]]
    restarted = client(tmp_path)  # what was judged before a restart is undone as well
    assert post(restarted, "undo")["current"] == 0
    assert (tmp_path / "preferences.jsonl").read_text().splitlines() == [before[0], before[3]]
    assert refused(restarted, "undo") == (422, "undo") and not list(tmp_path.glob("*.part"))
    assert post(restarted, "next", "bob")["judged"] == 1


def test_undo_of_a_line_that_someone_else_removed_changes_nothing(tmp_path: Path) -> None:
    page = client(dataset(tmp_path))
    judge(page, [1, 0])
    (tmp_path / "preferences.jsonl").write_text("")
    assert refused(page, "undo") == (422, "undo") and (tmp_path / "preferences.jsonl").read_text() == ""


def test_a_skipped_question_comes_back_when_it_is_asked_for_or_undone(tmp_path: Path) -> None:
    page = client(dataset(tmp_path, 2))
    assert post(page, "skip", index=0)["current"] == 1
    assert post(page, "undo")["current"] == 0
    post(page, "skip", index=0)
    done = judge(page, [1, 0])
    assert done["question"] is None and (done["judged"], done["skipped"]) == (1, 1)
    assert post(page, "ask_skipped")["current"] == 0
    assert judge(page, [1, 0])["judged"] == 2
    assert post(page, "undo")["current"] == 0 and post(page, "undo")["current"] == 0
    assert lines_or_none(tmp_path) == [] and refused(page, "undo")[0] == 422


def lines_or_none(folder: Path) -> list[dict[str, Any]]:
    return lines(folder) if (folder / "preferences.jsonl").exists() else []


def test_several_dimensions_are_judged_together_and_only_the_missing_ones_after_a_change(tmp_path: Path) -> None:
    page = client(dataset(tmp_path, 1))
    judge(page, [1, 0])
    page = client(tmp_path, LabelPageSettings(dimensions=("overall", "color", "shape")))
    asked = post(page, "next")
    assert asked["dimensions"] == ["color", "shape"] and asked["judged"] == 0
    assert refused(page, "judge", index=0, scores={"color": [1, 0]}) == (422, "judge")
    assert refused(page, "judge", index=0, scores={name: [1, 0] for name in ("color", "shape", "x")})[0] == 422
    done = post(page, "judge", index=0, scores={"color": [1, 0], "shape": [0.5, 0.5]})
    assert done["question"] is None and set(lines(tmp_path)[1]["scores"]) == {"color", "shape"}
    assert post(page, "undo")["dimensions"] == ["color", "shape"]
    assert len(lines(tmp_path)) == 1


def test_more_than_two_samples_are_ranked_with_ties(tmp_path: Path) -> None:
    page = client(dataset(tmp_path, 2, size=4))
    asked = post(page, "next")
    assert asked["question"]["kind"] == "ranking" and len(asked["question"]["samples"]) == 4
    judge(page, [3, 0, 3, 1])  # levels without gaps are stored
    (line,) = lines(tmp_path)
    assert [line["scores"]["overall"][index] for index in line["shown"]] == [2, 0, 2, 1]
    assert sorted(line["shown"]) == [0, 1, 2, 3] and line["kind"] == "ranking"
    for wrong in ([4, 0, 1, 2], [0.5, 0, 1, 2], [True, 0, 1, 2], [1, 0], "0123", None):
        assert refused(page, "judge", index=1, scores={"overall": wrong}) == (422, "judge")


@pytest.mark.parametrize(("kind", "right", "wrong"), [("rating", [7], [8]), ("label", [0], [0.5])])
def test_pairs_are_rated_and_labelled_as_single_samples(kind: Any, right: Any, wrong: Any, tmp_path: Path) -> None:
    folder = dataset(tmp_path, 2)
    listing = (folder / "comparisons.jsonl").read_text()
    first, second = map(json.loads, listing.splitlines())
    second["prompt"], second["samples"] = first["prompt"], [first["samples"][0], second["samples"][0]]
    (folder / "comparisons.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(second))
    store = LabelStore(folder, LabelPageSettings(kind=kind, scale=7))
    page = TestClient(build_label_app(store), base_url="http://localhost")
    assert (store.questions.comparisons, len(store.questions.distinct), store.questions.repeated) == (2, 3, 1)
    assert refused(page, "judge", index=0, scores={"overall": wrong}) == (422, "judge")
    for _ in range(3):
        judge(page, right)
    assert all(line["kind"] == kind and "shown" not in line for line in lines(folder))
    assert [len(judgment.samples) for judgment in read_judgments(folder)] == [1, 1, 1]
    assert examples(read_judgments(folder)).grades.values.tolist() == [right] * 3


def test_an_annotator_who_judges_in_two_windows_judges_once(tmp_path: Path) -> None:
    page = client(dataset(tmp_path))
    body = {"index": 0, "scores": {"overall": [1, 0]}}
    post(page, "judge", **body)
    assert refused(page, "judge", **body) == (409, "judged") and len(lines(tmp_path)) == 1


def test_annotators_judge_at_once_and_no_line_is_lost_or_torn(tmp_path: Path) -> None:
    store = LabelStore(dataset(tmp_path, 12), PAIRS)
    page = TestClient(build_label_app(store), base_url="http://127.0.0.1")
    names = ["ada", "bob", "eve"]

    def work(name: str) -> None:
        for step in range(12):
            judge(page, [1, 0], name)
            if step % 4 == 3:
                post(page, "undo", name)
                judge(page, [0, 1], name)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, names))
    judgments = read_judgments(tmp_path)
    assert Counter(judgment.annotator for judgment in judgments) == dict.fromkeys(names, 12)
    assert len({(judgment.annotator, judgment.prompt.text) for judgment in judgments}) == 36


def test_a_line_that_was_not_written_to_its_end_is_removed_at_the_start(tmp_path: Path) -> None:
    judge(client(dataset(tmp_path)), [1, 0])
    file = tmp_path / "preferences.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:40])
    judge(client(tmp_path), [1, 0])
    assert file.read_text().startswith(whole) and len(lines(tmp_path)) == 2
    file.write_text(whole.rstrip("\n"))  # whole, but not ended
    judge(client(tmp_path), [1, 0])
    assert len(lines(tmp_path)) == 2


def test_a_full_disk_is_said_and_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = client(dataset(tmp_path))
    judge(page, [1, 0])
    before = (tmp_path / "preferences.jsonl").read_bytes()

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("genalign.reward_learning.label_page.store.sync", fail)
        assert refused(page, "judge", index=1, scores={"overall": [1, 0]}) == (507, "disk")
    assert (tmp_path / "preferences.jsonl").read_bytes() == before
    assert judge(page, [1, 0])["judged"] == 2


# --- data that cannot be asked about ----------------------------------------------------------------------------------


def test_comparisons_of_equal_files_and_repeated_ones_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = dataset(tmp_path, 3)
    listing = (folder / "comparisons.jsonl").read_text()
    (folder / "comparisons.jsonl").write_text(listing + listing.splitlines()[2])
    (folder / "images/0_1.png").write_bytes((folder / "images/0_0.png").read_bytes())
    questions = LabelStore(folder, PAIRS).questions
    assert (questions.comparisons, len(questions.distinct), questions.equal, questions.repeated) == (4, 2, 1, 1)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("../outside.png", "leads out of"),
        ("/etc/passwd", "leads out of"),
        ("link.png", "is a link that leads out of"),
        ("drawing.svg", "is shown by no browser"),
        ("absent.png", "there is no"),
    ],
)
def test_a_file_that_cannot_be_served_is_refused_by_name(sample: str, message: str, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", 1)
    (tmp_path / "outside.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "drawing.svg").write_text("<svg/>")
    line = {"prompt": "a cube", "samples": ["images/0_0.png", sample]}
    (folder / "comparisons.jsonl").write_text(json.dumps(line))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        LabelStore(folder, PAIRS)
    assert sample in str(error.value)


def test_folders_that_cannot_be_judged_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"comparisons\.jsonl: genalign reward collect"):
        LabelStore(tmp_path, PAIRS)
    folder = dataset(tmp_path, 2, size=1)
    with pytest.raises(ValueError, match=r"2 of 2 comparisons in .* have one sample"):
        LabelStore(folder, PAIRS)
    judge(client(folder, LabelPageSettings(kind="rating")), [5])
    with pytest.raises(ValueError, match="1 judgments of the kind 'rating', which do not go together"):
        LabelStore(folder, LabelPageSettings(kind="label"))
    with pytest.raises(ValueError, match="ratings from 5 to 5, which are not on a scale of 1 to 4"):
        LabelStore(folder, LabelPageSettings(kind="rating", scale=4))
    (folder / "preferences.jsonl").write_text("x", encoding="utf-16")
    with pytest.raises(ValueError, match="is not UTF-8"):
        LabelStore(folder, LabelPageSettings(kind="rating"))


@pytest.mark.parametrize("wrong", [{"kind": "pairs"}, {"dimensions": ()}, {"dimensions": ("a", "a")}, {"scale": 11}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LabelPageSettings(**wrong)


# --- security ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "  ", "x" * 65, "a\x00b", "\u202eada", 5, None, ["ada"]])
def test_a_name_that_is_no_plain_text_is_refused(name: Any, tmp_path: Path) -> None:
    assert refused(client(dataset(tmp_path)), "next", annotator=name) == (422, "next")


def test_spaces_and_composed_letters_make_no_other_annotator() -> None:
    assert annotator_name("  Zoe\u0301   K ") == annotator_name("Zo\u00e9 K") == "Zo\u00e9 K"


@pytest.mark.parametrize(
    "path",
    ["0", "../comparisons.jsonl", "..%2Fcomparisons.jsonl", "images/0_0.png", "%2Fetc%2Fpasswd", "9" * 5000, "%00"],
)
def test_only_numbers_that_the_page_gave_are_served(path: str, tmp_path: Path) -> None:
    assert client(dataset(tmp_path)).get(f"/media/{path}").status_code == 404


def test_a_sample_says_its_type_and_is_sent_in_ranges(tmp_path: Path) -> None:
    page = client(dataset(tmp_path))
    url = post(page, "next")["question"]["samples"][0]["url"]
    part = page.get(url, headers={"Range": "bytes=0-3"})
    assert part.status_code == 206 and part.content == b"\x89PNG" and part.headers["content-type"] == "image/png"
    assert part.headers["x-content-type-options"] == "nosniff"


def test_a_write_needs_json_and_the_header_and_its_own_site(tmp_path: Path) -> None:
    page, body = client(dataset(tmp_path)), json.dumps({"annotator": "ada", "index": 0, "scores": {"overall": [1, 0]}})
    kind = {"Content-Type": "application/json"}
    for headers in (
        kind,
        HEADERS,
        HEADERS | {"Content-Type": "text/plain"},
        HEADERS | kind | {"Sec-Fetch-Site": "cross-site"},
    ):
        answer = page.post("/api/judge", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin")
    assert page.get("/api/judge").status_code == 405
    allowed = page.options(
        "/api/judge", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in allowed.headers
    assert not (tmp_path / "preferences.jsonl").exists()
    assert page.post("/api/judge", content=body, headers=HEADERS | kind).status_code == 200


def judging(index: Any = 0, scores: Any = ((1, 0),)) -> bytes:
    """A request to judge; ``scores`` as an object, or those of the dimension "overall"."""
    scores = {"overall": scores[0]} if isinstance(scores, tuple) else scores
    return json.dumps({"annotator": "ada", "index": index, "scores": scores}).encode()


BROKEN = [(b"x" * 70000, 413), (b"{", 400), (b"[]", 400), (b"[" * 60000, 400), (b'{"annotator": "ada"}', 422)]
NO_INDEX = [(judging(index), 422) for index in (-1, 4, "0", 0.0, True, None)]
NO_PAIR = [(judging(0, (scores,)), 422) for scores in ([1, 1], [float("nan"), 1], ["1", 0], [1], None)]
NO_SCORES = [(judging(0, scores), 422) for scores in ({}, [], {"x": [1, 0]}, None)]


@pytest.mark.parametrize(("body", "status"), [*BROKEN, *NO_INDEX, *NO_PAIR, *NO_SCORES])
def test_a_malformed_write_is_refused(body: bytes, status: int, tmp_path: Path) -> None:
    page = client(dataset(tmp_path))
    answer = page.post("/api/judge", content=body, headers=HEADERS | {"Content-Type": "application/json"})
    assert answer.status_code == status and not (tmp_path / "preferences.jsonl").exists()
    assert page.post("/api/nothing", json={"annotator": "ada"}, headers=HEADERS).status_code == 404


def test_without_a_token_another_host_name_is_refused(tmp_path: Path) -> None:
    store = LabelStore(dataset(tmp_path), PAIRS)
    for host, status in (("127.0.0.1:8322", 200), ("localhost", 200), ("[::1]:8322", 200), ("evil.example", 403)):
        page = TestClient(build_label_app(store), base_url=f"http://{host}")
        answers = [
            page.get("/api/about"),
            page.get("/api/agreement"),
            page.post("/api/next", json={"annotator": "a"}, headers=HEADERS),
        ]
        assert {answer.status_code for answer in answers} == {status}


def test_with_a_token_nothing_is_told_or_taken_without_it(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    store = LabelStore(folder, PAIRS)
    app = build_label_app(store, "s3cret-tökén")
    page = TestClient(app, base_url="http://labels.example")
    assert "cube" not in page.get("/").text and page.get("/agreement").status_code == 200  # the page holds no data
    for path in ("/api/about", "/api/agreement", "/media/0"):
        assert page.get(path).status_code == 401
    assert refused(page, "next") == (401, "token")
    for wrong in ("", "s3cret", "é", "\ud800", None, 5):
        content = json.dumps({"token": wrong})
        answer = page.post("/api/enter", content=content, headers=HEADERS | {"Content-Type": "application/json"})
        assert answer.status_code == 401 and "set-cookie" not in answer.headers
    answer = page.post("/api/enter", json={"token": "s3cret-tökén"}, headers=HEADERS)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "s3cret" not in cookie
    assert judge(page, [1, 0])["judged"] == 1 and page.get("/api/agreement").status_code == 200
    restarted = TestClient(
        build_label_app(LabelStore(folder, PAIRS), "another"), base_url="http://labels.example", cookies=page.cookies
    )
    assert refused(restarted, "next") == (401, "token")  # the cookie of another token


def test_the_policy_admits_the_scripts_of_the_page_alone(tmp_path: Path) -> None:
    page = client(dataset(tmp_path)).get("/")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy and "*" not in policy
    assert page.headers["cache-control"] == "no-store" and page.headers["referrer-policy"] == "no-referrer"
    assert not re.findall(r"https?://|innerHTML|\sstyle=|\son\w+=\"", page.text)


def test_another_host_needs_a_token_and_a_folder_one_server(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 can be reached by others: .* MY_TOKEN"):
        serve_labels(folder, PAIRS, "0.0.0.0", 0, None, "MY_TOKEN")
    with Claims(folder / ".label_page").try_claim(0) as held:
        assert held
        with pytest.raises(ValueError, match="another process serves the label page"):
            serve_labels(folder, PAIRS, port=0)


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genalign.reward_learning.label_page.app", None)
    monkeypatch.delattr("genalign.reward_learning.label_page.app", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'genalign\[serve\]'"):
        serve_labels(dataset(tmp_path), PAIRS, port=0)
    assert label_page_app.build_label_app is build_label_app


# --- agreement --------------------------------------------------------------------------------------------------------


def test_agreement_counts_equal_answers_ties_and_left_sides(tmp_path: Path) -> None:
    samples = tuple(JudgedSample(tmp_path / f"{place}.png") for place in range(3))

    def pair(number: int, annotator: str, first: float, shown: tuple[int, ...] = (0, 1)) -> Judgment:
        scores = {"overall": (first, 1 - first)}
        return Judgment(Prompt(f"p{number}"), samples[:2], "pair", scores, annotator, shown=shown)

    ada = [pair(0, "ada", 1), pair(1, "ada", 1), pair(2, "ada", 0.5), pair(3, "ada", 0, (1, 0))]
    bob = [pair(0, "bob", 1, (1, 0)), pair(1, "bob", 0), pair(2, "bob", 0.5), pair(4, "bob", 1)]
    ranking = Judgment(Prompt("r"), samples, "ranking", {"overall": (2, 1, 0)}, "ada")
    reverse = replace(ranking, samples=samples[::-1], scores={"overall": (1, 0, 1)}, annotator="bob")
    found = label_agreement([*ada, *bob, ranking, reverse, replace(ada[0], annotator=None)])
    left = {one.annotator: (one.judgments, one.compared, one.ties, one.left, one.decided) for one in found.annotators}
    assert left == {"ada": (5, 7, 1, 3, 3), "bob": (5, 7, 2, 1, 3)}  # bob's first has the winner on the right
    (both,) = found.pairs
    assert both.annotators == ("ada", "bob") and (both.common, both.agreed) == (6, 3)  # p0, p2, and 0 over 1 of r
    assert (both.decided, both.agreed_decided) == (4, 2)


@pytest.mark.parametrize(("left", "one_sided"), [(30, True), (18, False), (0, True)])
def test_an_annotator_who_prefers_a_side_is_warned_of(left: int, one_sided: bool, tmp_path: Path) -> None:
    samples = tuple(JudgedSample(tmp_path / f"{place}.png") for place in range(2))
    judgments = [
        Judgment(Prompt(f"p{number}"), samples, "pair", {"overall": scores}, "ada", shown=(1, 0))
        for number, scores in enumerate([(0.0, 1.0)] * left + [(1.0, 0.0)] * (30 - left))
    ]
    (ada,) = label_agreement(judgments).annotators
    assert (ada.left, ada.decided, ada.one_sided) == (left, 30, one_sided)


def test_agreement_is_served(tmp_path: Path) -> None:
    page = client(dataset(tmp_path, 1))
    assert page.get("/api/agreement").json() == {"annotators": [], "pairs": []}
    judge(page, [0.5, 0.5])
    judge(page, [0.5, 0.5], "bob")
    (both,) = page.get("/api/agreement").json()["pairs"]
    assert both == {"annotators": ["ada", "bob"], "common": 1, "agreed": 1, "decided": 0, "agreed_decided": 0}


# --- in a browser -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(folder: Path, settings: LabelPageSettings = PAIRS, token: str | None = None) -> Iterator[str]:
    """The URL of the label page of a folder."""
    with contextlib.closing(listen("127.0.0.1", 0)) as sock:
        running = server(build_label_app(LabelStore(folder, settings), token))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not running.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def enter(tab: Tab, name: str) -> None:
    """Type a name into the form, and wait for the first question."""
    tab.wait("document.querySelector('input')")
    tab.type(name)
    tab.press("Enter")
    tab.wait("state && state.question && ready")


def answer(tab: Tab, key: str) -> None:
    """Press a key, and wait for what the server asks next."""
    tab.value("window.before = state; 0")
    tab.press(key)
    tab.wait("state !== before && !busy && (ready || !state.question)")


def always_left(line: dict[str, Any]) -> dict[str, Any]:
    """A judgment of a pair, as one makes it who prefers the left sample."""
    return line | {"scores": {"overall": [1 - line["shown"][0], line["shown"][0]]}}


def shown_level(tab: Tab, place: int) -> int:
    """Which sample of its comparison an image is: its level of green, as painted."""
    script = """(() => { const canvas = new OffscreenCanvas(1, 1).getContext("2d"), image = document.images[PLACE];
      canvas.drawImage(image, 0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data[1]; })()"""
    level: int = tab.value(script.replace("PLACE", str(place)))
    return round(level / 50)


@pytest.mark.slow
def test_pairs_are_judged_in_a_browser_by_keys_clicks_and_touch(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", 8, prompt=HOSTILE)
    with browser(tmp_path / "profile") as tab, serving(folder) as url:
        tab.resize(1200, 900)
        tab.open(url)
        enter(tab, "Ada")
        assert tab.value("document.querySelector('#prompt').textContent") == f"{HOSTILE} 0"
        left, expected = [], [[1, 0], [0, 1], [1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]]
        for key in ("ArrowLeft", "ArrowRight", "1", "2", "0", " "):
            left.append(shown_level(tab, 0))
            answer(tab, key)
        stored = lines(folder)
        for first, scores, line in zip(left, expected, stored, strict=True):
            assert line["shown"] == [first, 1 - first]
            assert [line["scores"]["overall"][index] for index in line["shown"]] == scores
        answer(tab, "u")
        assert lines(folder) == stored[:-1] and tab.value("state.current") == 5
        answer(tab, "s")
        assert tab.value("state.current") == 6 and "1 skipped" in tab.value("document.body.innerText")
        tab.click(".sample", 1)
        tab.wait("state.current === 7 && ready")
        tab.resize(400, 800, mobile=True)
        places = tab.value("[...document.querySelectorAll('.sample')].map((one) => one.getBoundingClientRect().top)")
        assert places[1] > places[0] + 100  # one above the other
        tab.tap("#rows button", 1)
        tab.wait("!state.question && !busy")
        tab.tap("main button")
        tab.wait("state.current === 5 && ready")
        tab.open(url)  # the name is remembered
        tab.wait("state && state.question && ready")
        answer(tab, "1")
        assert "Everything is judged" in tab.value("document.body.innerText")
        last = {line["prompt"][-1]: line for line in lines(folder)}
        assert [last["6"]["scores"]["overall"][index] for index in last["6"]["shown"]] == [0, 1]
        assert last["7"]["scores"]["overall"] == [0.5, 0.5] and len(lines(folder)) == 8
        assert {line["annotator"] for line in lines(folder)} == {"Ada"}
        more = [line | {"prompt": f"{line['prompt']} {number}"} for line in lines(folder) for number in range(3)]
        (folder / "preferences.jsonl").write_text("".join(json.dumps(always_left(line)) + "\n" for line in more))
        tab.open(f"{url}/agreement")
        tab.wait("document.querySelector('table')")
        warned = "Ada found the left sample better in 24 of 24 pairs"
        assert warned in tab.value("document.querySelector('p.warning').textContent")
        assert tab.messages == [] and tab.value("document.title") != "run"


@pytest.mark.slow
def test_rankings_grades_and_tokens_in_a_browser(tmp_path: Path) -> None:
    ranked, graded = dataset(tmp_path / "ranked", 2, size=3), dataset(tmp_path / "graded", 1)
    dimensions = LabelPageSettings(kind="rating", scale=4, dimensions=("color", "shape"))
    with browser(tmp_path / "profile") as tab:
        with serving(ranked, token="s3cret") as url:
            tab.open(f"{url}/#token=s3cret")
            enter(tab, "Ada")
            assert tab.value("location.href") == f"{url}/"
            tab.press("2")
            tab.press("0")  # the next shares its rank
            tab.press("1")
            assert tab.value("document.querySelector('.order').textContent").startswith("2 = 1")
            tab.press("u")
            tab.click("#rows button", 0)
            tab.press("3")
            tab.wait("state.current === 1 && ready")
            answer(tab, "s")
            tab.wait("!state.question")
            (line,) = lines(ranked)
            assert [line["scores"]["overall"][index] for index in line["shown"]] == [1, 1, 0]
        with serving(graded, dimensions) as url:
            tab.open(url)
            enter(tab, "Bob")
            tab.press("3")
            tab.press("u")
            tab.press("4")
            tab.press("9")  # no grade
            assert not (graded / "preferences.jsonl").exists()
            answer(tab, "1")
            assert [line["scores"] for line in lines(graded)] == [{"color": [4], "shape": [1]}]
        assert tab.messages == []


@pytest.mark.slow
def test_clips_are_played_by_key_and_judged_in_a_browser(tmp_path: Path) -> None:
    waves = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 1, 8000)).astype(np.float32)
    for place, wave in enumerate(waves):
        (tmp_path / f"{place}.wav").write_bytes(AudioMedium(8000).encode(torch.from_numpy(wave)))
    (tmp_path / "comparisons.jsonl").write_text(json.dumps({"prompt": "a tone", "samples": ["0.wav", "1.wav"]}))
    with browser(tmp_path / "profile") as tab, serving(tmp_path) as url:
        tab.open(url)
        enter(tab, "Ada")
        tab.wait("[...document.querySelectorAll('audio')].every((clip) => clip.duration === 1)")
        tab.press("p")
        tab.wait("document.querySelectorAll('audio')[0].played.length > 0")
        tab.press("p")
        tab.wait(
            "document.querySelectorAll('audio')[1].played.length > 0 && document.querySelectorAll('audio')[0].paused"
        )
        answer(tab, "2")
        assert len(lines(tmp_path)) == 1 and tab.messages == []


@pytest.mark.slow
def test_the_server_prints_its_address_is_alone_and_stops_on_an_interruption(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    program = (
        "import pathlib, sys; from genalign.reward_learning.label_page import LabelPageSettings, serve_labels;"
        "serve_labels(pathlib.Path(sys.argv[1]), LabelPageSettings(), port=0)"
    )
    command = [sys.executable, "-c", program, str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(3)]
        assert printed[0] == "4 comparisons: 4 questions of the kind 'pair' about 4 prompts\n"
        assert re.fullmatch(r"label page at http://127\.0\.0\.1:\d+/\n", printed[2])
        second = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert "another process serves the label page" in second.stderr
        process.send_signal(2)
        assert process.wait(60) == 0 and process.stdout.read() == "stopped\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
