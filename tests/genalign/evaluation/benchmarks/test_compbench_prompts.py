from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from genalign.evaluation.benchmarks import compbench_prompts
from genalign.evaluation.benchmarks.compbench_prompts import read_compbench


def files(folder: Path, **contents: str) -> list[Path]:
    for name, text in contents.items():
        (folder / f"{name}.txt").write_text(text)
    return [folder / f"{name}.txt" for name in contents]


TAGS = {"kettle": "NOUN", "lamp": "NOUN", "shelf": "NOUN", "tiny": "ADJ", "green": "ADJ"}


class Document(list):
    """Stands for spaCy's: tags by a table of words, and "the ADJECTIVE NOUN" as chunks."""

    def __init__(self, text: str) -> None:
        words = re.finditer(r"[\w-]+", text)
        super().__init__(SimpleNamespace(text=w[0], idx=w.start(), pos_=TAGS.get(w[0], "X")) for w in words)
        self.noun_chunks = re.findall(r"[Tt]he (?:tiny |green )?(?:kettle|lamp|shelf)", text)


@pytest.fixture(autouse=True)
def _fresh_parser() -> Iterator[None]:
    compbench_prompts._language.cache_clear()
    yield
    compbench_prompts._language.cache_clear()


@pytest.fixture
def spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("spacy")
    module.load = lambda name: Document
    monkeypatch.setitem(sys.modules, "spacy", module)


def test_the_file_names_the_category(tmp_path: Path) -> None:
    paths = files(
        tmp_path,
        color_val="a red kettle and a blue lamp\n\nrubber mats and a green tea cup\n",
        color_val_seen="a green cup and the white plate.\n",
        non_spatial_val="A cook fills a kettle.\n",
    )
    prompts = read_compbench(paths)
    assert prompts.name == "t2i-compbench"
    assert [(prompt.task, (prompt.metadata or {}).get("phrases")) for prompt in prompts.prompts] == [
        ("color", ["a red kettle", "a blue lamp"]),
        ("color", ["rubber mats", "a green tea cup"]),
        ("color", ["a green cup", "the white plate"]),
        ("non_spatial", None),
    ]
    with pytest.raises(ValueError, match="is of no category of T2I-CompBench"):
        read_compbench(files(tmp_path, colour="a red kettle and a blue lamp"))
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_compbench([tmp_path / "shape_val.txt"])


def test_places_are_between_the_nouns_around_the_relation(tmp_path: Path) -> None:
    paths = files(
        tmp_path,
        spatial_val="a kettle on the left of a desk lamp\na spoon next to an egg\n",
        **{"3d_spatial_val": "a spoon hidden by a lamp\na cup in front of a mug"},
    )
    assert [(p.metadata["objects"], p.metadata["relation"]) for p in read_compbench(paths).prompts] == [
        (["kettle", "desk lamp"], "on the left of"),
        (["spoon", "egg"], "next to"),
        (["spoon", "lamp"], "hidden by"),
        (["cup", "mug"], "in front of"),
    ]
    with pytest.raises(ValueError, match="none of the relations"):
        read_compbench(files(tmp_path, spatial_val="a kettle and a lamp"))


def test_numbers_need_the_list_of_nouns(tmp_path: Path) -> None:
    paths = files(tmp_path, numeracy_val="two knives, a tea pot and six spoons fell from three\n")
    with pytest.raises(ValueError, match=r"needs the nouns of new_objects\.txt"):
        read_compbench(paths)
    nouns = files(tmp_path, new_objects="knife - knives\ntea pot - tea pots\nspoon - spoons\n")
    (prompt,) = read_compbench([*paths, *nouns]).prompts
    assert prompt.metadata["counts"] == [("knife", 2), ("tea pot", 1), ("spoon", 6)]
    with pytest.raises(ValueError, match=r"there is no number of objects of new_objects\.txt in 'two cats'"):
        read_compbench([*files(tmp_path, numeracy_val="two cats"), *nouns])
    with pytest.raises(ValueError, match=r"new_objects\.txt, line 1: 'knife' is no noun with its plural"):
        read_compbench([*paths, *files(tmp_path, new_objects="knife")])


def test_sentences_need_spacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="pip install spacy"):
        read_compbench(files(tmp_path, texture_val="The tiny kettle boils on the green shelf."))


@pytest.mark.usefixtures("spacy")
def test_sentences_are_parsed_by_spacy(tmp_path: Path) -> None:
    paths = files(
        tmp_path,
        shape_val="The tiny kettle boils on the green shelf.",
        complex_val="The tiny kettle is next to the green lamp.\nThe kettle boils.\nThe lamp shines near the kettle.",
        complex_val_spatial="the tiny kettle is next to the green lamp\n",
        complex_val_action="The kettle boils. \n",
        complex_val_spatialaction="The lamp shines near the kettle.",
    )
    shape, spatial, action, both = read_compbench(paths).prompts
    assert shape.metadata["phrases"] == ["The tiny kettle", "the green shelf"]
    assert spatial.metadata["kind"] == "spatial" and action.metadata["kind"] == "action"
    assert spatial.metadata["objects"] == ["kettle", "lamp"] and spatial.metadata["relation"] == "next to"
    assert spatial.metadata["text_without_adjectives"] == "The kettle is next to the lamp"
    assert action.metadata["objects"] == []
    assert both.metadata["kind"] == "both" and both.metadata["objects"] == ["lamp", "kettle"]


def test_a_table_may_have_everything(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def read(row: dict[str, Any]) -> dict[str, Any]:
        path.write_text(json.dumps(row))
        return dict(read_compbench([path]).prompts[0].metadata or {})

    row = {"tag": "texture", "prompt": "The kettle on the shelf shines.", "phrases": ["a kettle"]}
    assert read(row) == row
    counted = {"tag": "numeracy", "prompt": "two cups", "counts": [["cup", 2]]}
    assert read(counted) == counted
    place = {"tag": "spatial", "prompt": "cups left of plates", "objects": ["cup", "plate"], "relation": "left of"}
    for wrong, message in (
        (place, "the relation 'left of' is none of on side of"),
        ({**place, "objects": ["cup"], "relation": "near"}, "objects must be the two names"),
        ({**counted, "counts": ["cup"]}, "counts must be a list of names with their numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            read(wrong)
