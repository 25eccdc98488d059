"""Making, saving and scoring the samples of an evaluation, in memory and in a folder."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from genalign.evaluation import sources
from genalign.evaluation.engine import evaluate, evaluate_share, numbered_files
from genalign.evaluation.evaluate import SampleSpec, load_evaluation, plan_samples
from genalign.evaluation.folder import EvaluationFolder
from genalign.evaluation.scorers import ExplainedScores, JoinedScorer, RewardScorer
from genalign.evaluation.sources import FileSource, PipelineSource
from genalign.runtime.distributed import RankShare
from genalign.runtime.media import read_image
from genalign.scoring.budget import Ledger, Metered
from genalign.scoring.score import NamedReward, RewardError
from genalign.types import Prompt
from tests.genalign.evaluation.still_pipeline import PROTOCOL, StillPipeline
from tests.genalign.evaluation.test_evaluate import prompt_set

SPECS = plan_samples(prompt_set(a=2, b=2), 4, 2)


class GrayPipeline(StillPipeline):
    """A pipeline whose images have the gray value of their noise."""

    def initial_noise(self, seeds):
        return torch.tensor([gray(seed) for seed in seeds])[:, None]

    def decode(self, latents):
        return latents[:, :, None, None].expand(-1, 3, 4, 4)


def gray(seed):
    return (seed % 97) / 97


def brightness(samples, prompts):
    return samples.mean((1, 2, 3))


def strict(samples, prompts):
    return (brightness(samples, prompts) > 0.5).float()


def evaluated(scorers, specs=SPECS, protocol=PROTOCOL, output=None, pipeline=None):
    source = PipelineSource(pipeline or GrayPipeline(), specs, protocol)
    return evaluate(source, RewardScorer(scorers), protocol, output)


def in_folder(folder, scorers, pipeline, share=None, ledger=None):
    source = PipelineSource(pipeline, SPECS, PROTOCOL)
    features = {"pixels": lambda samples: samples.flatten(1)}
    share = share or RankShare()
    evaluate_share(source, RewardScorer(scorers), folder, numbered_files(None), features, share, ledger)
    return len(source)


def test_evaluate_scores_every_sample_in_order(tmp_path):
    pipeline = GrayPipeline()
    result = evaluated({"strict": strict, "brightness": brightness}, output=tmp_path, pipeline=pipeline)
    assert pipeline.calls == [(size, 4.0) for size in (3, 3, 2) for _ in range(2)]
    assert [r.key for r in result.records] == [(s.prompt.task, s.prompt.text, s.sample, s.seed) for s in SPECS]
    for index, sample in enumerate(result.records):
        value = gray(sample.seed)
        assert sample.scores == {"strict": float(value > 0.5), "brightness": pytest.approx(value, abs=1e-6)}
        assert sample.image == f"images/{index:05d}.png"
        pixels = np.asarray(Image.open(tmp_path / sample.image))
        assert pixels.shape == (4, 4, 3) and (pixels == round(value * 255)).all()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["protocol", "protocol_hash", "suite", "overall", "tasks", "failed"]
    assert summary["protocol_hash"] == PROTOCOL.hash
    assert list(summary["tasks"]["a"]["strict"]) == ["mean", "low", "high", "n"]
    assert load_evaluation(tmp_path) == result


def test_a_folder_resumes_with_the_unfinished_batches(tmp_path):
    whole, folder, calls = evaluated({"b": brightness}), EvaluationFolder(tmp_path), []

    def failing(samples, prompts):
        calls.append(len(samples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return brightness(samples, prompts)

    with pytest.raises(KeyboardInterrupt):
        in_folder(folder, {"b": failing}, GrayPipeline())
    again, ledger = GrayPipeline(), Ledger()
    count = in_folder(folder, {"b": brightness}, Metered(again, ledger), ledger=ledger)
    assert again.calls == [(2, 4.0)] * 2  # the last batch alone
    with folder.claims.exclusive():
        result = folder.finish(PROTOCOL, count, {"pixels": lambda rows: float(rows.mean())})
    assert [(r.key, r.scores) for r in result.records] == [(r.key, r.scores) for r in whole.records]
    assert result.sets["pixels"].value == pytest.approx(whole.overall["b"].mean) and result.sets["pixels"].n == 8
    assert load_evaluation(tmp_path) == result
    assert json.loads((tmp_path / "costs" / "00002.json").read_text())["nfe"] == 2 * 2 * 2  # steps and guidance
    assert folder.cost()["nfe"] == 8 and folder.cost()["seconds"] > 0


def test_features_of_a_sample_that_is_not_finite_are_left_out(tmp_path):
    class Broken(GrayPipeline):
        def decode(self, latents):
            images = super().decode(latents).clone()
            images[0] = torch.nan
            return images

    folder = EvaluationFolder(tmp_path)
    count = in_folder(folder, {"b": brightness}, Broken())
    result = folder.finish(PROTOCOL, count, {"pixels": lambda rows: float(rows.mean())})
    assert result.failed == 3 and result.sets["pixels"].n == 5 and math.isfinite(result.sets["pixels"].value)


def test_a_scorer_may_explain_its_scores(tmp_path):
    def explained(samples, prompts):
        scores = brightness(samples, prompts)
        return ExplainedScores(scores, [[round(score, 3), None] for score in scores.tolist()])

    whole = evaluated({"e": explained, "b": brightness}, output=tmp_path)
    assert [r.details for r in whole.records] == [{"e": [round(gray(s.seed), 3), None]} for s in SPECS]
    assert all(r.scores["e"] == r.scores["b"] for r in whole.records)
    assert load_evaluation(tmp_path) == whole
    assert (
        evaluated({"e": NamedReward("other", explained, score_batch=2)}).records[3].details == whole.records[3].details
    )
    plain = evaluated({"b": brightness}, SPECS[:1], output=tmp_path / "plain")
    assert plain.records[0].details == {} and "details" not in (tmp_path / "plain" / "records.jsonl").read_text()


def test_noise_does_not_depend_on_the_batch():
    whole = evaluated({"b": brightness})
    parts = evaluated({"b": brightness}, SPECS[::-1], replace(PROTOCOL, batch_size=2))
    assert {r.key: r.scores for r in whole.records} == {r.key: r.scores for r in parts.records}


def test_every_process_encodes_the_first_texts_first(monkeypatch):
    """Embeddings depend on the batch in their last bits, and the first texts share a batch with the empty one."""
    monkeypatch.setattr(sources, "_TEXTS_AT_ONCE", 2)
    pipeline, texts = GrayPipeline(), ["a 0", "a 1", "b 0", "b 1"]
    source = PipelineSource(pipeline, [SampleSpec(Prompt(text), 0) for text in texts], replace(PROTOCOL, batch_size=1))
    (batch,) = source.batch(3)
    assert [spec.prompt for spec in batch.specs] == ["b 1"] and pipeline.encoded == [texts[:2], texts[2:]]
    assert batch.samples.mean() == pytest.approx(gray(SampleSpec(Prompt("b 1"), 0).seed))
    for number in range(4):
        list(source.batch(number))
    assert pipeline.encoded == [texts[:2], texts[2:]]


def test_files_of_different_sizes_are_scored_in_separate_batches(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file, side in zip(files, (8, 8, 16, 8), strict=True):
        Image.new("RGB", (side, side)).save(file)
    specs = [SampleSpec(Prompt("a"), number, external=True) for number in range(4)]
    batches = list(FileSource(specs, files, read_image, 4).batch(0))
    assert [([spec.seed for spec in batch.specs], batch.samples.shape[-1]) for batch in batches] == [
        ([0, 1], 8),
        ([2], 16),
        ([3], 8),
    ]
    assert batches[1].files == [files[2]]


def test_failed_scores_are_counted_and_left_out(tmp_path):
    scorers = {"s": lambda samples, prompts: torch.tensor([math.nan, 1.0, 1.0, 1.0])}
    result = evaluated(scorers, SPECS[:4], replace(PROTOCOL, batch_size=4), tmp_path)
    assert (result.summary()["failed"], result.overall["s"].mean, result.overall["s"].n) == (1, 1.0, 2)
    assert math.isnan(load_evaluation(tmp_path).records[0].scores["s"])
    with pytest.raises(ValueError, match=r"'s' scored none of the samples.* or it returned NaN"):
        evaluated({"s": lambda samples, prompts: samples[:, 0, 0, 0] * math.nan}, output=tmp_path)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == len(SPECS)  # saved all the same
    half = {"s": lambda samples, prompts: torch.tensor([math.nan if p.task == "b" else 1.0 for p in prompts])}
    with pytest.raises(ValueError, match="'s' scored none of the samples of task 'b'"):
        evaluated(half, output=tmp_path)


def test_a_reward_that_raises_from_the_start_stops_the_evaluation():
    calls = []

    def failing(samples, prompts):
        calls.append(len(samples))
        if len(calls) > 1:
            raise OSError("the server is gone")
        return brightness(samples, prompts)

    with pytest.raises(
        RewardError, match=r"reward 's' failed on all 3 samples .*: NameError: .* \(test_engine\.py:\d+\)"
    ):
        evaluated({"s": lambda samples, prompts: nothing})  # noqa: F821
    assert evaluated({"s": failing}, SPECS[:4] + SPECS[4:7]).failed == 4  # it has scored before


def test_scores_of_one_name_are_refused():
    scorer = RewardScorer({"s": strict})
    with pytest.raises(ValueError, match="two scores are named 's'"):
        JoinedScorer([scorer, scorer])


def test_evaluate_refuses_invalid_arguments():
    specs = [SampleSpec(Prompt("a"), 0)]
    with pytest.raises(ValueError, match="at least one sample"):
        evaluated({"s": strict}, [])
    with pytest.raises(ValueError, match="at least one reward"):
        evaluated({}, specs)
    with pytest.raises(ValueError, match=r"the protocol says \[1.0, 0.5, 0.0\]"):
        evaluated({"s": strict}, specs, pipeline=GrayPipeline(sigmas=(1.0, 0.75, 0.0)))
    with pytest.raises(RewardError, match="reward 's' returned shape"):
        evaluated({"s": lambda samples, prompts: samples}, specs)
