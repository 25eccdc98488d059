"""Rounds of training on judges, from the YAML of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genalign.cli import parsing
from genalign.cli.main import main
from genalign.cli.train_settings import Train
from genalign.runtime.media import save_images
from tests.http_servers import Answer, Seen
from tests.rewards.gray_images import grays, named
from tests.rewards.remote.judge_server import completion, judging

CLIP = {"class_path": "rewards.clip.ClipReward", "init_args": {"model": "shapes-clip"}}
REFERENCES = {"class_path": "rewards.shapes.rendered", "init_args": {"suite": "train"}}
JUDGES = "rewards.remote.vlm_judges"


def named_class(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def brighter(levels: list[float], text: str) -> Answer:
    """Prefer the brighter of two images, and grade one by its level."""
    if len(levels) == 1:
        return completion(f"Alignment Score (1-5): {1 + 4 * levels[0]}\nStyle Score (1-5): 3")
    return completion(f"<answer>Image {1 if levels[0] >= levels[1] else 2} is better</answer>")


def train(folder: Path, model: Path, rewards: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Train for a round of 2 prompts x 4 samples, and return its metrics."""
    training = {"rounds": 1, "prompts_per_round": 2, "group_size": 4, "batch_size": 8}
    run = {"model": {"path": str(model)}, "prompts": "shapes:train", "output": str(folder / "run"), "rewards": rewards}
    run |= {"recipe": named_class("genalign.flow_grpo", window=1), "training": training, "lora": {"rank": 2}}
    run |= {"before_after": None, "held_out": {"every": 0}, "sampling": {"num_steps": 4}} | settings
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    (line,) = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    metrics: dict[str, Any] = json.loads(line)
    return metrics


@pytest.mark.slow
def test_a_round_by_verdicts_references_and_dimensions(tmp_path: Path, tiny_folder: Path) -> None:
    requests: list[Seen] = []
    with judging(brighter, requests) as endpoint:
        where = {"url": endpoint.url, "model": "judge"}
        pairs = named_class(f"{JUDGES}.WrittenPairwiseJudge", endpoint=where)
        rubric = named_class(f"{JUDGES}.WrittenRubricJudge", endpoint=where, names=["Alignment", "Style"])
        reference = named_class("rewards.pairwise.ReferencePreference", preference=pairs, references=REFERENCES)
        functions = {
            "wins": named_class("rewards.pairwise.WinRateReward", preference=pairs, opponents=2),
            "reference": reference,
            "alignment": named_class("rewards.dimensions.DimensionReward", judge=rubric, dimension="Alignment"),
            "style": named_class("rewards.dimensions.DimensionReward", judge=rubric, dimension="Style"),
        }
        metrics = train(tmp_path, tiny_folder, {name: {"function": function} for name, function in functions.items()})
    scores = metrics["rewards"]
    assert scores["wins"] == pytest.approx(0.5) and scores["style"] == pytest.approx(0.5)
    assert 0 < scores["alignment"] < 1 and 0 <= scores["reference"] <= 1
    images = [len(seen.json["messages"][0]["content"]) - 1 for seen in requests]
    before, pairs_of_8, with_references = 2, 8, 8  # two samples before the round; 4 pairs in each group of 4
    assert images.count(1) == before + 8
    assert images.count(2) == 2 * (1 + pairs_of_8 + before + with_references)


def test_a_round_by_win_rates_and_views(tmp_path: Path, tiny_folder: Path) -> None:
    view = named_class("rewards.views.ViewReward", reward=CLIP, view=named_class("rewards.views.Blurred", sigma=0.5))
    wins = named_class("rewards.pairwise.WinRateReward", preference=named_class("rewards.pairwise.BradleyTerry"))
    wins["init_args"]["preference"]["init_args"] = {"reward": CLIP, "scale": 100.0}
    discount = named_class(
        "rewards.combine.UncertaintyDiscount", credit=named_class("genalign.algorithms.credit.GroupRelative")
    )
    rewards = {
        "clip": {"function": CLIP, "weight": 0.5},
        "viewed": {"function": view, "weight": 0.5},
        "wins": {"function": wins, "weight": 0.0},
    }
    recipe = named_class("genalign.flow_grpo", window=1)
    metrics = train(
        tmp_path, tiny_folder, rewards, recipe=named_class("genalign.with_credit", recipe=recipe, credit=discount)
    )
    assert metrics["rewards"]["wins"] == pytest.approx(0.5)
    assert metrics["rewards"]["clip"] != metrics["rewards"]["viewed"] and metrics["failed_rewards"] == 0
    assert not re.search("nan", json.dumps(metrics["rewards"]), re.IGNORECASE)


def test_references_of_a_folder_are_configured(tmp_path: Path) -> None:
    folder = tmp_path / "references"
    folder.mkdir()
    save_images(grays(0.2, 0.8), [folder / "a.png", folder / "b.png"])
    lines = [{"file_name": f"{name}.png", "prompt": f"gray {index}"} for index, name in enumerate("ab")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = "rewards.backbones.reference_images.ReferencesByPrompt.read"
    level = {"class_path": "rewards.pairwise.BradleyTerry", "init_args": {"reward": "rewards.jpeg.compressibility"}}
    function = named_class(
        "rewards.pairwise.ReferencePreference",
        preference=level,
        references=named_class(read, folder=str(folder), size=[8, 8]),
    )
    run = {"model": {"path": "shapes-sd3"}, "prompts": "shapes:train", "output": "runs/x"}
    run |= {"recipe": named_class("genalign.flow_grpo"), "rewards": {"better": {"function": function}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    settings = parsing.parse(Train, ["--config", str(tmp_path / "run.yaml")], "train")[0]
    reward = settings.rewards["better"].function
    assert reward(torch.full((2, 3, 8, 8), 0.2), named(2)).shape == (2,)
    with pytest.raises(ValueError, match="no reference for the prompt 'gray 2'"):
        reward(torch.zeros(3, 3, 8, 8), named(3))
