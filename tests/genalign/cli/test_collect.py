"""``genalign collect``: pools of a model, of a folder of images and of preferences, and runs that learn from them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from genalign.cli.collect import fitted
from genalign.cli.main import main
from genalign.training.pools import Pool
from pipelines import SD3


def _config(path: Path, tiny_folder: Path, **settings: object) -> str:
    own = {
        "output": str(path.with_suffix("")),
        "model": {"path": str(tiny_folder), "height": 32, "width": 32},
        "sampling": {"num_steps": 2, "guidance": 1.0},
        "rewards": {"size": {"function": "rewards.jpeg.incompressibility"}},
        "samples_per_prompt": 3,
        "batch_size": 4,
    }
    path.write_text(yaml.safe_dump(own | settings))
    return str(path)


def _picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> bytes:
    image = Image.new("RGB", size, color)
    image.save(path)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_a_pool_of_a_model_is_collected_resumed_and_learned_from(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("a circle\ntwo squares\n")
    config = _config(tmp_path / "pool.yaml", tiny_folder, prompts=str(tmp_path / "prompts.txt"))
    assert main(["collect", "--config", config]) == 0
    pool = Pool.load(tmp_path / "pool")
    assert [sample.prompt.text for sample in pool.samples] == ["a circle"] * 3 + ["two squares"] * 3
    first = pool.read(range(6))
    (tmp_path / "pool" / "part-00001.jsonl").unlink()  # as if it had been killed
    assert main(["collect", "--config", config]) == 0
    again = Pool.load(tmp_path / "pool")
    assert again.samples == pool.samples and torch.equal(again.read(range(6)), first)
    decoded = SD3.load(tiny_folder, height=32, width=32).decode(first)
    assert decoded.shape == (6, 3, 32, 32) and len({sample.scores["size"] for sample in pool.samples}) > 1

    run = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny_folder), "height": 32, "width": 32},
        "prompts": str(tmp_path / "pool"),
        "rewards": {"size": {"function": "genalign.stored_score"}},
        "recipe": {"class_path": "genalign.dpo", "init_args": {"draws": 1}},
        "sampling": {"num_steps": 2, "guidance": 1.0},
        "training": {"data": str(tmp_path / "pool"), "rounds": 2, "group_size": 3, "learning_rate": 0.01},
        "lora": {"rank": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["plan", "--config", str(tmp_path / "run.yaml")]) == 0
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and "decode" not in rows[1]["calls"] and (tmp_path / "run" / "lora").is_dir()
    assert "another base" not in caplog.text

    info = tmp_path / "pool" / "pool.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"denoiser": "0123"}))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "other")]) == 0
    assert "pool were made by another base model (weights 0123, not" in caplog.text


def test_images_of_others_are_fitted_encoded_and_scored(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number, size in enumerate([(32, 32), (64, 48)]):
        _picture(folder / f"{number}.png", (200, 10 * number, 0), size)
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": "a circle"}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines))
    assert main(["collect", "--config", _config(tmp_path / "pool.yaml", tiny_folder, samples=str(folder))]) == 0
    pool = Pool.load(tmp_path / "pool")
    tiny = SD3.load(tiny_folder, height=32, width=32)
    image = torch.tensor([200 / 255, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(pool.read([0]), tiny.encode_samples(image).half().float(), atol=2e-3, rtol=1e-3)
    assert fitted(torch.rand(3, 64, 48), (3, 32, 32)).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="a clip has shape"):
        fitted(torch.rand(1, 10), (1, 20))


def test_scores_that_a_folder_lists_are_columns_of_the_pool(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, lines = tmp_path / "images", list[str]()
    folder.mkdir()
    for number, scores in enumerate([{"human": 4.5}, {"human": 2, "size": -1.0}, {}]):
        _picture(folder / f"{number}.png", (200, 10 * number, 0))
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": "a circle", "scores": scores}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines))
    assert main(["collect", "--config", _config(tmp_path / "pool.yaml", tiny_folder, samples=str(folder))]) == 0
    pool = Pool.load(tmp_path / "pool")
    assert pool.info.scores == ("human", "size")
    assert [sample.scores.get("human") for sample in pool.samples] == [4.5, 2.0, None]
    assert pool.samples[1].scores["size"] > 0  # a reward of the run takes the place of a listed score
    alone = _config(tmp_path / "alone.yaml", tiny_folder, samples=str(folder), rewards={})
    assert main(["collect", "--config", alone]) == 0
    assert [sample.scores for sample in Pool.load(tmp_path / "alone").samples][1] == {"human": 2.0, "size": -1.0}
    (folder / "prompts.jsonl").write_text(lines[2])
    assert main(["collect", "--config", alone, "--output", str(tmp_path / "none")]) == 2
    assert "rewards is empty: samples without scores cannot be trained on" in capsys.readouterr().err
    (folder / "prompts.jsonl").write_text(lines[0].replace("4.5", '"good"'))
    assert main(["collect", "--config", alone, "--output", str(tmp_path / "none")]) == 2
    assert "the scores of a sample of 'a circle' must map names to numbers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pick", "hpd", "files", "own"])
def test_preferences_become_groups_of_two(
    tiny_folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [_picture(tmp_path / f"{name}.png", color) for name, color in (("a", (255, 0, 0)), ("b", (0, 255, 0)))]
    if kind == "pick":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = {"caption": ["a circle"] * 2, "label_0": [1.0, 0.5], "label_1": [0.0, 0.5]}
        table = pyarrow.table({**rows, "jpg_0": [pictures[0]] * 2, "jpg_1": [pictures[1]] * 2})
        parquet.write_table(table, tmp_path / "pairs.parquet")
        file, scores = tmp_path / "pairs.parquet", [1.0, 0.0, 0.5, 0.5]
    else:
        row = {"prompt": "a circle", "image_path": ["a.png", "b.png"], "human_preference": [0, 1]}
        if kind == "files":
            row = {"prompt": "a circle", "image_0": "a.png", "image_1": "b.png", "label_0": 0}
        file, scores = tmp_path / "pairs.jsonl", [0.0, 1.0]
        if kind == "own":
            row = {"prompt": "a circle", "kind": "ranking", "samples": ["a.png", "b.png"], "scores": [0, 1]}
            rating = {"prompt": "a circle", "kind": "rating", "samples": ["a.png"], "scores": [3]}
            file.write_text(json.dumps(rating) + "\n" + json.dumps(row | {"annotator": "ada"}) + "\n")
        else:
            file.write_text(json.dumps(row) + "\n")
    config = _config(tmp_path / "pool.yaml", tiny_folder, preferences=str(file), rewards={})
    assert main(["collect", "--config", config]) == 0
    assert ("1 of the 2 judgments" in capsys.readouterr().out) == (kind == "own")
    pool = Pool.load(tmp_path / "pool")
    assert {sample.prompt.task for sample in pool.samples} == {"ada" if kind == "own" else "all"}
    assert [sample.scores["preference"] for sample in pool.samples] == scores
    assert [len(group) for group in pool.groups()["a circle"]] == [2] * (len(scores) // 2)


def test_wrong_settings_are_named(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--config", _config(tmp_path / "a.yaml", tiny_folder)]) == 2
    assert "give exactly one source of samples (prompts, samples or preferences), not none" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a circle\n")
    own = {"prompts": str(tmp_path / "prompts.txt")}
    assert main(["collect", "--config", _config(tmp_path / "b.yaml", tiny_folder, rewards={}, **own)]) == 2
    assert "rewards is empty: samples without scores cannot be trained on" in capsys.readouterr().err
    assert main(["collect", "--config", _config(tmp_path / "c.yaml", tiny_folder, **own)]) == 0
    assert main(["collect", "--config", _config(tmp_path / "c.yaml", tiny_folder, seed=1, **own)]) == 2
    assert "was collected with other settings: choose another output" in capsys.readouterr().err
