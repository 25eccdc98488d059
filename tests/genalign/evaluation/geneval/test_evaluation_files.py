"""A whole evaluation in one process: drawn scenes, an exact judge, folders, interruptions, comparison and report."""

from __future__ import annotations

import html
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from genalign.cli.external_samples import external_samples
from genalign.evaluation.engine import evaluate_share
from genalign.evaluation.evaluate import distinct_prompts, load_evaluation, plan_samples
from genalign.evaluation.folder import EvaluationFolder, ModelIdentity, adapter_hash, manifest
from genalign.evaluation.geneval.evaluation_files import (
    GENEVAL,
    GenEvalLayout,
    GenEvalScorer,
    verifier_description,
    write_geneval_files,
)
from genalign.evaluation.geneval.result_files import read_results, read_samples, summary, write_results
from genalign.evaluation.geneval.upstream_results import rescore
from genalign.evaluation.paired import compare_models
from genalign.evaluation.report import write_evaluation
from genalign.evaluation.sources import FileSource, PipelineSource
from genalign.runtime.distributed import ALL_RANKS, RankShare
from genalign.runtime.media import read_image
from genalign.types import PromptSet
from genalign.worlds import shapes
from genalign.worlds.shapes.verifier import verify
from rewards.geneval import GenEvalJudge
from tests.genalign.evaluation.geneval.shapes_judge import DrawingPipeline, PaletteColors, ShapesDetector
from tests.genalign.evaluation.still_pipeline import PROTOCOL as STILL_PROTOCOL

JUDGE = GenEvalJudge(ShapesDetector(), PaletteColors())
SEEDS = 3
IDENTITY = ModelIdentity({"path": "drawn"}, "0123456789abcdef")
PROMPTS = PromptSet(
    "drawn",
    tuple(prompt for group in shapes.prompts("iid").by_task().values() for prompt in group[:: len(group) // 4][:4]),
)
PROTOCOL = replace(STILL_PROTOCOL, suite="drawn", batch_size=2, seeds=SEEDS, verifier=verifier_description(JUDGE))
SPECS = plan_samples(PROMPTS, None, SEEDS)
BATCHES = SEEDS * len(PROMPTS) // 2


class Run:
    """An evaluation of drawn images, in batches of two."""

    def __init__(self, path: Path, skill: float = 1.0, broken: int | None = None) -> None:
        self.pipeline = DrawingPipeline(PROMPTS.prompts, SEEDS, skill, broken)
        self.folder = EvaluationFolder(path)
        self.folder.begin(manifest(PROTOCOL, IDENTITY), PROMPTS)

    def work(self, share: RankShare = ALL_RANKS) -> None:
        source = PipelineSource(self.pipeline, SPECS, PROTOCOL)
        evaluate_share(source, GenEvalScorer(JUDGE), self.folder, GenEvalLayout(SPECS), share=share)

    def finish(self) -> Path:
        write_geneval_files(self.folder, self.folder.finish(PROTOCOL, BATCHES))
        return self.folder.path


def finished(path: Path, skill: float = 1.0, broken: int | None = None) -> Path:
    run = Run(path, skill, broken)
    run.work()
    return run.finish()


def assert_same_files(path: Path, other: Path) -> None:
    """Two folders have the same files, byte by byte, except costs and report."""
    first, second = (
        {f.relative_to(root): f.read_bytes() for f in root.rglob("*") if f.is_file() and not varies(f)}
        for root in (path, other)
    )
    assert first == second


def varies(file: Path) -> bool:
    return file.name in ("cost.json", "report.html") or file.parent.name == "costs"


@pytest.fixture(scope="module")
def perfect(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("perfect"))


@pytest.fixture(scope="module")
def mediocre(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("mediocre"), skill=0.6)


def test_correct_images_score_one(perfect: Path) -> None:
    evaluation = load_evaluation(perfect)
    assert len(evaluation.records) == SEEDS * len(PROMPTS) and evaluation.failed == 0
    assert {name: value.mean for name, value in evaluation.overall.items()} == {"relaxed": 1, "strict": 1, "partial": 1}


def test_scores_agree_with_the_verifier_of_the_world(mediocre: Path) -> None:
    evaluation = load_evaluation(mediocre)
    for number, record in enumerate(evaluation.records):
        image = read_image(mediocre / str(record.image))
        (expected,) = verify(image[None], [PROMPTS.prompts[number // SEEDS].metadata])
        criteria = [value for name, value in expected.criteria if name != "clean"]
        assert record.scores["relaxed"] == expected.relaxed
        assert record.scores["partial"] == pytest.approx(math.fsum(criteria) / len(criteria))
    assert 0.2 < evaluation.overall["relaxed"].mean < 0.9


def test_folder_results_and_summary_have_the_format_of_geneval(mediocre: Path) -> None:
    samples = read_samples(mediocre / "images")
    expected = [(index, number) for index in range(len(PROMPTS)) for number in range(SEEDS)]
    assert [(sample.index, sample.number) for sample in samples] == expected
    assert samples[4].metadata == PROMPTS.prompts[1].metadata
    results = read_results(mediocre / "results.jsonl")
    assert [(mediocre / result.filename) for result in results] == [sample.path for sample in samples]
    assert (mediocre / "summary.txt").read_text() == summary(results) + "\n"
    overall = float((mediocre / "summary.txt").read_text().split()[-1])
    evaluation = load_evaluation(mediocre)
    assert overall == pytest.approx(evaluation.overall["relaxed"].mean, abs=5e-6)
    assert list(evaluation.tasks) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert all(estimates["relaxed"].n == 4 for estimates in evaluation.tasks.values())


def test_nan_images_are_counted_and_left_out(tmp_path: Path) -> None:
    evaluation = load_evaluation(finished(tmp_path, broken=5))
    assert evaluation.failed == 1 and math.isnan(evaluation.records[5].scores["relaxed"])
    assert len(read_results(tmp_path / "results.jsonl")) == SEEDS * len(PROMPTS) - 1
    assert "<dt>not scored</dt><dd>1</dd>" in write_evaluation(tmp_path).read_text()


def test_any_number_of_ranks_writes_the_same_bytes(perfect: Path, tmp_path: Path) -> None:
    runs = [Run(tmp_path) for _ in range(3)]
    for rank, run in enumerate(runs):
        run.work(RankShare(rank, 3))
    assert [run.pipeline.num_drawn for run in runs] == [SEEDS * len(PROMPTS) // 3] * 3
    assert runs[0].folder.num_unfinished(BATCHES) == 0
    assert_same_files(runs[1].finish(), perfect)


def test_an_interrupted_run_resumes_with_the_unfinished_batches(perfect: Path, tmp_path: Path) -> None:
    Run(tmp_path).work(RankShare(0, 9))
    (tmp_path / "images" / "00001" / "samples").mkdir(parents=True)
    (tmp_path / "images" / "00001" / "samples" / "0000.png").write_bytes(b"\x89PNG half of")
    (tmp_path / "batches" / "00001.json.part").write_text('[{"prompt": "a pro')
    second = Run(tmp_path)
    with pytest.raises(ValueError, match=r"32 of 36 batches in .* are not finished: start the command again"):
        second.finish()
    second.work()
    assert second.pipeline.num_drawn == SEEDS * len(PROMPTS) - 8
    assert_same_files(second.finish(), perfect)


def test_a_batch_claimed_by_another_process_is_skipped(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    with first.folder.claims.try_claim(3) as claimed, second.folder.claims.try_claim(3) as claimed_twice:
        assert (claimed, claimed_twice) == (True, False)
        second.work()
    assert second.folder.num_unfinished(BATCHES) == 1 and not second.folder.is_done(3)
    first.work()
    assert first.pipeline.num_drawn == 2


def test_the_hash_of_an_adapter_covers_the_files_that_are_read_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4}')
    lora_hash = adapter_hash(tmp_path)
    (tmp_path / "step100.safetensors").write_bytes(b"another")
    assert adapter_hash(tmp_path) == lora_hash
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert adapter_hash(tmp_path) != lora_hash


def test_manifest_hash_depends_on_the_adapter_and_protocol_hash_on_the_judge(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"one")
    lora_hash = adapter_hash(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"two")
    assert lora_hash != adapter_hash(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no adapter"):
        adapter_hash(tmp_path / "nothing")
    base = manifest(PROTOCOL, IDENTITY)
    tuned, moved = (
        manifest(PROTOCOL, replace(IDENTITY, lora=path, lora_hash=lora_hash)) for path in ("a/lora", "elsewhere")
    )
    assert base["protocol_hash"] == tuned["protocol_hash"] and base["hash"] != tuned["hash"] == moved["hash"]
    strict = GenEvalJudge(ShapesDetector(replace(ShapesDetector().thresholds, confidence=0.4)), PaletteColors())
    other = manifest(replace(PROTOCOL, verifier=verifier_description(strict)), IDENTITY)
    assert other["protocol_hash"] != base["protocol_hash"]


def test_models_are_compared_in_pairs(perfect: Path, mediocre: Path) -> None:
    before, after = load_evaluation(mediocre), load_evaluation(perfect)
    comparison = compare_models(before, after)
    assert comparison.gain["relaxed"].mean == pytest.approx(1 - before.overall["relaxed"].mean)
    assert comparison.gain["relaxed"].low > 0
    wins = comparison.wins["relaxed"]
    lost = {record.prompt for record in before.records if record.scores["relaxed"] == 0}
    assert wins.ties == pytest.approx(1 - len(lost) / len(PROMPTS))
    assert wins.rate.mean == pytest.approx((len(lost) + (len(PROMPTS) - len(lost)) / 2) / len(PROMPTS))
    assert wins.p_value == pytest.approx(2 * 0.5 ** len(lost))
    json.dumps(asdict(comparison), allow_nan=False)


def test_a_task_without_scores_is_named(perfect: Path) -> None:
    complete = load_evaluation(perfect)
    nan = dict.fromkeys(complete.score_names, math.nan)
    records = tuple(replace(r, scores=nan) if r.task in ("colors", "counting") else r for r in complete.records)
    partial = replace(complete, records=records)
    message = r"\d+ of \d+ pairs have .* not be judged, all of task colors, counting among them: .* NaN"
    for pair in ((complete, partial), (partial, complete)):
        with pytest.raises(ValueError, match=message):
            compare_models(*pair)


def test_the_report_has_scores_wrong_images_and_the_comparison(perfect: Path, mediocre: Path) -> None:
    page = write_evaluation(mediocre).read_text()
    wrong = [result for result in read_results(mediocre / "results.jsonl") if not result.correct]
    assert wrong[0].prompt in page and "ShapesDetector" in page and "GenEval-style and not GenEval" in page
    assert html.escape(wrong[0].reason.splitlines()[0]) in page and "<h1>Correct images on drawn</h1>" in page
    assert page.count("data:image/png;base64") == 24
    assert "http:" not in page and "https:" not in page and len(page) < 5e6
    both = write_evaluation(mediocre, perfect).read_text()
    assert "the same prompts from the same initial noise" in both
    assert f"{mediocre.name} against {perfect.name}" in both and "Largest differences" in both
    assert "prompts won, relaxed" in both and both.count("data:image/png;base64") == 2 * 2 * 12


def test_rescoring_uses_the_results_of_the_original(mediocre: Path, tmp_path: Path) -> None:
    """Our own results file stands for the one that evaluate_images.py writes for the same folder."""
    results = read_results(mediocre / "results.jsonl")
    named = [replace(result, filename=f"/elsewhere/{result.filename}") for result in reversed(results)]
    write_results(tmp_path / "results.jsonl", named)
    original = rescore(mediocre, read_results(tmp_path / "results.jsonl"))
    ours, theirs = load_evaluation(mediocre), load_evaluation(original)
    assert [record.scores for record in theirs.records] == [record.scores for record in ours.records]
    assert theirs.protocol.verifier == "GenEval's evaluate_images.py"
    assert "own script" in write_evaluation(original).read_text()
    assert read_image(original / str(theirs.records[0].image)).shape == (3, 64, 64)


def test_results_that_do_not_fit_are_refused_and_leave_no_files(mediocre: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mediocre, tmp_path / "copy", ignore=shutil.ignore_patterns("original"))
    results = read_results(folder / "results.jsonl")
    with pytest.raises(ValueError, match=r"the results have no images/00007/samples/0002\.png"):
        rescore(folder, [result for result in results if not result.filename.endswith("00007/samples/0002.png")])
    swapped = [replace(results[0], filename=results[-1].filename), *results[1:-1]]
    swapped.append(replace(results[-1], filename=results[0].filename))
    with pytest.raises(ValueError, match="was judged as"):
        rescore(folder, swapped)
    with pytest.raises(FileNotFoundError, match="has no finished evaluation"):
        rescore(tmp_path, results)
    assert not (folder / "original").exists()


def test_external_images_are_judged_in_place(mediocre: Path, tmp_path: Path) -> None:
    """Copies of an evaluation's images, in folders with gaps, get the same scores."""
    external = tmp_path / "external"
    for index in (3, 20):
        shutil.copytree(mediocre / "images" / f"{index:05d}", external / f"{index + 100}")
    (external / "103" / "samples" / "0000.png").unlink()
    listed = external_samples(external, None, None)
    assert [(spec.prompt, spec.sample, spec.seed) for spec in listed.specs] == [
        *((PROMPTS.prompts[3], number, number) for number in (1, 2)),
        *((PROMPTS.prompts[20], number, number) for number in (0, 1, 2)),
    ]
    folder = EvaluationFolder(tmp_path / "output")
    folder.begin(manifest(PROTOCOL, IDENTITY), distinct_prompts(listed.specs, "samples"))
    source = FileSource(listed.specs, listed.files, listed.read, 4)
    evaluate_share(source, GenEvalScorer(JUDGE), folder, GenEvalLayout(listed.specs))
    evaluation = folder.finish(PROTOCOL, 2)
    write_geneval_files(folder, evaluation)
    scores = [record.scores for record in evaluation.records]
    before = [row.scores for row in load_evaluation(mediocre).records]
    assert scores == before[10:12] + before[60:63]
    assert evaluation.records[0].image == "../external/103/samples/0001.png"
    assert set(evaluation.records[0].details[GENEVAL]) == {"reason", "detections"}
    results = read_results(folder.path / "results.jsonl")
    assert [record.scores for record in load_evaluation(rescore(folder.path, results)).records] == scores
