"""Read prompts from text files, tables and datasets, and the prompts.jsonl that lists the samples of a folder."""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from genalign.runtime.hub import hub_answers
from genalign.runtime.text_files import numbered_lines, parse_json, read_text
from genalign.types import Prompt, PromptSet

COLUMNS = ("prompt", "text", "caption")
"""The names that a table's column of prompts may have, in order of preference."""

Rows = Iterator[tuple[str, Any]]  # where a row stands, for messages, and the row: a text, or an object


_SOURCE = re.compile(r"(?P<place>.+?)(?::(?P<split>[\w.-]+(?:\[[^\]]*\])?))?(?:#(?P<column>[^#]+))?")
_HUB_DATASET = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.+-]+))?(?:@(?P<revision>[\w./-]+))?"
)
_NO_TEXT = frozenset({"Audio", "Image", "Nifti", "Pdf", "Video"})  # features that are decoded, at a cost


def load_prompts(source: str | Path) -> PromptSet:
    """Read the prompts of a file, whose suffix says what it is, or of a dataset.

    .txt            one prompt a line, as it is written; blank lines are skipped
    .jsonl .ndjson  one object a line, such as GenEval's metadata
    .json           a list of objects or of texts
    .csv .tsv       a table with a header
    .parquet        a table; needs pyarrow
    a folder        a dataset that save_to_disk wrote, as in my_dataset:train#caption; needs datasets
    hf://datasets/  a dataset of the Hub, as in hf://datasets/owner/name@revision:train#caption; needs datasets

    Of a dataset the split may be left out if there is one, and the column if it has one of the names below. A subset
    of a dataset of the Hub, its configuration, stands after the name: hf://datasets/owner/name/subset:train.
    The prompt of an object or a row stands under "prompt", "text" or "caption", the first of them that it has; the
    other entries are its metadata, without those that are null. A cell of a text table that holds a JSON list or object
    is read as such.

    Raises FileNotFoundError, and ValueError for an unknown suffix, or naming the line that cannot be used.
    """
    place = Path(_parts(str(source))["place"])
    if str(source).startswith("hf://") or any((place / name).is_file() for name in ("dataset_info.json", _SPLITS)):
        return _load_dataset(str(source))
    path = Path(source)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}: give one of {', '.join(_KINDS)}")
    if suffix not in _KINDS:
        raise ValueError(f"{path} is no kind of prompt file: give one of {', '.join(_KINDS)}")
    if suffix == ".txt" and Path(path.stem).suffix.lower() in _KINDS.keys() - {".txt"}:  # of browsers and editors
        raise ValueError(f"{path} has two suffixes of prompt files: rename it to {path.stem!r}, or end it only in .txt")
    prompts = tuple(_prompt(where, row) for where, row in _KINDS[suffix](path))
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one a line")
    return PromptSet(path.stem, prompts)


def read_listing(folder: Path) -> dict[str, Prompt]:
    """Read the prompts of the files in ``folder``, by file name, from its prompts.jsonl.

    Each line is an object such as {"file_name": "a/1.png", "prompt": "a red circle"}, with optional metadata; names are
    relative to the folder. Raises FileNotFoundError, or ValueError naming the line that cannot be used.
    """
    path, prompts = folder / "prompts.jsonl", dict[str, Prompt]()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: write a line with file_name and prompt for each sample")
    for where, row in _json_lines(path):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{where}: expected an object with "file_name" and "prompt", found {str(row)[:80]!r}')
        if "\\" in name:
            raise ValueError(f"{where}: write {name!r} with forward slashes, {name.replace(chr(92), '/')!r}")
        if name in prompts and prompts[name].text != row["prompt"]:
            raise ValueError(f"{where}: {name} is listed with two prompts: keep one of the lines")
        prompts[name] = _prompt(where, row)
    return prompts


def _json_lines(path: Path) -> Rows:
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        yield where, parse_json(line, where)


def _json_list(path: Path) -> Rows:
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, list):
        raise ValueError(f"{path} is not a JSON list: write [...] of texts or objects, or give a .jsonl file")
    for number, item in enumerate(content, start=1):
        yield f"{path}, item {number}", item


def _table(delimiter: str) -> Callable[[Path], Rows]:
    def rows(path: Path) -> Rows:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
        header = reader.fieldnames or ()
        if not set(header) & set(COLUMNS):
            raise ValueError(
                f"{path} has no column of prompts (its first line is {', '.join(header)}): name one of the columns"
                f" {' or '.join(COLUMNS)}, or give a .txt file with a prompt a line"
            )
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: not as many cells as the header has: quote cells that hold commas")
                yield where, {name: _cell(value) for name, value in row.items() if value != ""}
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None

    return rows


def _cell(value: str) -> Any:
    if value[:1] not in ("[", "{"):
        return value
    try:
        return parse_json(value, "cell")
    except ValueError:
        return value


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install 'genalign[parquet]'") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}): write it again") from None
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


_SPLITS = "dataset_dict.json"  # in the folder of a dataset with splits


def _parts(source: str) -> dict[str, Any]:
    """Split a source into its place, split and column; the last two are None where they are not named."""
    match = _SOURCE.fullmatch(source)
    whole = match is None or Path(source).exists()
    return {"place": source, "split": None, "column": None} if whole or match is None else match.groupdict()


def _load_dataset(source: str) -> PromptSet:
    """Read the prompts of a dataset. Raises ValueError or FileNotFoundError, in one line, if they cannot be read."""
    place, split, column = _parts(source).values()
    data = _open_dataset(source, place, split)
    names = list(data.column_names)
    text = next((name for name in COLUMNS if name in names), None) if column is None else column
    if text not in names:
        problem = "no column of prompts" if column is None else f"no column {column!r}"
        raise ValueError(f"{source} has {problem}: name one of {', '.join(names)}, as in {place}:train#{names[0]}")
    data = data.select_columns([name for name in names if type(data.features[name]).__name__ not in _NO_TEXT])
    rows = enumerate(data.to_list(), start=1)
    prompts = tuple(_prompt(f"{source}, row {number}", {**row, "prompt": row.get(text)}) for number, row in rows)
    if not prompts:
        raise ValueError(f"{source} holds no prompts: take another split")
    return PromptSet("-".join(filter(None, [Path(place).name, split])), prompts)


def _open_dataset(source: str, place: str, split: str | None) -> Any:
    """Open one split of a dataset. Raises ValueError or FileNotFoundError, in one line, if it cannot be opened."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"reading {source} needs datasets: pip install 'genalign[datasets]'") from None
    try:
        data = _hub_dataset(place, split) if place.startswith("hf://") else datasets.load_from_disk(place)
    except Exception as error:  # of files that are damaged, or of an empty split, any class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FileNotFoundError(
            f"{source} cannot be read ({reason}): check its name, its split and your token"
        ) from error
    if place.startswith("hf://") and split is not None:
        return data
    return _one_split(source, data, split)


@functools.cache  # a command reads its prompts several times
def _hub_dataset(place: str, split: str | None) -> Any:
    """Open a dataset of the Hub, one split of it or all of them."""
    import datasets

    match = _HUB_DATASET.fullmatch(place)
    if match is None:
        raise ValueError("write hf://datasets/owner/name:split#column")
    if not (hub_answers() or constants.HF_HUB_OFFLINE):  # its client would try again for some 20 seconds
        raise ConnectionError("the Hub cannot be reached; HF_HUB_OFFLINE=1 reads what is cached")
    name, subset, revision = match.groups()
    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except ValueError as error:
        if subset is None and str(error).startswith("Config name is missing"):
            subsets = datasets.get_dataset_config_names(name, revision=revision)
            example = place.replace(name, f"{name}/{subsets[0]}", 1)
            raise ValueError(f"it has several subsets: name one of {', '.join(subsets)}, as in {example}") from None
        raise


def _one_split(source: str, data: Any, split: str | None) -> Any:
    """Take a split by its name, or the only one. Raises ValueError if it is not clear."""
    if not isinstance(data, Mapping):  # the folder of a single split, which may have a name
        data = {str(data.split): data}
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        problem = "several splits" if split is None else f"no split {split!r}"
        raise ValueError(
            f"{source} has {problem}: name one of {', '.join(data)}, as in {_parts(source)['place']}:train"
        )
    return data[split]


_KINDS: Mapping[str, Callable[[Path], Rows]] = {
    ".txt": lambda path: ((f"{path}, line {number}", line) for number, line in numbered_lines(path)),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}


def _prompt(where: str, row: Any) -> Prompt:
    """Turn a row into a prompt. Raises ValueError where it has no text."""
    text = row
    if isinstance(row, Mapping):
        text = next((row[name] for name in COLUMNS if row.get(name) is not None), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: expected a text, or an object with a text under "prompt", found {str(row)[:80]!r}')
    if isinstance(row, str):
        return Prompt(text.strip())
    return Prompt(text.strip(), {**_without_nulls(row), "prompt": text.strip()})


def _without_nulls(value: Any) -> Any:
    """Drop the entries that are null, which tables of other programs write where an object has none."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
