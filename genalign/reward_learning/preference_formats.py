"""Preference data in the layouts that they are published in, as judgments.

A file is .json (a list, or an object with a list under "pairs"), .jsonl or .parquet, or a folder with the .parquet
files of one split. The columns of a row say what it is; those in brackets may be missing:

    our own         prompt, samples, [kind, scores, annotator, ...]: see ``preferences``
    Pick-a-Pic      caption, jpg_0, jpg_1 (the files' content) or image_0, image_1 (files), label_0, [label_1,
                    has_label, model_0, model_1, user_id]: a pair; a label of 0.5 is a tie
    HPD v2, train   prompt, file_path or image_path (a list), human_preference (1 for the preferred image), [user_hash]:
                    a pair. One preferred image of n is n - 1 pairs, since the others were not compared with each other,
                    each in the order of the row
    HPD v2, test    prompt, image_path (a list), rank (a list, averaged over annotators): a ranking
    ImageReward     prompt, generations (a list), ranking (a list): a ranking
    ImageRewardDB   prompt_id, prompt, image_path or image, rank, [overall_rating, image_text_alignment_rating,
                    fidelity_rating]: the rows of a prompt_id are a ranking, and each is a rating
    RewardBench     prompt, chosen, rejected (files or content), [chosen_model, rejected_model, subset]: a pair, without
                    the order in which it was shown; the subset is in the prompt's metadata
    MMRB 2          prompt_content, response_a, response_b, chosen ("A" or "B"), [prompt_source]: a pair; only rows
                    whose prompt is text and whose responses are one image each, those of its task t2i
    VideoFeedback   "text prompt", images (the frames of a video) or image or audio (a file), and a number under each
                    dimension: a rating. Of a video the middle frame is taken, without the dimensions of motion

In every rank the smallest number is the best. Content is bytes, or an object with them under "bytes". A file's name is
relative to the folder of the file that lists it, to a folder there that is named like it (HPD v2's train.json and
train/), or stands in the same folder whatever its path says (as ImageRewardDB's train_1.json does).

Column names follow the dataset cards of Pick-a-Pic v1 and v2, HPD v2, ImageRewardDB, RewardBench and VideoFeedback, and
the repositories of HPSv2, ImageReward and MMRB 2. Not verified: that smaller is better in the rank of ImageRewardDB and
of HPD v2's test.json (ImageReward's own training code reads its "ranking" so), where VideoFeedback's frames lie, and
RewardBench's columns for images, since its own rows are texts.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from genalign.reward_learning.preferences import (
    OVERALL,
    PREFERENCES,
    JudgedSample,
    Judgment,
    read_judgments,
    require_files,
)
from genalign.runtime.media import inside, medium_of_file
from genalign.runtime.text_files import numbered_lines, parse_json, read_json
from genalign.types import Metadata, Prompt

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

_TEXTS = ("caption", "prompt", "text", "text prompt")
_ANNOTATORS = ("annotator", "user", "user_id", "user_hash")
_FILES = ("image_path", "file_path", "generations")
_RATINGS = {OVERALL: "overall_rating", "alignment": "image_text_alignment_rating", "fidelity": "fidelity_rating"}
_OF_MOTION = ("temporal consistency", "dynamic degree")
_NO_DIMENSION = ("id", "seed")  # numbers of a VideoFeedback row that are no ratings


def path_names(paths: str | Sequence[str]) -> str:
    """Return the paths of ``read_all_preferences`` as a text, for messages."""
    return paths if isinstance(paths, str) else ", ".join(paths)


def read_all_preferences(paths: str | Sequence[str]) -> list[Judgment]:
    """Read the judgments of a folder or file, or of a list of them, one after the other.

    Raises ``read_preferences``'s errors, and ValueError for an empty list and for a path that is listed twice.
    """
    listed = [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]
    if not listed:
        raise ValueError("the list of preferences is empty: name a folder or file of judgments")
    counts = Counter(path.resolve() for path in listed)
    if twice := next((path for path in listed if counts[path.resolve()] > 1), None):
        raise ValueError(f"{twice} is listed twice, so its judgments would count twice: list it once")
    return [judgment for path in listed for judgment in read_preferences(path)]


def read_preferences(path: Path) -> list[Judgment]:
    """Read judgments in our own format, a folder or a .jsonl file, or in one of the layouts above.

    Rows that were not judged are skipped, and logged with their number.

    Raises:
        FileNotFoundError: there is no such file, or a sample that it lists is missing.
        ValueError: a row cannot be used, which is named, or there is no judgment, or a folder has .parquet files of
            several splits.
    """
    files = _shards(path) if path.is_dir() else [path]
    if not files:
        return read_judgments(path)
    if not files[0].is_file():
        raise FileNotFoundError(f"there is no {path}: give a folder of judgments, or a .json, .jsonl or .parquet file")
    judgments, notes, count = list[Judgment](), Counter[str](), 0
    ranked: dict[Any, tuple[_Source, list[Row]]] = {}
    for count, (source, row) in enumerate(_sources(files, notes), start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{source.where} is no object: give one judgment a row")
        if count == 1 and path.suffix == ".jsonl" and "samples" in row:
            return read_judgments(path)
        if "prompt_id" in row and "rank" in row:
            ranked.setdefault(row["prompt_id"], (source, []))[1].append(row)
        else:
            reader = next((reader for columns, reader in _LAYOUTS if columns <= row.keys()), _unknown)
            judgments += source.read(reader, row)
    for source, rows in ranked.values():
        judgments += source.read(_ranked_rows, rows)
    for note, number in notes.items():
        logger.warning("%d of the %d rows of %s %s", number, count, path, note)
    if not judgments:
        raise ValueError(f"{path} has no judgment")
    require_files(judgments, path)
    return judgments


def _shards(folder: Path) -> list[Path]:
    """List the .parquet files of a folder that has no preferences.jsonl.

    Raises ValueError for those of several splits, such as train-00000-of-00002.parquet and test-00000-of-00001.parquet.
    """
    files = [] if (folder / PREFERENCES).is_file() else sorted(folder.glob("*.parquet"))
    splits = sorted({shard[1] for file in files if (shard := re.fullmatch(r"(.+?)-\d+-of-\d+.*", file.stem))})
    if len(splits) > 1:
        raise ValueError(
            f"{folder} has .parquet files of the splits {', '.join(splits)}: list the files of one, or give each split"
            " a folder of its own"
        )
    return files


def _sources(files: Sequence[Path], notes: Counter[str]) -> Iterator[tuple[_Source, Any]]:
    """Yield the rows of files, and where each stands."""
    for file in files:
        for number, row in enumerate(_rows(file), start=1):
            yield _Source(file, f"{file}, row {number}", notes), row


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".jsonl":
        for number, line in numbered_lines(path):
            yield parse_json(line, f"{path}, line {number}")
    elif path.suffix == ".json":
        content = read_json(path)
        yield from content["pairs"] if isinstance(content, Mapping) and "pairs" in content else content
    elif path.suffix == ".parquet":
        try:
            from pyarrow import ArrowInvalid, parquet
        except ImportError:
            raise ValueError(f"reading {path} needs pyarrow: pip install 'genalign[parquet]'") from None
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
                yield from batch.to_pylist()
        except ArrowInvalid as error:
            raise ValueError(f"{path} cannot be read as parquet ({error}): write it again") from None
    else:
        raise ValueError(f"{path} is no file of preferences: give a .json, .jsonl or .parquet file")


@dataclass(frozen=True)
class _Source:
    """Where a row stands: its file, its place for messages, and the notes on rows of the file, with their number."""

    path: Path
    where: str
    notes: Counter[str]

    def read(self, reader: Callable[[_Source, Any], list[Judgment]], rows: Any) -> list[Judgment]:
        """Call a reader, and say in its errors which row it was."""
        try:
            return reader(self, rows)
        except KeyError as error:
            raise ValueError(f"{self.where} is no judgment: it has no column {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.where} is no judgment: {error}") from None

    def sample(self, value: Any, generator: Any = None) -> JudgedSample:
        """Return the sample of a file's name, of bytes, or of an object with either."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return JudgedSample(value, generator)
        if not isinstance(value, str):
            raise ValueError(f"its sample {value!r} is neither a file nor its content")
        name, folder = Path(value), self.path.parent
        try:
            medium_of_file(name)
        except ValueError:
            raise ValueError(f"its sample {value[:60]!r} is no image or audio file") from None
        places = (inside(folder, value), inside(folder / self.path.stem, value), folder / name.name)
        return JudgedSample(next((place for place in places if place.is_file()), places[0]), generator)


def _unknown(source: _Source, row: Row) -> list[Judgment]:
    _text(row)
    raise ValueError(
        f"its columns {', '.join(map(str, row))} are of no layout that is known: it needs samples (our own format),"
        " jpg_0, jpg_1 and label_0 (Pick-a-Pic), image_0, image_1 and label_0, image_path and human_preference or rank"
        " (HPD), prompt_id and rank (ImageRewardDB), chosen and rejected (RewardBench), or images and text prompt"
        " (VideoFeedback)"
    )


def _own_judgment(source: _Source, row: Row) -> list[Judgment]:
    """A row of our own format, in which parquet has null for what a row does not say."""
    line = {name: value for name, value in row.items() if value is not None}
    for name in ("scores", "metadata"):
        if isinstance(line.get(name), Mapping):
            line[name] = {key: value for key, value in line[name].items() if value is not None}
    return [Judgment.from_dict(line, source.path.parent)]


def _labeled_pair(source: _Source, row: Row) -> list[Judgment]:
    """A row of Pick-a-Pic, or of files with a label."""
    if row.get("has_label") is False:
        source.notes["are skipped: they have no label"] += 1
        return []
    kind = "jpg" if "jpg_0" in row else "image"
    samples = [source.sample(row[f"{kind}_{place}"], row.get(f"model_{place}")) for place in (0, 1)]
    first, second = row["label_0"], row.get("label_1")
    if first is None:
        raise ValueError("its label_0 is null, so the winner is unknown: leave the row out")
    return [_pair(row, samples, float(first), 1 - float(first) if second is None else float(second))]


def _choice(source: _Source, row: Row) -> list[Judgment]:
    """A row of HPD v2's train.json; one preferred image of several is a pair with each of the others."""
    samples, preferred = _listed(source, row), [float(value) for value in row["human_preference"]]
    _require_as_many(samples, preferred)
    best = [place for place, value in enumerate(preferred) if value == 1]
    if len(samples) == 2:
        return [_pair(row, samples, preferred[0], preferred[1])]
    if len(best) != 1 or any(value != 0 for place, value in enumerate(preferred) if place not in best):
        raise ValueError(f"its human_preference is {preferred}, so the winner is unknown: give one 1, and 0")
    pairs = [pair for pair in combinations(range(len(samples)), 2) if best[0] in pair]
    return [_pair(row, [samples[a], samples[b]], preferred[a], preferred[b]) for a, b in pairs]


def _ranking(source: _Source, row: Row) -> list[Judgment]:
    """A row of HPD v2's test.json, or of ImageReward's own files."""
    samples, ranks = _listed(source, row), row["rank"] if "rank" in row else row["ranking"]
    _require_as_many(samples, ranks)
    scores = {OVERALL: tuple(-float(rank) for rank in ranks)}
    return [Judgment(Prompt(_text(row)), tuple(samples), "ranking", scores, _annotator(row))]


def _ranked_rows(source: _Source, rows: Sequence[Row]) -> list[Judgment]:
    """The rows of a prompt of ImageRewardDB."""
    samples = [source.sample(row["image"] if "image" in row else row["image_path"]) for row in rows]
    judgments, prompt = list[Judgment](), Prompt(_text(rows[0]))
    if len(rows) > 1:
        scores = {OVERALL: tuple(-float(row["rank"]) for row in rows)}
        judgments.append(Judgment(prompt, tuple(samples), "ranking", scores))
    for row, sample in zip(rows, samples, strict=True):
        ratings = {name: (float(row[column]),) for name, column in _RATINGS.items() if row.get(column) is not None}
        if ratings:
            judgments.append(Judgment(prompt, (sample,), "rating", ratings))
    return judgments


def _decided_pair(source: _Source, row: Row) -> list[Judgment]:
    """A row of RewardBench, which has a column for the better sample and one for the other."""
    samples = [source.sample(row[side], row.get(f"{side}_model")) for side in ("chosen", "rejected")]
    pair = _pair(row, samples, 1.0, 0.0, {"subset": row["subset"]} if row.get("subset") else None)
    return [replace(pair, shown=None)]


def _responses(source: _Source, row: Row) -> list[Judgment]:
    """A row of MMRB 2, skipped unless its prompt is a text and each response one image."""
    content = row["prompt_content"]
    responses = [row[f"response_{side}"] for side in ("a", "b")]
    images = [[value for kind, value in response["response_content"] if kind == "image"] for response in responses]
    if any(kind != "text" for kind, _ in content) or any(len(own) != 1 for own in images):
        source.notes["are skipped: they have images in the prompt, or not one in each response"] += 1
        return []
    if row["chosen"] not in ("A", "B"):
        raise ValueError(f"its chosen is {row['chosen']!r}, so the winner is unknown: give A or B")
    samples = [source.sample(own[0], response.get("model")) for own, response in zip(images, responses, strict=True)]
    first = float(row["chosen"] == "A")
    subset = {"subset": row["prompt_source"]} if row.get("prompt_source") else None
    return [_pair({"prompt": "\n".join(text for _, text in content)}, samples, first, 1 - first, subset)]


def _ratings(source: _Source, row: Row) -> list[Judgment]:
    """A row of VideoFeedback's layout, of a video's frames, an image or a sound."""
    frames = row.get("images") or [row[name] for name in ("image", "audio") if row.get(name) is not None]
    if not frames:
        raise ValueError("it has no image or audio file; of a video, list the frames under images")
    scores = {
        name: (float(value),)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_DIMENSION
    }
    if len(frames) > 1:
        source.notes[f"are of videos: the middle frame stands for each, without {' and '.join(_OF_MOTION)}"] += 1
        scores = {name: value for name, value in scores.items() if name not in _OF_MOTION}
    if not scores:
        raise ValueError("it has no rating: give a number under the name of each dimension")
    return [Judgment(Prompt(_text(row)), (source.sample(frames[len(frames) // 2]),), "rating", scores, _annotator(row))]


_LAYOUTS: Sequence[tuple[set[str], Callable[[_Source, Any], list[Judgment]]]] = (
    ({"samples"}, _own_judgment),
    ({"label_0", "jpg_0"}, _labeled_pair),
    ({"label_0", "image_0"}, _labeled_pair),
    ({"human_preference"}, _choice),
    ({"rank"}, _ranking),
    ({"ranking"}, _ranking),
    ({"response_a", "response_b"}, _responses),
    ({"chosen", "rejected"}, _decided_pair),
    ({"text prompt"}, _ratings),
)
"""The columns by which a layout is recognized, and what reads its rows."""


def _pair(
    row: Row, samples: Sequence[JudgedSample], first: float, second: float, metadata: Metadata | None = None
) -> Judgment:
    scores = {OVERALL: (first, second)}
    return Judgment(Prompt(_text(row), metadata), tuple(samples), "pair", scores, _annotator(row))


def _text(row: Row) -> str:
    text = next((row[name] for name in _TEXTS if isinstance(row.get(name), str)), None)
    if text is None:
        raise ValueError(f"it has no prompt: give a text under {', '.join(_TEXTS)}")
    return str(text)


def _annotator(row: Row) -> str | None:
    return next((str(row[name]) for name in _ANNOTATORS if row.get(name) is not None), None)


def _listed(source: _Source, row: Row) -> list[JudgedSample]:
    names = next((row[name] for name in _FILES if isinstance(row.get(name), list)), None)
    if names is None:
        raise ValueError(f"it has no list of files under {', '.join(_FILES)}")
    return [source.sample(name) for name in names]


def _require_as_many(samples: Sequence[JudgedSample], values: Sequence[Any]) -> None:
    if len(samples) != len(values) or len(values) < 2:
        raise ValueError(
            f"it has {len(samples)} images and {len(values)} labels: give as many, and two or more of them"
        )
