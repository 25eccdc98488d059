"""Judgments from files in the layouts of published datasets, and rows that cannot be used."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genalign.reward_learning.annotators import side_choices
from genalign.reward_learning.examples import examples
from genalign.reward_learning.preference_formats import path_names, read_all_preferences, read_preferences
from genalign.reward_learning.preferences import Judgment

COLORS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of one color each: a.png, b.png and c.png."""
    for name in COLORS:
        (tmp_path / f"{name}.png").write_bytes(_content(name))
    return tmp_path


def _content(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), COLORS[name]).save(buffer, "PNG")
    return buffer.getvalue()


def _read(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "rows.jsonl") -> list[Judgment]:
    text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text)
    return read_preferences(folder / name)


def _names(judgment: Judgment) -> list[str]:
    """The images' names, by their colors."""
    by_color = {tuple(channel / 255 for channel in color): name for name, color in COLORS.items()}
    return [by_color[tuple(sample.read()[:, 0, 0].tolist())] for sample in judgment.samples]


def test_pick_a_pic_in_parquet(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "caption": ["a dot", "two dots", "no dot"],
        "jpg_0": [_content(name) for name in "abc"],
        "jpg_1": [_content(name) for name in "bca"],
        "label_0": [0.0, 0.5, 0.5],
        "label_1": [1.0, 0.5, 0.5],
        "has_label": [True, True, False],
        "model_0": ["one"] * 3,
        "model_1": ["two"] * 3,
        "user_id": [7, 8, 8],
    }
    parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")
    first, second = read_preferences(folder / "rows.parquet")
    assert (first.prompt, first.kind, first.annotator) == ("a dot", "pair", "7") and _names(first) == ["a", "b"]
    assert [judgment.scores for judgment in (first, second)] == [{"overall": (0, 1)}, {"overall": (0.5, 0.5)}]
    assert [sample.generator for sample in first.samples] == ["one", "two"]
    assert "1 of the 3 rows" in caplog.text and "are skipped: they have no label" in caplog.text


def test_choices_of_hpd_become_pairs(folder: Path) -> None:
    (folder / "train").mkdir()
    for name in COLORS:
        (folder / f"{name}.png").rename(folder / "train" / f"{name}.png")  # train.json stands beside train/
    rows = [
        {"prompt": "a dot", "file_path": ["a.png", "b.png"], "human_preference": [0, 1], "user_hash": "f3"},
        {"prompt": "a dot", "file_path": ["a.png", "b.png", "c.png"], "human_preference": [0, 1, 0]},
    ]
    first, *others = _read(folder, rows, "train.json")
    assert (first.annotator, first.scores["overall"], _names(first)) == ("f3", (0, 1), ["a", "b"])
    assert [(_names(other), other.scores["overall"]) for other in others] == [
        (["a", "b"], (0, 1)),
        (["b", "c"], (1, 0)),
    ]


def test_choices_among_several_keep_the_order_of_the_row(folder: Path) -> None:
    """An annotator who chose each place of three equally often prefers no side."""
    files = {"file_path": ["a.png", "b.png", "c.png"], "user_hash": "f3"}
    choices_of = [[float(place == best) for place in range(3)] for best in (0, 1, 2) * 10]
    rows = [files | {"prompt": f"{n} dots", "human_preference": own} for n, own in enumerate(choices_of)]
    (choices,) = side_choices(_read(folder, rows))
    assert (choices.first.mean, choices.first.n, choices.one_sided) == (0.5, 60, False)


@pytest.mark.parametrize("columns", [("image_path", "rank"), ("generations", "ranking")])
def test_the_smallest_rank_is_the_best(folder: Path, columns: tuple[str, str]) -> None:
    row = {"prompt": "a dot", columns[0]: ["a.png", "b.png", "c.png"], columns[1]: [2, 1, 2]}
    (judgment,) = _read(folder, [row], "test.json")
    assert judgment.kind == "ranking" and judgment.scores == {"overall": (-2, -1, -2)}
    pairs = examples([judgment]).pairs
    assert pairs.preferred[:, 0].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("layout", ["json", "parquet"])
def test_the_images_of_a_prompt_of_imagerewarddb_are_ranked_and_rated(folder: Path, layout: str) -> None:
    ranks = [("0-0", "a", 2, 3, None), ("0-1", "c", 1, 7, 6), ("0-0", "b", 1, 5, 4)]
    rows: list[dict[str, Any]] = [
        {
            "image_path": f"images/train/train_1/{name}.png",  # relative to the root, and the file is in this folder
            "prompt_id": prompt,
            "prompt": f"prompt {prompt}",
            "classification": "People",
            "rank": rank,
            "overall_rating": overall,
            "image_text_alignment_rating": alignment,
            "fidelity_rating": 2,
        }
        for prompt, name, rank, overall, alignment in ranks
    ]
    if layout == "json":
        judgments = _read(folder, rows, "train_1.json")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        for row, (_, name, *_) in zip(rows, ranks, strict=True):
            row["image"] = {"bytes": _content(name), "path": None}
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
        judgments = read_preferences(folder / "rows.parquet")
    assert [(judgment.kind, _names(judgment)) for judgment in judgments] == [
        ("ranking", ["a", "b"]),
        ("rating", ["a"]),
        ("rating", ["b"]),
        ("rating", ["c"]),  # the only image of its prompt
    ]
    assert judgments[0].scores == {"overall": (-2, -1)}
    assert judgments[1].scores == {"overall": (3,), "fidelity": (2,)}
    assert judgments[2].scores == {"overall": (5,), "alignment": (4,), "fidelity": (2,)}


def test_rewardbench_prefers_the_chosen(folder: Path) -> None:
    rows = [
        {"prompt": "a dot", "chosen": "b.png", "rejected": "a.png", "chosen_model": "one", "subset": "dots", "id": 3}
    ]
    (judgment,) = _read(folder, rows)
    assert judgment.scores == {"overall": (1, 0)} and _names(judgment) == ["b", "a"]
    assert judgment.prompt.metadata == {"subset": "dots"} and judgment.samples[0].generator == "one"
    assert judgment.shown is None  # the columns say nothing of it, so that no side is preferred
    assert side_choices(_read(folder, [rows[0] | {"prompt": f"{n} dots", "user_id": "ada"} for n in range(30)])) == []
    with pytest.raises(ValueError, match="row 1 is no judgment: its sample 'I would say' is no image or audio file"):
        _read(folder, [{"prompt": "hello", "chosen": "I would say", "rejected": "a.png"}])


def test_multimodal_rewardbench_of_text_to_image(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    responses = {
        f"response_{side}": {"model": f"model {side}", "response_content": [["text", "here"], ["image", f"{side}.png"]]}
        for side in "ab"
    }
    row = {"pair_id": "0", "prompt_source": "dots", "prompt_content": [["text", "a dot"]], "chosen": "B", **responses}
    edit = row | {"prompt_content": [["text", "make it red"], ["image", "c.png"]]}
    (folder / "t2i.json").write_text(json.dumps({"pairs": [row, edit]}))
    (judgment,) = read_preferences(folder / "t2i.json")
    assert judgment.scores == {"overall": (0, 1)} and _names(judgment) == ["a", "b"] and judgment.prompt == "a dot"
    assert judgment.prompt.metadata == {"subset": "dots"} and judgment.samples[1].generator == "model b"
    assert "1 of the 2 rows" in caplog.text and "images in the prompt" in caplog.text
    with pytest.raises(ValueError, match="its chosen is 'C', so the winner is unknown"):
        _read(folder, [row | {"chosen": "C"}])


def test_a_video_is_rated_by_its_middle_frame_without_motion(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {
        "id": "0",
        "images": ["a.png", "b.png", "c.png"],
        "text prompt": "a moving dot",
        "video link": "https://example.org/0.mp4",
        "visual quality": 3,
        "temporal consistency": 1,
        "dynamic degree": 4,
        "text-to-video alignment": 2,
        "factual consistency": 1,
        "conversations": [],
    }
    still = {"id": "1", "image": "c.png", "text prompt": "a dot", "visual quality": 2, "factual consistency": 4}
    video, image = _read(folder, [row, still])
    assert video.kind == "rating" and _names(video) == ["b"] and _names(image) == ["c"]
    assert video.scores == {"visual quality": (3,), "text-to-video alignment": (2,), "factual consistency": (1,)}
    assert image.scores == {"visual quality": (2,), "factual consistency": (4,)}
    assert "1 of the 2 rows" in caplog.text and "the middle frame stands for each" in caplog.text
    with pytest.raises(ValueError, match="no image or audio file; of a video, list the frames"):
        _read(folder, [{name: value for name, value in row.items() if name != "images"}])


def test_sounds_are_rated(folder: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(folder / "clip.wav", np.full(80, 0.5, np.float32), 8000)
    (judgment,) = _read(folder, [{"audio": "clip.wav", "text prompt": "a hum", "timbre": 4.5}])
    assert judgment.scores == {"timbre": (4.5,)}
    torch.testing.assert_close(judgment.samples[0].read(), torch.full((1, 80), 0.5), atol=1e-4, rtol=0)


def test_our_own_format_is_recognized(folder: Path) -> None:
    line = {"prompt": "a dot", "samples": ["a.png", "b.png"], "scores": [1, 0], "annotator": "ada"}
    (folder / "preferences.jsonl").write_text(json.dumps(line) + "\n")
    (by_folder,), (by_file,) = read_preferences(folder), read_preferences(folder / "preferences.jsonl")
    assert by_folder == by_file and by_file.annotator == "ada" and by_file.overall() == (1, 0)


def test_our_own_format_in_json(folder: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a dot", "samples": ["a.png", "b.png"], "scores": [1, 0]},
        {"prompt": "a dot", "samples": [{"file": "b.png"}, "c.png"], "scores": {"style": [0, 1]}, "shown": [1, 0]},
    ]
    first, second = _read(folder, lines, "rows.json")
    assert (_names(first), first.scores) == (["a", "b"], {"overall": (1, 0)})
    assert (_names(second), second.scores, second.shown) == (["b", "c"], {"style": (0, 1)}, (1, 0))
    with pytest.raises(ValueError, match="row 1 is no judgment: it has 2 samples and 1 scores of 'overall'"):
        _read(folder, [lines[0] | {"scores": [1]}], "rows.json")


def test_our_own_format_in_parquet_with_files_and_content(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = {"file": "a.png", "bytes": None, "generator": "one", "seed": 3}
    content = {"file": None, "bytes": _content("b"), "generator": None, "seed": None}
    image = {"file": {"bytes": _content("c"), "path": None}}
    rows: list[dict[str, Any]] = [
        {
            "prompt": "a dot",
            "kind": "pair",
            "samples": [file, content],
            "scores": {"overall": [1.0, 0.0], "style": None},
            "metadata": {"subset": "dots", "count": None},
            "annotator": "ada",
            "shown": [1, 0],
        },
        {"prompt": "a dot", "kind": "rating", "samples": [content], "scores": {"overall": None, "style": [4.0]}},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    pair, rating = read_preferences(folder / "rows.parquet")
    assert (pair.kind, _names(pair), pair.scores, pair.shown) == ("pair", ["a", "b"], {"overall": (1, 0)}, (1, 0))
    assert pair.annotator == "ada" and pair.prompt.metadata == {"subset": "dots"}
    assert [(one.generator, one.seed) for one in pair.samples] == [("one", 3), (None, None)]
    assert (rating.kind, _names(rating), rating.scores) == ("rating", ["b"], {"style": (4,)})
    assert (rating.annotator, rating.shown) == (None, ())

    own = {"prompt": "c", "samples": [image], "scores": {"overall": [1.0]}, "kind": "label"}
    parquet.write_table(pyarrow.Table.from_pylist([own]), folder / "rows.parquet")
    (label,) = read_preferences(folder / "rows.parquet")
    assert (label.kind, _names(label)) == ("label", ["c"])
    own["samples"] = [{"file": "d.png"}]
    parquet.write_table(pyarrow.Table.from_pylist([own]), folder / "rows.parquet")
    with pytest.raises(FileNotFoundError, match=r"there is no .*d\.png, which .*rows\.parquet names"):
        read_preferences(folder / "rows.parquet")


def test_a_folder_of_shards_is_read_as_one_table(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name: str, *images: str) -> None:
        rows = [
            {"prompt_id": "7", "prompt": "a dot", "image": {"bytes": _content(image), "path": None}, "rank": ord(image)}
            for image in images
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)

    write("train-00000-of-00002.parquet", "b")
    write("train-00001-of-00002.parquet", "a", "c")
    (ranking,) = read_preferences(folder)
    assert (ranking.kind, _names(ranking)) == ("ranking", ["b", "a", "c"])
    assert ranking.scores == {"overall": (-98, -97, -99)}
    write("test-00000-of-00001.parquet", "a")
    with pytest.raises(ValueError, match=r"has .parquet files of the splits test, train: list the files of one"):
        read_preferences(folder)
    (folder / "preferences.jsonl").write_text(json.dumps({"prompt": "b", "samples": ["a.png", "b.png"]}) + "\n")
    assert [one.prompt for one in read_preferences(folder)] == ["b"]


def test_several_folders_and_files_are_joined(folder: Path) -> None:
    line = {"prompt": "a dot", "samples": ["a.png", "b.png"], "scores": [1, 0]}
    (folder / "preferences.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "more.jsonl").write_text(json.dumps(line | {"prompt": "b"}) + "\n")
    more = str(folder / "more.jsonl")
    assert [one.prompt for one in read_all_preferences([more, str(folder)])] == ["b", "a dot"]
    assert read_all_preferences(more) == read_all_preferences([more])
    with pytest.raises(ValueError, match=r"more\.jsonl is listed twice, so its judgments would count twice"):
        read_all_preferences([more, str(folder), str(folder / "x" / ".." / "more.jsonl")])
    with pytest.raises(ValueError, match="the list of preferences is empty"):
        read_all_preferences([])
    assert path_names(more) == more and path_names([more, "b"]) == f"{more}, b"


PAIR = {"prompt": "a dot", "image_0": "a.png", "image_1": "b.png", "label_0": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_path": []}, "row 1 is no judgment: it has no prompt: give a text under caption, prompt, text"),
        (PAIR | {"prompt": " "}, "row 1 is no judgment: it has no prompt"),
        ({"prompt": "a dot"}, "row 1 is no judgment: its columns prompt are of no layout that is known"),
        (PAIR | {"label_0": None}, "its label_0 is null, so the winner is unknown"),
        (PAIR | {"label_1": 1}, "so the winner is unknown"),
        (PAIR | {"image_1": "d.png"}, "there is no .*d.png, which .*names .1 of its 2 files are missing"),
        (PAIR | {"image_1": "../b.png"}, r"row 1 is no judgment: '../b.png' leads out of"),
        ({key: value for key, value in PAIR.items() if key != "image_1"}, "it has no column 'image_1'"),
        ({"prompt": "a", "image_path": ["a.png"], "human_preference": [1]}, "it has 1 images and 1 labels"),
        ({"prompt": "a", "image_path": "a.png", "human_preference": [1]}, "it has no list of files under image_path"),
        (
            {"prompt": "a", "image_path": ["a.png", "b.png", "c.png"], "human_preference": [0, 0, 0]},
            r"its human_preference is \[0.0, 0.0, 0.0\], so the winner is unknown",
        ),
        (["a.png"], "row 1 is no object"),
    ],
)
def test_rows_that_cannot_be_used_are_named(folder: Path, row: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _read(folder, [row])


def test_files_that_cannot_be_used_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.jsonl: give a folder of judgments, or a .json"):
        read_preferences(folder / "none.jsonl")
    (folder / "rows.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match=r"rows\.csv is no file of preferences"):
        read_preferences(folder / "rows.csv")
    with pytest.raises(ValueError, match=r"rows\.jsonl has no judgment"):
        _read(folder, [])
