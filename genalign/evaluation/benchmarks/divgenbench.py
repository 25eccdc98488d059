"""DivGenBench (D2-Align, arXiv:2512.24146): the diversity of faces, styles, layouts and tones over many images."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from torch import Tensor

from genalign.evaluation.benchmarks.benchmark import (
    LEFT_OUT,
    MISSING,
    Benchmark,
    Judges,
    average,
    by_prompt,
    distinct_prompts,
    require_metadata,
)
from genalign.evaluation.benchmarks.boxes import detect, iou, require_classes
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.geneval.grammar import NUMBERS, plural
from genalign.evaluation.geneval.scoring import Box
from genalign.evaluation.geneval.vocabulary import OBJECTS, natural_plural
from genalign.evaluation.scorers import ExplainedScores
from genalign.runtime.media import image_files, read_image
from genalign.runtime.prompt_files import load_prompts
from genalign.types import FeatureFunction, Prompt, PromptSet

DIMENSIONS = ("id", "style", "layout", "tonal")
_JUDGES = {"id": ("faces",), "style": ("style", "style_train", "style_test"), "layout": ("detector",), "tonal": ()}
_SINGULARS = {form(name): name for name in OBJECTS for form in (plural, natural_plural)}
_COUNTED = re.compile(
    rf"\b(?:{'|'.join(NUMBERS)}) ({'|'.join(sorted(_SINGULARS, key=len, reverse=True))})\b", re.IGNORECASE
)


def read_divgenbench(paths: Sequence[Path]) -> PromptSet:
    """Read files id, style, layout and tonal of prompts, or tables whose column ``dimension`` says which it is.

    The metadata of layouts has the ``object`` to detect, which is read from "four cups" where a row has none. Raises
    ValueError for another dimension, and a layout without a number of COCO's objects.
    """
    prompts: list[Prompt] = []
    for path in paths:
        for number, prompt in enumerate(load_prompts(path).prompts, start=1):
            row = dict(prompt.metadata or {})
            dimension = str(row.get("dimension") or path.stem).lower()
            if dimension not in DIMENSIONS:
                raise ValueError(f"{path}, prompt {number}: {dimension!r} is no dimension: {', '.join(DIMENSIONS)}")
            row |= {"tag": dimension, "prompt": prompt.text}
            if dimension == "layout" and "object" not in row:
                match = _COUNTED.search(prompt.text)
                if match is None:
                    raise ValueError(f"{path}, prompt {number}: give the object of {prompt.text!r} in a table")
                row["object"] = _SINGULARS[match[1].lower()]
            prompts.append(Prompt(prompt.text, row))
    return distinct_prompts("divgenbench", prompts)


@dataclass(frozen=True)
class DiversityScorer:
    """1 for an image that could be measured, else NaN: diversity is a number of many images.

    The details are the features of a face, the nearest image to a style, boxes relative to the image's size, or the
    mean saturation, mean value and contrast.
    """

    judges: Judges

    @cached_property
    def styles(self) -> StyleNeighbors:
        """The nearest images of a style, whose features are computed at the first need."""
        needed = (self.judges.need(name) for name in _JUDGES["style"])
        return StyleNeighbors(*needed)

    def __call__(self, samples: Tensor, prompts: Sequence[Prompt]) -> ExplainedScores:
        """Measure images (B, 3, H, W) in [0, 1]."""
        details: list[Any] = [None] * len(prompts)
        finite = samples.isfinite().flatten(1).all(1).tolist()
        for dimension in DIMENSIONS:
            rows = [row for row, prompt in enumerate(prompts) if finite[row] and prompt.task == dimension]
            if rows:
                values = self._measure(dimension, samples[rows], [prompts[row] for row in rows])
                for row, value in zip(rows, values, strict=True):
                    details[row] = value
        scores = [math.nan if detail is None else 1.0 for detail in details]
        return ExplainedScores(torch.tensor(scores), details)

    def _measure(self, dimension: str, images: Tensor, prompts: Sequence[Prompt]) -> Sequence[Any]:
        if dimension == "id":
            features = self.judges.need("faces")(images).float().cpu()
            return [row.tolist() if bool(row.isfinite().all()) else None for row in features]
        if dimension == "style":
            return self.styles.details(images)
        if dimension == "layout":
            return _layouts(self.judges, images, prompts)
        return tones(images).tolist()


def _layouts(judges: Judges, images: Tensor, prompts: Sequence[Prompt]) -> list[list[list[float]] | None]:
    """Detect the boxes of each prompt's object, relative to the image's size."""
    names = [[str(require_metadata(prompt, "object"))] for prompt in prompts]
    height, width = images.shape[-2:]
    scale = np.array([width, height, width, height])
    return [
        None if objects is None else [(np.array(item.box) / scale).round(5).tolist() for item in objects]
        for objects in detect(judges.need("detector"), images, names)
    ]


def tones(images: Tensor) -> Tensor:
    """Compute mean saturation, mean value (of HSV) and the standard deviation of gray, (B, 3) for (B, 3, H, W)."""
    images = images.float().clamp(0, 1)
    value, least = images.amax(1), images.amin(1)
    saturation = torch.where(value > 0, (value - least) / value.clamp(min=1e-12), 0.0)
    gray = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    columns = [saturation.flatten(1).mean(1), value.flatten(1).mean(1), gray.flatten(1).std(1, correction=0)]
    return torch.stack(columns, dim=1).cpu()


@dataclass(frozen=True)
class StyleNeighbors:
    """The nearest of the images in a folder, by the cosine of an encoder's features."""

    encoder: FeatureFunction
    train: Path
    test: Path

    def details(self, images: Tensor) -> list[dict[str, Any] | None]:
        """Return the nearest image, how many there are, and the score of the folder ``test``; None without features."""
        nearest = self._nearest(images)
        constants = {"images": len(self._features), "reference": self._reference}
        return [None if row is None else {"nearest": row, **constants} for row in nearest]

    @cached_property
    def _features(self) -> Tensor:
        """Unit features (n, d) of the images in ``train``, read one by one since sizes differ."""
        rows = [self.encoder(read_image(path)[None]).float().cpu() for path in image_files(self.train)]
        return F.normalize(torch.cat(rows), dim=-1)

    @cached_property
    def _reference(self) -> float:
        files = image_files(self.test)
        return retrieval_score(
            [row for path in files for row in self._nearest(read_image(path)[None])], len(self._features)
        )

    @torch.no_grad()
    def _nearest(self, images: Tensor) -> list[int | None]:
        features = F.normalize(self.encoder(images).float().cpu(), dim=-1)
        nearest = (features @ self._features.T).argmax(1).tolist()
        return [row if bool(feature.isfinite().all()) else None for row, feature in zip(nearest, features, strict=True)]


def retrieval_score(nearest: Sequence[int | None], train: int) -> float:
    """Estimate IRS_infinity: the share of ``train`` images that would be nearest to one of infinitely many samples.

    If a model draws uniformly from s of them, the probability of k distinct ones in n draws is greatest where
    log s! - log (s - k)! - n log s is; s is the whole number from k to ``train`` that maximizes it. NaN for no draw.
    """
    drawn = [row for row in nearest if row is not None]
    if not drawn:
        return math.nan
    distinct, total = len(set(drawn)), len(drawn)
    sizes = np.arange(distinct, train + 1)
    likelihood = gammaln(sizes + 1) - gammaln(sizes - distinct + 1) - total * np.log(sizes)
    return float(sizes[likelihood.argmax()] / train)


def layout_similarity(a: Sequence[Box], b: Sequence[Box]) -> float:
    """Compute the overlaps of the best one-to-one match of boxes over the larger number of boxes; NaN for no box."""
    if not a and not b:
        return math.nan
    overlaps = np.array([[iou(one, other) for other in b] for one in a]).reshape(len(a), len(b))
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return float(overlaps[rows, columns].sum()) / max(len(a), len(b))


def mean_cosine(features: Sequence[Sequence[float]]) -> float:
    """Compute the mean cosine over all pairs of features; NaN for fewer than two."""
    count = len(features)
    if count < 2:
        return math.nan
    unit = F.normalize(torch.tensor(features, dtype=torch.float64), dim=-1)
    return float((unit.sum(0).square().sum() - count) / (count * (count - 1)))


def aggregate_divgenbench(records: Sequence[SampleRecord], prompts: PromptSet) -> dict[str, float]:
    """Compute the numbers of the dimensions that there are: ids (lower is more diverse), asc, sdi and pvs.

    ids, asc and pvs (the sum of the standard deviations of saturation, value and contrast) are over all images of their
    dimension; sdi is one minus the mean similarity of the layouts of a prompt's images, averaged over prompts.
    """
    measured: dict[str, list[Any]] = {}
    similarities, empty, missing = list[float](), 0, 0
    for prompt, rows in by_prompt(records, prompts):
        details = [row.details.get("measured") for row in rows]
        present = [detail for detail in details if detail is not None]
        missing += len(details) - len(present)
        measured.setdefault(prompt.task, []).extend(present)
        if prompt.task == "layout":
            pairs = [layout_similarity(a, b) for a, b in combinations(present, 2)]
            empty += sum(map(math.isnan, pairs))
            similarities.append(average(pairs))
    coverage, styles = math.nan, measured.get("style", [])
    if styles:
        score = retrieval_score([style["nearest"] for style in styles], styles[0]["images"])
        coverage = float(score / styles[0]["reference"])  # over that of the folder of real images
    numbers: Mapping[str, tuple[str, float]] = {
        "id": ("ids", mean_cosine(measured.get("id", ()))),
        "style": ("asc", coverage),
        "layout": ("sdi", 1 - average(similarities)),
        "tonal": ("pvs", float(np.std(measured["tonal"], axis=0).sum()) if measured.get("tonal") else math.nan),
    }
    counts = {MISSING: float(missing), LEFT_OUT: float(missing)}
    if "layout" in measured:
        counts = {"pairs without objects": float(empty), **counts}
    return {name: value for dimension, (name, value) in numbers.items() if dimension in measured} | counts


def _needs(prompts: PromptSet, judges: Judges) -> tuple[str, ...]:
    """Return the judges of the dimensions. Raises ValueError for objects that the detector cannot detect."""
    dimensions = Counter(prompt.task for prompt in prompts.prompts)
    layouts = [prompt for prompt in prompts.prompts if prompt.task == "layout"]
    require_classes(judges, [str(require_metadata(prompt, "object")) for prompt in layouts])
    return tuple(name for dimension in DIMENSIONS if dimension in dimensions for name in _JUDGES[dimension])


DIVGENBENCH = Benchmark(
    name="divgenbench",
    read=read_divgenbench,
    needs=_needs,
    scorers=lambda judges: {"measured": DiversityScorer(judges)},
    aggregate=aggregate_divgenbench,
    rules=(
        "divgenbench-1: ids, asc and pvs over all images of a dimension, sdi over pairs of images of a prompt;"
        " population standard deviations of HSV and Rec. 601 gray in [0, 1]; pairs of images without boxes are left"
        " out; the encoder of faces stands for ArcFace, that of styles for CSD, the detector for Grounding DINO"
    ),
    images=4,
)
