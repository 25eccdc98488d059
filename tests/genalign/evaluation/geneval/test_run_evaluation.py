"""The whole path in one process: drawn scenes, an exact judge, folders, interruptions, comparison and report."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from genalign.evaluation.evaluate import Evaluation, Protocol, load_evaluation, suite_hash
from genalign.evaluation.folder import Subject, adapter_hash, manifest
from genalign.evaluation.geneval.compare_models import compared
from genalign.evaluation.geneval.image_sources import Existing, Generated
from genalign.evaluation.geneval.judge import Judgement
from genalign.evaluation.geneval.metadata import Request
from genalign.evaluation.geneval.result_files import read_results, read_samples, summary, write_results, write_samples
from genalign.evaluation.geneval.run_evaluation import GenEvalFolder, RankShare, Work, prompt_row, sample_row, verifier
from genalign.evaluation.geneval.scoring import verdict
from genalign.evaluation.geneval.upstream_results import rescored
from genalign.evaluation.report import write_geneval
from genalign.runtime.media import read_image
from genalign.types import Prompt, PromptSet
from genalign.worlds import shapes
from genalign.worlds.shapes.verifier import verify
from rewards.geneval import GenEvalJudge
from tests.genalign.evaluation.geneval.shapes_judge import SIGMAS, DrawingPipeline, PaletteColours, ShapesDetector

JUDGE = GenEvalJudge(ShapesDetector(), PaletteColours())
SEEDS = 3
SUBJECT = Subject({"path": "drawn"}, "0123456789abcdef")


def some_prompts() -> PromptSet:
    tasks = shapes.prompts("iid").by_task().values()
    return PromptSet("drawn", tuple(prompt for prompts in tasks for prompt in prompts[:: len(prompts) // 4][:4]))


PROMPTS = some_prompts()
PROTOCOL = Protocol(
    suite=PROMPTS.name,
    suite_hash=suite_hash(PROMPTS),
    guidance=1.0,
    sigmas=SIGMAS,
    kernel="ODE()",
    dtype="float32",
    batch_size=2,
    resolution=(64, 64),
    seeds=SEEDS,
    samples_per_task=0,
    verifier=verifier(JUDGE),
)


def work(path: Path, skill: float = 1.0, broken: int | None = None) -> Work:
    pipeline = DrawingPipeline(PROMPTS.prompts, SEEDS, skill, broken)
    folder = GenEvalFolder(path)
    folder.begin(manifest(PROTOCOL, SUBJECT))
    source = Generated(pipeline, pipeline.grid(2), PROTOCOL.guidance, SEEDS, PROTOCOL.batch_size, path)
    return Work(source, PROMPTS, JUDGE, folder)


def finished(path: Path, skill: float = 1.0, broken: int | None = None) -> Evaluation:
    todo = work(path, skill, broken)
    assert list(todo.do(RankShare())) == list(range(len(PROMPTS)))
    return todo.folder.finish(PROTOCOL, len(PROMPTS))


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def perfect(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("perfect")
    finished(path)
    return path


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("middling")
    finished(path, skill=0.6)
    return path


# --- truth ------------------------------------------------------------------------------------------------------------


def test_right_pictures_are_right(perfect: Path) -> None:
    made = load_evaluation(perfect)
    assert len(made.records) == SEEDS * len(PROMPTS) and made.failed == 0
    assert {name: value.mean for name, value in made.overall.items()} == {"relaxed": 1, "strict": 1, "partial": 1}


def test_verdicts_are_those_of_the_worlds_verifier(middling: Path) -> None:
    made = load_evaluation(middling)
    images = [read_image(middling / str(record.image)) for record in made.records]
    asked = [PROMPTS.prompts[number // SEEDS].metadata for number in range(len(images))]
    theirs = [one for image, item in zip(images, asked, strict=True) for one in verify(image[None], [item])]
    for record, expected in zip(made.records, theirs, strict=True):
        criteria = [value for name, value in expected.criteria if name != "clean"]
        assert record.scores["relaxed"] == expected.relaxed
        assert record.scores["partial"] == pytest.approx(math.fsum(criteria) / len(criteria))
    assert 0.2 < made.overall["relaxed"].mean < 0.9


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_folder_is_the_originals(middling: Path) -> None:
    samples = read_samples(middling / "images")
    assert [(sample.index, sample.number) for sample in samples] == [
        (index, number) for index in range(len(PROMPTS)) for number in range(SEEDS)
    ]
    assert samples[4].metadata == PROMPTS.prompts[1].metadata
    results = read_results(middling / "results.jsonl")
    assert [(middling / result.filename) for result in results] == [sample.path for sample in samples]
    assert (middling / "summary.txt").read_text() == summary(results) + "\n"
    overall = float((middling / "summary.txt").read_text().split()[-1])
    assert overall == pytest.approx(load_evaluation(middling).overall["relaxed"].mean, abs=5e-6)


def test_intervals_are_stratified_and_of_prompts(middling: Path) -> None:
    estimates = load_evaluation(middling).tasks
    assert list(estimates) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    for found in estimates.values():
        assert found["relaxed"].n == 4 * SEEDS and found["relaxed"].low <= found["relaxed"].mean
    assert any(found["relaxed"].low < found["relaxed"].high for found in estimates.values())


def test_broken_images_are_counted_and_left_out(tmp_path: Path) -> None:
    made = finished(tmp_path, broken=5)
    assert made.failed == 1 and math.isnan(made.records[5].scores["relaxed"])
    assert made.overall["relaxed"].n == SEEDS * len(PROMPTS) - 1
    assert len(read_results(tmp_path / "results.jsonl")) == SEEDS * len(PROMPTS) - 1
    assert "<dt>not judged</dt><dd>1</dd>" in write_geneval(tmp_path).read_text()


# --- sharing and going on ---------------------------------------------------------------------------------------------


def test_every_division_gives_the_same_bytes(perfect: Path, tmp_path: Path) -> None:
    parts = [work(tmp_path), work(tmp_path), work(tmp_path)]
    done = [list(part.do(RankShare(rank, 3))) for rank, part in enumerate(parts)]
    assert sorted(index for part in done for index in part) == list(range(len(PROMPTS)))
    assert all(part.left() == 0 for part in parts)
    parts[1].folder.finish(PROTOCOL, len(PROMPTS))
    ours, theirs = contents(tmp_path), contents(perfect)
    theirs.pop("report.html", None)
    assert ours == theirs


def test_a_killed_process_leaves_nothing_half_done(perfect: Path, tmp_path: Path) -> None:
    first = work(tmp_path)
    steps = first.do(RankShare())
    assert [next(steps) for _ in range(4)] == [0, 1, 2, 3]
    steps.close()
    (tmp_path / "images" / "00004" / "samples").mkdir(parents=True)
    (tmp_path / "images" / "00004" / "samples" / "0000.png").write_bytes(b"\x89PNG half of")
    (tmp_path / "prompts" / "00004.json.part").write_text('{"index": 4, "pro')
    second = work(tmp_path)
    with pytest.raises(ValueError, match=r"20 of 24 prompts in .* are not finished: start it again"):
        second.folder.finish(PROTOCOL, len(PROMPTS))
    assert list(second.do(RankShare())) == list(range(4, len(PROMPTS)))
    assert isinstance(second.source, Generated) and second.source.pipeline.drawn == SEEDS * (len(PROMPTS) - 4)
    second.folder.finish(PROTOCOL, len(PROMPTS))
    ours, theirs = contents(tmp_path), contents(perfect)
    theirs.pop("report.html", None)
    assert ours == theirs


def test_a_prompt_that_another_holds_is_left_to_it(tmp_path: Path) -> None:
    first, second = work(tmp_path), work(tmp_path)
    with first.folder.claims.try_claim(3) as held, second.folder.claims.try_claim(3) as also_held:
        assert (held, also_held) == (True, False)
        assert 3 not in list(second.do(RankShare()))
    assert second.left() == 1
    assert list(first.do(RankShare())) == [3]


def test_every_process_encodes_the_same_batches(tmp_path: Path) -> None:
    """A text beside another is not encoded the same to the last bit, and the first has the empty one beside it."""
    second = work(tmp_path)
    next(second.do(RankShare(1, 2)))
    assert isinstance(second.source, Generated)
    assert second.source.pipeline.encoded == [[PROMPTS.prompts[0].text], [PROMPTS.prompts[1].text]]


def test_ranks_are_a_division() -> None:
    assert [list(RankShare(rank, 3).indices(8)) for rank in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert RankShare.from_environment({}) == RankShare(0, 1)
    assert RankShare.from_environment({"RANK": "2", "WORLD_SIZE": "5"}) == RankShare(2, 5)
    with pytest.raises(ValueError, match="set both RANK and WORLD_SIZE"):
        RankShare.from_environment({"RANK": "1"})
    with pytest.raises(ValueError, match="rank 5 of 5 processes"):
        RankShare(5, 5)


def test_a_folder_is_of_one_evaluation(tmp_path: Path) -> None:
    work(tmp_path)
    other = replace(PROTOCOL, guidance=2.0, verifier="another judge")
    with pytest.raises(FileExistsError, match=r"other settings \(protocol\.guidance, protocol\.verifier\)"):
        GenEvalFolder(tmp_path).begin(manifest(other, SUBJECT))
    tuned = replace(SUBJECT, lora="runs/a/lora", lora_hash="f" * 16)
    with pytest.raises(FileExistsError, match=r"other settings \(lora_hash\)"):
        GenEvalFolder(tmp_path).begin(manifest(PROTOCOL, tuned))


def test_hashes_tell_models_apart_and_protocols_together(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"one")
    one = adapter_hash(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"two")
    assert one != adapter_hash(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
        adapter_hash(tmp_path / "nothing")
    plain, tuned = (manifest(PROTOCOL, replace(SUBJECT, lora=f"a/{h}", lora_hash=h)) for h in (None, one))
    assert plain["protocol_hash"] == tuned["protocol_hash"] and plain["hash"] != tuned["hash"]
    moved = manifest(PROTOCOL, replace(SUBJECT, lora="elsewhere", lora_hash=one))
    assert moved["hash"] == tuned["hash"]
    strict = GenEvalJudge(ShapesDetector(replace(ShapesDetector().thresholds, confidence=0.4)), PaletteColours())
    assert manifest(replace(PROTOCOL, verifier=verifier(strict)), SUBJECT)["protocol_hash"] != plain["protocol_hash"]


# --- comparison and report --------------------------------------------------------------------------------------------


def test_models_are_compared_in_pairs(perfect: Path, middling: Path) -> None:
    before, after = load_evaluation(middling), load_evaluation(perfect)
    found = compared(before, after)
    assert found.gain["relaxed"].mean == pytest.approx(1 - before.overall["relaxed"].mean)
    assert found.gain["relaxed"].low > 0
    wins = found.wins["relaxed"]
    lost = {record.prompt for record in before.records if record.scores["relaxed"] == 0}
    assert wins.ties == pytest.approx(1 - len(lost) / len(PROMPTS))
    assert wins.rate.mean == pytest.approx((len(lost) + (len(PROMPTS) - len(lost)) / 2) / len(PROMPTS))
    assert wins.p_value == pytest.approx(2 * 0.5 ** len(lost))
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_task_that_was_never_judged_is_named(perfect: Path) -> None:
    made = load_evaluation(perfect)
    lost = dict.fromkeys(made.score_names, math.nan)
    records = tuple(replace(r, scores=lost) if r.task in ("colors", "counting") else r for r in made.records)
    message = (
        r"\d+ of \d+ pairs have an image that could not be judged, all of task colors, counting among them: .* NaN"
    )
    with pytest.raises(ValueError, match=message):
        compared(made, replace(made, records=records))
    with pytest.raises(ValueError, match=message):
        compared(replace(made, records=records), made)


def test_other_protocols_are_not_compared(perfect: Path) -> None:
    made = load_evaluation(perfect)
    with pytest.raises(ValueError, match="verifier is"):
        compared(made, replace(made, protocol=replace(PROTOCOL, verifier="other")))


def test_the_report_shows_scores_failures_and_the_comparison(perfect: Path, middling: Path) -> None:
    page = write_geneval(middling).read_text()
    wrong = [result for result in read_results(middling / "results.jsonl") if not result.correct]
    assert wrong[0].prompt in page and "ShapesDetector" in page and "GenEval-style and not GenEval" in page
    assert page.count("data:image/png;base64") == min(24, len(wrong))
    assert "http:" not in page and "https:" not in page and len(page) < 5e6
    both = write_geneval(middling, perfect).read_text()
    assert "the same prompts from the same initial noise" in both
    assert f"Against {perfect.name}" in both and "Worst regressions" in both and "prompts won, relaxed" in both
    with pytest.raises(FileNotFoundError, match="has no finished evaluation"):
        write_geneval(middling, middling / "nowhere")


def test_the_report_runs_nothing_that_a_prompt_says(tmp_path: Path) -> None:
    text = "<script>alert(1)</script>"
    prompt = Prompt(text, {"tag": text, "include": [{"class": text, "count": 1}], "prompt": text})
    folder = GenEvalFolder(tmp_path)
    folder.begin(manifest(PROTOCOL, SUBJECT))
    found = Judgement(verdict([], Request.of(prompt)), ())
    folder.write(0, prompt_row(0, prompt, [sample_row("images/00000/samples/0000.png", 1, found)]))
    folder.finish(PROTOCOL, 1)
    page = write_geneval(tmp_path, tmp_path).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;&gt;=1, found 0") == 1


# --- the original's results -------------------------------------------------------------------------------------------


def test_the_originals_results_take_the_judges_place(middling: Path, tmp_path: Path) -> None:
    """Our own results file stands for what evaluate_images.py writes of the same folder."""
    results = read_results(middling / "results.jsonl")
    named = [replace(result, filename=f"/elsewhere/{result.filename}") for result in reversed(results)]
    write_results(tmp_path / "results.jsonl", named)
    made = rescored(middling, read_results(tmp_path / "results.jsonl"))
    ours, theirs = load_evaluation(middling), load_evaluation(made)
    assert [record.scores for record in theirs.records] == [record.scores for record in ours.records]
    assert theirs.protocol.verifier == "GenEval's evaluate_images.py"
    assert "own script" in write_geneval(made).read_text()
    assert read_image(made / str(theirs.records[0].image)).shape == (3, 64, 64)


def test_results_of_something_else_are_refused(middling: Path, tmp_path: Path) -> None:
    results = read_results(middling / "results.jsonl")
    with pytest.raises(ValueError, match=r"the results have no images/00007/samples/0002\.png"):
        rescored(middling, [result for result in results if not result.filename.endswith("00007/samples/0002.png")])
    swapped = [replace(results[0], filename=results[-1].filename), *results[1:-1]]
    swapped.append(replace(results[-1], filename=results[0].filename))
    with pytest.raises(ValueError, match="was judged as"):
        rescored(middling, swapped)
    with pytest.raises(FileNotFoundError, match="has no finished evaluation"):
        rescored(tmp_path, results)


def test_half_an_evaluation_is_not_rescored(middling: Path, tmp_path: Path) -> None:
    """Else its numbers would pass for those of the whole prompt file."""
    half = work(tmp_path)
    steps = half.do(RankShare())
    assert [next(steps) for _ in range(12)] == list(range(12))
    steps.close()
    results = [result for result in read_results(middling / "results.jsonl") if result.filename < "images/00012"]
    with pytest.raises(FileNotFoundError, match="has no finished evaluation"):
        rescored(tmp_path, results)
    assert not (tmp_path / "original").exists()


def test_results_that_fit_not_leave_nothing_behind(middling: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(middling, tmp_path / "copied", ignore=shutil.ignore_patterns("original"))
    with pytest.raises(ValueError, match="the results have no"):
        rescored(copied, read_results(middling / "results.jsonl")[:-1])
    assert not (copied / "original").exists()


# --- images that were made elsewhere ----------------------------------------------------------------------------------


def test_images_made_elsewhere_are_judged_where_they_lie(middling: Path, tmp_path: Path) -> None:
    """Those of an evaluation, in folders with gaps: the verdicts are the same."""
    elsewhere = tmp_path / "elsewhere"
    for index in (3, 20):
        shutil.copytree(middling / "images" / f"{index:05d}", elsewhere / f"{index + 100}")
    (elsewhere / "103" / "samples" / "0000.png").unlink()
    samples = read_samples(elsewhere)
    groups = [samples[:2], samples[2:]]
    prompts = PromptSet("images", (PROMPTS.prompts[3], PROMPTS.prompts[20]))
    folder = GenEvalFolder(tmp_path / "made")
    folder.begin(manifest(PROTOCOL, SUBJECT))
    judged = Work(Existing(groups, folder.path, "cpu"), prompts, JUDGE, folder)
    assert list(judged.do(RankShare())) == [0, 1]
    made = folder.finish(PROTOCOL, 2)
    before = [row.scores for row in load_evaluation(middling).records]
    assert [record.scores for record in made.records] == before[10:12] + before[60:63]
    assert [record.seed for record in made.records] == [1, 2, 0, 1, 2]
    assert made.records[0].image == "../elsewhere/103/samples/0001.png"
    results = read_results(folder.path / "results.jsonl")
    assert [record.scores for record in load_evaluation(rescored(folder.path, results)).records] == [
        record.scores for record in made.records
    ]
    page = write_geneval(folder.path).read_text()
    wrong = [result for result in results if not result.correct]
    assert wrong and page.count("data:image/png;base64") == len(wrong)


def test_images_of_other_sizes_are_judged_apart(tmp_path: Path) -> None:
    for number, side in enumerate((8, 8, 16, 8)):
        write_samples(tmp_path / "images", 5, PROMPTS.prompts[0], torch.rand(1, 3, side, side), first=number)
    shots = list(Existing([read_samples(tmp_path / "images")], tmp_path / "made", "cpu")(0, PROMPTS.prompts[0]))
    assert [(shot.seeds, shot.images.shape[-1]) for shot in shots] == [([0, 1], 8), ([2], 16), ([3], 8)]
    assert shots[1].files == ["../images/00005/samples/0002.png"]
    (tmp_path / "images" / "00005" / "samples" / "0003.png").write_bytes(b"\x89PNG half of")
    with pytest.raises(ValueError, match=r"0003\.png cannot be read as an image"):
        list(Existing([read_samples(tmp_path / "images")], tmp_path / "made", "cpu")(0, PROMPTS.prompts[0]))
