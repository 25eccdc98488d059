"""Object detectors by transformers, for rewards that look at what is where; it is imported when one is opened.

GenEval's own detector is mmdet 2's Mask2Former (Swin-S, COCO instances), which does not install beside a current torch.
What is here stands in for it: numbers are GenEval-style, by the detector that they name, and not GenEval's. For the
original's numbers let it judge the images and read its results (``genalign.evaluation.geneval.upstream_results``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from genalign.evaluation.geneval.grammar import with_article
from genalign.evaluation.geneval.scoring import Box, Detection, Thresholds
from genalign.evaluation.geneval.vocabulary import OBJECTS
from genalign.runtime.media import eight_bits

_MOST_INSTANCES = 100  # of an image, as in mmdet's configuration
_GENEVAL = Thresholds()
_OWL = Thresholds(confidence=0.2, counting=0.3, max_overlap=0.5)
_DINO = Thresholds(confidence=0.35, counting=0.35, max_overlap=0.5)


@dataclass(frozen=True, eq=False)
class Instance:
    """A detected object and its pixels, bool (H, W); None where the detector gives its box alone."""

    detection: Detection
    mask: Tensor | None = None


class Detector(Protocol):
    """Finds objects; ``thresholds`` say which of them count, ``classes`` what it can find: None for all that has a
    name."""

    @property
    def thresholds(self) -> Thresholds: ...

    @property
    def classes(self) -> Sequence[str] | None: ...

    @property
    def description(self) -> Mapping[str, Any]:
        """Everything that its findings depend on, ready for JSON."""

    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        """The objects in each image (B, 3, H, W) in [0, 1], at least those of the classes ``names`` (B) above the lower
        of the two score thresholds, in any order."""


def describe(part: Any) -> dict[str, Any]:
    """A dataclass as its class name and its fields."""
    return {"class": type(part).__name__, **asdict(part)}


def _lowest(thresholds: Thresholds) -> float:
    return min(thresholds.confidence, thresholds.counting)


@functools.cache
def _opened(model: str, auto: str) -> tuple[Any, Any]:
    """A checkpoint's network, frozen, and its processor; once per process. ``auto`` is transformers' Auto class.

    Raises FileNotFoundError where there is none.
    """
    import transformers

    instances = auto == "AutoModelForUniversalSegmentation"
    processor = transformers.AutoImageProcessor if instances else transformers.AutoProcessor
    try:
        network = getattr(transformers, auto).from_pretrained(model, dtype=torch.float32)
        return network.requires_grad_(False).eval(), processor.from_pretrained(model)
    except OSError as error:
        raise FileNotFoundError(
            f"the detector {model} is neither a checkpoint's folder nor in the local cache, and the Hub did not give"
            " it: check the name, or download it once while online"
        ) from error


@dataclass(frozen=True)
class Mask2Former:
    """Mask2Former with Swin-S on COCO's 80 classes, the architecture and the thresholds of GenEval's detector.

    It differs from the original in its weights (those of the paper's authors, where mmdet trained its own), in resizing
    with antialiasing to multiples of 32 pixels where mmdet pads, and in one interpolation of the masks where mmdet has
    two. Scores and the choice of instances are mmdet's: the best 100 of all queries and classes, class probability
    times the mean probability of the mask. ``model`` is a folder or Hub id.
    """

    model: str = "facebook/mask2former-swin-small-coco-instance"
    thresholds: Thresholds = _GENEVAL
    batch_size: int = 8

    @property
    def classes(self) -> Sequence[str] | None:
        return OBJECTS

    @property
    def description(self) -> Mapping[str, Any]:
        return describe(self)

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        """Every object of any of COCO's classes above the lower threshold, whatever the names."""
        network, processor = _opened(self.model, "AutoModelForUniversalSegmentation")
        if network.config.num_labels != len(OBJECTS):
            raise ValueError(f"{self.model} has {network.config.num_labels} classes: give a COCO instance checkpoint")
        network.to(images.device)
        found: list[list[Instance]] = []
        for part in torch.split(eight_bits(images), self.batch_size):
            pixels = processor(images=list(part), return_tensors="pt")["pixel_values"]
            output = network(pixel_values=pixels.to(images.device))
            outputs = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
            found += [coco_instances(*logits, images.shape[-2:], _lowest(self.thresholds)) for logits in outputs]
        return found


def coco_instances(classes: Tensor, masks: Tensor, size: Sequence[int], lowest: float) -> list[Instance]:
    """The objects of one image with a score above ``lowest``.

    ``classes`` (Q, 81) and ``masks`` (Q, h, w) are logits, ``size`` the image's height and width.
    """
    scores = classes.softmax(-1)[:, :-1].flatten()
    best, index = scores.topk(min(_MOST_INSTANCES, len(scores)))
    index = index[best > lowest]  # a score only falls when the mask's is multiplied in
    if len(index) == 0:
        return []
    logits = interpolate(masks[index // len(OBJECTS)][None], tuple(size), mode="bilinear", align_corners=False)[0]
    covered = logits > 0
    inside = (logits.sigmoid() * covered).flatten(1).sum(1) / (covered.flatten(1).sum(1) + 1e-6)
    final = (best[: len(index)] * inside).tolist()
    labels = (index % len(OBJECTS)).tolist()
    return [
        Instance(Detection(OBJECTS[labels[i]], _extent(covered[i]), final[i]), covered[i])
        for i in range(len(index))
        if final[i] > lowest
    ]


def _extent(mask: Tensor) -> Box:
    """The half-open box of a mask that covers at least a pixel."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@dataclass(frozen=True)
class Owlv2:
    """OWLv2 (arXiv:2306.09683), which finds what is named in words, so that classes beyond COCO's can be asked for.

    It gives boxes without masks, so that colours are judged with their surroundings, and its scores are of another
    scale than GenEval's: the thresholds here are round numbers and not fitted to anything; overlapping boxes of a class
    are dropped, which GenEval need not do.
    """

    model: str = "google/owlv2-base-patch16-ensemble"
    thresholds: Thresholds = _OWL
    batch_size: int = 8

    @property
    def classes(self) -> Sequence[str] | None:
        return None

    @property
    def description(self) -> Mapping[str, Any]:
        return describe(self)

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        """Objects of the classes that are asked for in their image, each as the one it is likest."""
        network, processor = _opened(self.model, "AutoModelForZeroShotObjectDetection")
        network.to(images.device)

        def detect(part: Tensor, asked: Sequence[str]) -> list[list[Instance]]:
            queries = [f"a photo of {with_article(name)}" for name in asked]
            inputs = processor(text=[queries] * len(part), images=list(part), truncation=True, return_tensors="pt")
            output = network(**inputs.to(images.device))
            found = processor.post_process_grounded_object_detection(
                output, threshold=_lowest(self.thresholds), target_sizes=[tuple(part.shape[-2:])] * len(part)
            )
            named = [[asked[label] for label in item["labels"].tolist()] for item in found]
            return [_boxes(item["boxes"], item["scores"], n, part) for item, n in zip(found, named, strict=True)]

        return _by_names(eight_bits(images), names, self.batch_size, detect)


@dataclass(frozen=True)
class GroundingDino:
    """Grounding DINO (arXiv:2303.05499), open in its classes; as for ``Owlv2``, without masks and with thresholds that
    are its authors' usual ones and not fitted to GenEval. A box has the class whose words it is likest."""

    model: str = "IDEA-Research/grounding-dino-tiny"
    thresholds: Thresholds = _DINO
    batch_size: int = 8

    @property
    def classes(self) -> Sequence[str] | None:
        return None

    @property
    def description(self) -> Mapping[str, Any]:
        return describe(self)

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        """Objects of the classes that are asked for in their image, each as the one it is likest."""
        network, processor = _opened(self.model, "AutoModelForZeroShotObjectDetection")
        network.to(images.device)

        def detect(part: Tensor, asked: Sequence[str]) -> list[list[Instance]]:
            text, tokens = _caption(processor.tokenizer, asked)
            pixels = processor.image_processor(images=list(part), return_tensors="pt")
            words = {key: value.expand(len(part), -1) for key, value in text.items()}
            inputs = {key: value.to(images.device) for key, value in (*pixels.items(), *words.items())}
            output = network(**inputs)
            scores = torch.stack([output.logits[..., place].sigmoid().amax(-1) for place in tokens], dim=-1)
            return [
                _likest(s, b, asked, part, _lowest(self.thresholds))
                for s, b in zip(scores, output.pred_boxes, strict=True)
            ]

        return _by_names(eight_bits(images), names, self.batch_size, detect)


def _caption(tokenizer: Any, names: Sequence[str]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """The tokens (1, L) of "dog. wine glass." and which of them are each name's."""
    text = " ".join(f"{name}." for name in names)
    made = tokenizer(text, return_tensors="pt", return_offsets_mapping=True, return_token_type_ids=True)
    offsets = made.pop("offset_mapping")[0].tolist()
    starts = [sum(len(other) + 2 for other in names[:i]) for i in range(len(names))]
    places = [
        [i for i, (first, last) in enumerate(offsets) if start <= first < last <= start + len(name)]
        for start, name in zip(starts, names, strict=True)
    ]
    return dict(made), places


def _likest(scores: Tensor, centred: Tensor, names: Sequence[str], image: Tensor, lowest: float) -> list[Instance]:
    """Boxes whose best score (n, names) is above ``lowest``, from centres and sizes relative to the image (n, 4)."""
    best, label = scores.max(-1)
    sure = best > lowest
    centre, half = centred[sure, :2], centred[sure, 2:] / 2
    height, width = image.shape[-2:]
    scale = centred.new_tensor([width, height, width, height])
    boxes = torch.cat([centre - half, centre + half], dim=1) * scale
    return _boxes(boxes, best[sure], [names[i] for i in label[sure].tolist()], image)


def _boxes(boxes: Tensor, scores: Tensor, names: Sequence[str], image: Tensor) -> list[Instance]:
    """Boxes (n, 4) in pixels, cut at the border of the images (..., H, W); one beyond it is left out."""
    height, width = image.shape[-2:]
    limits = boxes.new_tensor([width, height, width, height])
    cut = boxes.clamp(min=0).minimum(limits).tolist()
    return [
        Instance(Detection(name, (x1, y1, x2, y2), score))
        for name, (x1, y1, x2, y2), score in zip(names, cut, scores.tolist(), strict=True)
        if x1 < x2 and y1 < y2
    ]


def _by_names(
    images: Tensor,
    names: Sequence[Sequence[str]],
    batch_size: int,
    detect: Callable[[Tensor, Sequence[str]], list[list[Instance]]],
) -> list[list[Instance]]:
    """``detect`` on batches of images in which the same classes are asked for."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, asked in enumerate(names):
        groups.setdefault(tuple(dict.fromkeys(asked)), []).append(row)
    found: list[list[Instance]] = [[] for _ in names]
    for names_of, rows in groups.items():
        for part in _parts(rows, batch_size):
            for row, instances in zip(part, detect(images[part], names_of), strict=True):
                found[row] = instances
    return found


def _parts(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(rows), size):
        yield list(rows[first : first + size])
