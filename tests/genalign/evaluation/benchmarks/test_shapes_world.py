"""Benchmarks on the shapes world, whose verifier is the judge: their numbers must be the verifier's own."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genalign.cli.main import main
from genalign.evaluation.benchmarks import BENCHMARKS, Judges
from genalign.evaluation.benchmarks.boxes import iou
from genalign.evaluation.benchmarks.tifa import TifaReward, questions
from genalign.evaluation.engine import evaluate
from genalign.evaluation.evaluate import load_evaluation, plan_samples
from genalign.evaluation.geneval.grammar import NUMBER_WORDS, plural, with_article
from genalign.evaluation.scorers import ExplainedScores, RewardScorer, Scorer
from genalign.evaluation.sources import PipelineSource
from genalign.runtime.media import read_image, save_images
from genalign.types import Prompt, PromptSet
from genalign.worlds import shapes
from genalign.worlds.shapes.scenes import render, sample_scene
from genalign.worlds.shapes.verifier import verify
from rewards.shapes import ShapesQuestions
from tests.genalign.evaluation.geneval.shapes_judge import DrawingPipeline
from tests.genalign.evaluation.still_pipeline import PROTOCOL

PROMPTS = [p for group in shapes.prompts("iid").by_task().values() for p in group[:: len(group) // 2][:2]]
BY_TEXT = {prompt.text: prompt for prompt in PROMPTS}
SEEDS = 3


def world_questions(prompt: Prompt) -> list[str]:
    """A question for each of the verifier's criteria, in its order."""
    include = (prompt.metadata or {})["include"]
    names = [
        with_article(c["class"]) if c["count"] == 1 else f"{NUMBER_WORDS[c['count']]} {plural(c['class'])}"
        for c in include
    ]
    return [*(q.text for q in questions(prompt)), f"Is there nothing but {' and '.join(names)} in the image?"]


def hard(images: Tensor, texts: Sequence[str]) -> Tensor:
    """Yes where the verifier's criterion is whole."""
    answers = ShapesQuestions()(images, texts)
    return torch.where(answers.isnan(), answers, (answers == 1).float())


def truth(images: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
    """The verifier's partial credit, and all that it says."""
    verdicts = verify(images, [BY_TEXT[prompt.text].metadata for prompt in prompts])
    details = [{"strict": v.strict, "partial": v.partial, "criteria": [list(c) for c in v.criteria]} for v in verdicts]
    return ExplainedScores(torch.tensor([v.partial for v in verdicts]), details)


def run(name: str, files: Sequence[Path], judges: Judges, more: dict[str, Scorer] | None = None) -> tuple[Any, ...]:
    """Evaluate drawn images, of which two fifths are of another prompt; return numbers and the verifier's details."""
    benchmark = BENCHMARKS[name]
    prompts = benchmark.read(list(files))
    assert {prompt.text for prompt in prompts.prompts} == set(BY_TEXT)
    world = PromptSet("drawn", tuple(BY_TEXT[prompt.text] for prompt in prompts.prompts))
    protocol = replace(PROTOCOL, verifier=benchmark.verifier(prompts, judges), batch_size=4)
    source = PipelineSource(
        DrawingPipeline(world.prompts, SEEDS, skill=0.6), plan_samples(prompts, None, SEEDS), protocol
    )
    scorer = RewardScorer({**benchmark.scorers(judges), "truth": truth, **(more or {})})
    records = evaluate(source, scorer, protocol).records
    numbers = benchmark.aggregate(records, prompts)
    assert numbers["missing answers"] == numbers["images left out"] == 0
    return numbers, [record.details["truth"] for record in records], records


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def write_dpg(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        header = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"]
        writer.writerow([*header, "tuple", "question_natural_language"])
        for item, prompt in enumerate(PROMPTS):
            names = [name for name, _ in truth(torch.zeros(1, 3, 64, 64), [prompt]).details[0]["criteria"]]
            parents = [*(q.parents for q in questions(prompt)), ()]
            for n, (text, name) in enumerate(zip(world_questions(prompt), names, strict=True), start=1):
                dependency = ",".join(str(parent + 1) for parent in parents[n - 1]) or "0"
                writer.writerow([item, prompt.text, "", n, dependency, name, "", "", text])
    return path


def test_dpg_is_the_share_of_whole_criteria(tmp_path: Path) -> None:
    """Questions of colors and places depend on those of their objects, and the verifier counts them just so."""
    numbers, verdicts, _ = run("dpg", [write_dpg(tmp_path / "dpg_bench.csv")], Judges(questions=hard))
    whole = [mean([value == 1 for _, value in verdict["criteria"]]) for verdict in verdicts]
    assert numbers["dpg"] == pytest.approx(100 * mean(whole), abs=1e-4) and 30 < numbers["dpg"] < 95
    for name in ("count", "color", "position", "clean"):
        right = [value == 1 for verdict in verdicts for criterion, value in verdict["criteria"] if criterion == name]
        assert numbers[name] == 100 * mean(right)


def test_conceptmix_is_the_strict_rate(tmp_path: Path) -> None:
    rows = [{"sentence": prompt.text, "question": world_questions(prompt)} for prompt in PROMPTS]
    (tmp_path / "k.json").write_text(json.dumps(rows))
    numbers, verdicts, records = run("conceptmix", [tmp_path / "k.json"], Judges(questions=hard))
    strict = {record.task: list[float]() for record in records}
    for record, verdict in zip(records, verdicts, strict=True):
        assert record.scores["conceptmix"] == verdict["strict"]
        strict[record.task].append(verdict["strict"])
    assert numbers["full mark"] == pytest.approx(100 * mean([mean(values) for values in strict.values()]), abs=1e-9)
    assert 0.2 < numbers["full mark"] / 100 < 0.9


def test_geneval2_and_tifa_are_the_partial_credit(tmp_path: Path) -> None:
    rows = []
    for prompt in PROMPTS:
        texts = world_questions(prompt)
        pairs = [[text, "Yes"] for text in texts]
        rows.append(
            {"prompt": prompt.text, "atom_count": len(texts), "vqa_list": pairs, "skills": ["any"] * len(texts)}
        )
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    judge = ShapesQuestions()
    tifa = TifaReward(judge)

    def asked(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return tifa(images, [Prompt(p.text, {"questions": world_questions(BY_TEXT[p.text])}) for p in prompts])

    judges = Judges(answers=lambda images, texts, answers: judge(images, texts))
    numbers, verdicts, records = run("geneval2", [tmp_path / "data.jsonl"], judges, {"tifa": asked})
    partial = [verdict["partial"] for verdict in verdicts]
    assert [record.scores["tifa"] for record in records] == pytest.approx(partial, abs=1e-6)
    assert numbers["soft-tifa am"] == pytest.approx(100 * mean(partial), abs=1e-4)
    geometric = [math.prod(value for _, value in v["criteria"]) ** (1 / len(v["criteria"])) for v in verdicts]
    assert numbers["soft-tifa gm"] == pytest.approx(100 * mean(geometric), abs=1e-4)


def test_a_rubric_is_the_share_of_whole_criteria_by_kind(tmp_path: Path) -> None:
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt_en", "sub_dims_en"])
        for index, prompt in enumerate(PROMPTS):
            names = [name for name, _ in truth(torch.zeros(1, 3, 64, 64), [prompt]).details[0]["criteria"]]
            points = {"Testpoints": names, "Testpoint Description": world_questions(prompt)}
            writer.writerow([index, prompt.text, json.dumps(points)])

    def checklist(images: Tensor, prompts: Sequence[Prompt], points: Sequence[Sequence[str]]) -> list[Tensor]:
        texts = [[point.split(": ", 1)[1] for point in group] for group in points]
        return [hard(image.expand(len(group), -1, -1, -1), group) for image, group in zip(images, texts, strict=True)]

    numbers, verdicts, _ = run("unigenbench", [tmp_path / "prompts.csv"], Judges(checklist=checklist))
    kinds = []
    for name in ("count", "color", "position", "clean"):
        right = [value == 1 for verdict in verdicts for criterion, value in verdict["criteria"] if criterion == name]
        kinds.append(100 * mean(right))
        assert numbers[name] == kinds[-1]
    assert numbers["unigenbench"] == pytest.approx(mean(kinds), abs=1e-9)


def test_the_command_scores_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_dpg(tmp_path / "dpg_bench.csv")
    judge = ["--judges.questions", "rewards.shapes.ShapesQuestions"]
    model = ["--model.path", "shapes-sd3", "--sampling.num_steps", "6", "--seeds", "1", "--batch_size", "12"]
    folder = tmp_path / "out"
    arguments = ["evaluate", "benchmark", "dpg", "--prompts", str(table), *model, *judge]
    assert main([*arguments, "--output", str(folder)]) == 0
    numbers = json.loads((folder / "benchmark.json").read_text())
    evaluation, expected = load_evaluation(folder), []
    for record in evaluation.records:
        (verdict,) = verify(read_image(folder / str(record.image))[None], [BY_TEXT[record.prompt].metadata])
        expected.append(mean([value >= 0.5 for _, value in verdict.criteria]))
    assert numbers["dpg"] == pytest.approx(100 * mean(expected), abs=1e-4) and 20 < numbers["dpg"] <= 100
    assert "dpg-1: " in evaluation.protocol.verifier and "ShapesQuestions" in evaluation.protocol.verifier
    out = capsys.readouterr().out
    assert f"{numbers['dpg']:.6g}" in out and "published numbers are over 4 images of each prompt: --seeds 4" in out


def test_the_command_scores_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layouts: two images of circles at the same place and one elsewhere; tones: two equal grays."""
    circle, samples = shapes.prompts("iid").by_task()["single_object"][0], tmp_path / "samples"
    samples.mkdir()
    scenes = [sample_scene(circle.metadata, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    save_images(render(scenes), [samples / f"{n}.png" for n in range(3)])
    save_images(torch.full((2, 3, 64, 64), 0.5), [samples / f"{n}.png" for n in (3, 4)])
    texts = ["a circle on white"] * 3 + ["a mood"] * 2
    (samples / "prompts.jsonl").write_text(
        "".join(f"{json.dumps({'file_name': f'{n}.png', 'prompt': text})}\n" for n, text in enumerate(texts))
    )
    rows = [
        {"prompt": texts[0], "dimension": "layout", "object": "circle"},
        {"prompt": texts[-1], "dimension": "tonal"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = tmp_path / "out"
    detector = ["--judges.detector", "tests.genalign.evaluation.geneval.shapes_judge.ShapesDetector"]
    arguments = ["evaluate", "benchmark", "divgenbench", "--prompts", str(tmp_path / "rows.jsonl"), *detector]
    assert main([*arguments, "--samples", str(samples), "--output", str(folder)]) == 0
    numbers = json.loads((folder / "benchmark.json").read_text())
    boxes = [record.details["measured"][0] for record in load_evaluation(folder).records[:3]]
    assert numbers["sdi"] == pytest.approx(1 - (1 + 2 * iou(boxes[0], boxes[2])) / 3, abs=1e-4) and numbers["sdi"] > 0.3
    assert numbers["pvs"] == 0 and numbers["missing answers"] == 0
    assert "sdi" in capsys.readouterr().out and (folder / "report.html").is_file()
