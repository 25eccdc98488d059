"""Prompt files of every kind, encoding and line end: read whole, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from genalign.evaluation.geneval.metadata import PromptSpec
from genalign.runtime.prompt_files import load_prompts, read_listing
from tests.hub_stand_in import stand_in_hub

PROMPTS = [
    "a red circle",
    "two, blue squares",
    'a "quoted" moon',
    "a line\u2028separator \x85 within",
    "a vertical\x0btab",
    "# a comment of other programs",
    "// and of others",
    "a cat --n low quality --w 512",
]
GENEVAL = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"}


def _read(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [prompt.text for prompt in load_prompts(path).prompts]


def _csv(delimiter: str = ",") -> str:
    quoted = ('"' + prompt.replace('"', '""') + '"' for prompt in PROMPTS)
    return "\n".join([f"prompt{delimiter}id", *(f"{text}{delimiter}{i}" for i, text in enumerate(quoted))])


CONTENTS = {
    "p.txt": "\n".join(PROMPTS),
    "p.jsonl": "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in PROMPTS),
    "UPPER.JSONL": "\n".join(json.dumps({"text": text}) for text in PROMPTS),
    "p.ndjson": "\n".join(json.dumps({"caption": text, "prompt": None}) for text in PROMPTS),
    "objects.json": json.dumps([{"prompt": text} for text in PROMPTS], indent=1),
    "texts.json": json.dumps(PROMPTS),
    "p.csv": _csv(),
    "p.tsv": _csv("\t"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file_in_every_encoding_gives_the_same_prompts(
    name: str, end: str, encoding: str, tmp_path: Path
) -> None:
    mark = "\ufeff" if encoding.startswith(("utf-16", "utf-32")) else ""
    content = mark + CONTENTS[name].replace("\n", end) + end + end
    assert _read(tmp_path / name, content.encode(encoding)) == PROMPTS


def test_parquet_rows_are_read_without_their_nulls(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    clauses = [
        {"class": "dog", "count": 1.0, "color": None, "position": None},
        {"class": "cat", "count": 1.0, "color": None, "position": ["left of", "0"]},
    ]
    rows = [
        {**GENEVAL, "exclude": None, "include": [{**clause, "position": None} for clause in clauses]},
        {"prompt": "a plain text", "tag": None, "include": None, "exclude": None},
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "p.parquet")
    first, second = load_prompts(tmp_path / "p.parquet").prompts
    assert PromptSpec.from_prompt(first).include[0].count == 1 and "exclude" not in (first.metadata or {})
    assert (second.text, second.task) == ("a plain text", "all")
    (tmp_path / "half.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"half\.parquet cannot be read as parquet"):
        load_prompts(tmp_path / "half.parquet")


def test_cells_of_a_table_are_metadata(tmp_path: Path) -> None:
    include = json.dumps(GENEVAL["include"]).replace('"', '""')
    content = f'prompt,tag,include,note\na photo of two dogs,counting,"{include}",[not json\n'
    (tmp_path / "p.csv").write_text(content)
    (prompt,) = load_prompts(tmp_path / "p.csv").prompts
    assert prompt.metadata == {**GENEVAL, "note": "[not json"}
    assert PromptSpec.from_prompt(prompt) == PromptSpec.from_metadata(GENEVAL)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.yaml", "a", r"is no kind of prompt file: give one of \.txt, \.jsonl"),
        ("p.txt.gz", "a", "is no kind of prompt file"),
        ("p", "a", "is no kind of prompt file"),
        ("p.jsonl.txt", '{"prompt": "a"}\n', r"two suffixes of prompt files: rename it to 'p\.jsonl'"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.txt", b"a caf\xe9\n", r"p\.txt is not UTF-8 \(byte 0xe9 at position 5\): save it as UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', "line 2: not JSON"),
        ("p.jsonl", f'{{"prompt": {"[" * 100_000}}}\n', r"line 1: not JSON \(maximum recursion depth"),
        ("p.jsonl", '{"name": "a"}\n', 'line 1: expected a text, or an object with a text under "prompt"'),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "line 2: expected a text"),
        ("p.jsonl", "[1]\n", "line 1: expected a text"),
        ("p.json", '{"prompt": "a"}', "is not a JSON list"),
        ("p.json", '["a", 3]', "item 2: expected a text"),
        ("p.csv", "a red circle\ntwo squares\n", r"has no column of prompts \(its first line is a red circle\)"),
        ("p.csv", "prompt,tag\na, b, c\n", "line 2: not as many cells as the header"),
        ("p.csv", "prompt,tag\na\n", "line 2: not as many cells as the header"),
        ("p.csv", "prompt,tag\n,x\n", "line 2: expected a text"),
    ],
)
def test_other_files_are_refused_in_one_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*none\.txt: give one of \.txt"):
        load_prompts(tmp_path / "none.txt")


TEXTS = st.lists(
    st.text(min_size=1).map(str.strip).filter(lambda text: text and not set(text) & set("\r\n\0")), min_size=1
)


@given(texts=TEXTS, encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_texts_are_read_as_they_were_written(texts: list[str], encoding: str, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    assert _read(folder / "p.txt", "\n".join(texts).encode(encoding)) == texts
    assert _read(folder / "p.json", json.dumps(texts, ensure_ascii=False).encode(encoding)) == texts


def _listing(folder: Path, *rows: object) -> dict[str, str]:
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    return {name: prompt.text for name, prompt in read_listing(folder).items()}


def test_a_listing_names_the_prompt_of_each_file(tmp_path: Path) -> None:
    one, again = {"file_name": "a/1.png", "prompt": "a circle"}, {"file_name": "2.png", "prompt": "a circle"}
    assert _listing(tmp_path, one, again, one) == {"a/1.png": "a circle", "2.png": "a circle"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a/1.png", "prompt": "a square"}, "line 2: a/1.png is listed with two prompts"),
        ({"file_name": "b.png", "prompt": None}, 'line 2: expected an object with "file_name" and "prompt"'),
        ({"file_name": 1, "prompt": "a"}, 'line 2: expected an object with "file_name" and "prompt"'),
        (["a/1.png"], 'line 2: expected an object with "file_name" and "prompt"'),
        ({"file_name": "a\\2.png", "prompt": "a"}, r"with forward slashes, 'a/2\.png'"),
    ],
)
def test_a_listing_that_is_not_clear_is_refused(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _listing(tmp_path, {"file_name": "a/1.png", "prompt": "a circle"}, row)


ROWS = [{"caption": text, "tag": "colors", "note": None, "n": number} for number, text in enumerate(PROMPTS)]


def _saved(folder: Path) -> Path:
    """Write a dataset of two splits."""
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": train, "test": train.select([0])})
    splits.save_to_disk(folder)
    return folder


def test_a_saved_dataset_is_read_by_split_and_column(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "mine")
    prompts = load_prompts(f"{folder}:train")
    assert prompts.name == "mine-train" and [prompt.text for prompt in prompts.prompts] == PROMPTS
    first = prompts.prompts[0]
    assert first.task == "colors" and first.metadata == {
        "caption": PROMPTS[0],
        "tag": "colors",
        "n": 0,
        "prompt": PROMPTS[0],
    }
    assert [prompt.text for prompt in load_prompts(f"{folder}:train#tag").prompts] == ["colors"] * len(PROMPTS)
    assert (
        load_prompts(folder / "train").prompts == prompts.prompts == load_prompts(f"{folder / 'train'}#caption").prompts
    )


def test_a_dataset_that_is_not_clear_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "mine")
    refused = [
        ("", "has several splits: name one of train, test, as in .*mine:train"),
        (":valid", "has no split 'valid': name one of train, test"),
        (":train#text", "has no column 'text': name one of caption, tag, note, n, as in .*mine:train#caption"),
        (":train#n", "row 1: expected a text"),
    ]
    for rest, message in refused:
        with pytest.raises(ValueError, match=message) as caught:
            load_prompts(f"{folder}{rest}")
        assert "\n" not in str(caught.value)
    (folder / "train" / "state.json").write_text("{")
    with pytest.raises(FileNotFoundError, match=r"mine:train cannot be read \(.*: check its name"):
        load_prompts(f"{folder}:train")


def test_a_dataset_of_the_hub_is_read_by_revision_split_and_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, prompts in ((old, PROMPTS[:2]), (new, PROMPTS[:1])):
        folder.mkdir()
        rows = "".join(f'"{text}",colors\n' for text in prompts)
        (folder / "train.csv").write_text(f"caption,tag\n{rows}")
        (folder / "test.csv").write_text("caption,tag\na dog,count\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    with stand_in_hub(monkeypatch, tmp_path / "hub") as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
        hub.repositories["owner/prompts"] = {"main": new, "v1": old}
        source = "hf://datasets/owner/prompts"
        assert [prompt.text for prompt in load_prompts(f"{source}@v1:train").prompts] == PROMPTS[:2]
        assert [prompt.text for prompt in load_prompts(f"{source}@v1:train[:1]#tag").prompts] == ["colors"]
        (prompt,) = load_prompts(f"{source}:train").prompts
        assert prompt.metadata == {"caption": PROMPTS[0], "tag": "colors", "prompt": PROMPTS[0]}
        requests = len(hub.seen)
        load_prompts(f"{source}:train")  # from memory
        assert len(hub.seen) == requests
        refused = [
            (f"{source}@v9:train", r"cannot be read \(Revision 'v9' doesn't exist for dataset 'owner/prompts'"),
            ("hf://datasets/owner/none:train", r"cannot be read \(Dataset 'owner/none' doesn't exist on the Hub"),
            ("hf://owner/prompts", "write hf://datasets/owner/name:split#column"),
            (f"{source}:valid", "Unknown split .valid.. Should be one of .*train"),
            (source, "has several splits: name one of train, test, as in hf://datasets/owner/prompts:train"),
            (f"{source}:train#text", "has no column 'text': name one of caption, tag, as in"),
        ]
        for source, message in refused:
            with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
                load_prompts(source)
            assert "\n" not in str(caught.value)


def test_a_subset_of_a_dataset_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder, configs = tmp_path / "files", ""
    folder.mkdir()
    for subset, text in (("colors", "a red circle"), ("counts.v2", "two dogs")):
        (folder / f"{subset}.csv").write_text(f"caption\n{text}\n")
        configs += f"- config_name: {subset}\n  data_files: {subset}.csv\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    with stand_in_hub(monkeypatch, tmp_path / "hub") as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
        hub.repositories["owner/subsets"] = {"main": folder, "v1": folder}
        source = "hf://datasets/owner/subsets"
        for subset, text in (("colors", "a red circle"), ("counts.v2@v1", "two dogs")):
            assert [prompt.text for prompt in load_prompts(f"{source}/{subset}:train#caption").prompts] == [text]
        refused = [
            (f"{source}:train", rf"several subsets: name one of colors, counts.v2, as in {source}/colors\)"),
            (f"{source}@v1", rf"several subsets: name one of colors, counts.v2, as in {source}/colors@v1\)"),
            (f"{source}/sizes:train", r"cannot be read \(BuilderConfig 'sizes' not found. Available: .*colors"),
        ]
        for wrong, message in refused:
            with pytest.raises(FileNotFoundError, match=message) as caught:
                load_prompts(wrong)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [False, True])
def test_a_dataset_of_the_hub_is_refused_while_offline(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("genalign.runtime.prompt_files.hub_answers", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    reason = r"Couldn't reach 'owner/absent' on the Hub" if offline else "the Hub cannot be reached; HF_HUB_OFFLINE=1"
    with pytest.raises(FileNotFoundError, match=rf"absent:train cannot be read \({reason}") as caught:
        load_prompts("hf://datasets/owner/absent:train")
    assert "\n" not in str(caught.value)


def test_images_of_a_dataset_are_not_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    rows = {"prompt": PROMPTS[:1], "image": [{"bytes": b"no image", "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "mine")
    (prompt,) = load_prompts(tmp_path / "mine").prompts
    assert prompt.metadata == {"prompt": PROMPTS[0]}
