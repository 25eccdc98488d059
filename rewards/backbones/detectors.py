"""Object detectors of transformers, for rewards that check which objects are where.

GenEval's own detector is mmdet 2's Mask2Former (Swin-S, COCO instances), which does not install beside a current torch.
These detectors replace it: name the detector next to such scores, which are GenEval-style and not GenEval's. For the
original's scores run it on the images and read its results (``genalign.evaluation.geneval.upstream_results``).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from genalign.evaluation.geneval.grammar import with_article
from genalign.evaluation.geneval.scoring import Detection, Thresholds
from genalign.evaluation.geneval.vocabulary import OBJECTS
from genalign.runtime.media import eight_bits
from genalign.types import Precision

_MOST_INSTANCES = 100  # of an image, as in mmdet's configuration
_GENEVAL = Thresholds()
_OWL = Thresholds(confidence=0.2, counting=0.3, max_overlap=0.5)
_DINO = Thresholds(confidence=0.35, counting=0.35, max_overlap=0.5)


@dataclass(frozen=True, eq=False)
class Instance:
    """A detected object, and its pixels as a bool ``mask`` (H, W), None where the detector gives boxes only."""

    detection: Detection
    mask: Tensor | None = None


class Detector(Protocol):
    """A detector of objects: ``thresholds`` decide which count, and ``classes`` are detectable, None for any name."""

    @property
    def thresholds(self) -> Thresholds: ...

    @property
    def classes(self) -> Sequence[str] | None: ...

    @property
    def description(self) -> Mapping[str, Any]:
        """Everything that its detections depend on, ready for JSON."""

    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        """Detect the objects in each image (B, 3, H, W) in [0, 1], in any order.

        They are at least those of the classes ``names`` (B lists) above the lower of the two score thresholds.
        """


def describe(part: Any) -> dict[str, Any]:
    """Describe a dataclass by its class name and its fields; weights in float32 go without saying."""
    settings = {name: value for name, value in asdict(part).items() if (name, value) != ("dtype", "float32")}
    return {"class": type(part).__name__, **settings}


@functools.cache
def _opened(model: str, auto: str, dtype: Precision) -> tuple[Any, Any]:
    """Open a checkpoint's frozen network by transformers' class ``auto``, and its processor, once per process.

    Raises FileNotFoundError for a missing checkpoint.
    """
    import transformers

    instances = auto == "AutoModelForUniversalSegmentation"
    processor = transformers.AutoImageProcessor if instances else transformers.AutoProcessor
    try:
        network = getattr(transformers, auto).from_pretrained(model, dtype=getattr(torch, dtype))
        return network.requires_grad_(False).eval(), processor.from_pretrained(model)
    except OSError as error:
        raise FileNotFoundError(
            f"the detector {model} is neither a checkpoint's folder nor in the local cache, and the Hub did not give"
            " it: check the name, or download it once while online"
        ) from error


@dataclass(frozen=True)
class TransformersDetector:
    """The settings that the detectors of this module share.

    ``model`` is a checkpoint's folder or Hub id, and ``dtype`` that of its weights.
    """

    model: str
    thresholds: Thresholds = _GENEVAL
    batch_size: int = 8
    dtype: Precision = "float32"
    classes: ClassVar[Sequence[str] | None] = None

    @property
    def description(self) -> Mapping[str, Any]:
        return describe(self)

    @property
    def lowest(self) -> float:
        """The score that an object must exceed to be detected."""
        return min(self.thresholds.confidence, self.thresholds.counting)


@dataclass(frozen=True)
class Mask2Former(TransformersDetector):
    """Mask2Former with Swin-S on COCO's 80 classes, the architecture and the thresholds of GenEval's detector.

    It differs from the original in its weights (those of the paper's authors, where mmdet trained its own), in resizing
    with antialiasing to multiples of 32 pixels where mmdet pads, and in one interpolation of the masks where mmdet has
    two. Scores and the choice of instances are mmdet's: the best 100 of all queries and classes, class probability
    times the mean probability of the mask.
    """

    model: str = "facebook/mask2former-swin-small-coco-instance"
    classes: ClassVar[Sequence[str] | None] = OBJECTS

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        """Detect the objects of all COCO classes above the lower threshold, whatever the names."""
        network, processor = _opened(self.model, "AutoModelForUniversalSegmentation", self.dtype)
        if network.config.num_labels != len(OBJECTS):
            raise ValueError(f"{self.model} has {network.config.num_labels} classes: give a COCO instance checkpoint")
        network.to(images.device)
        detected: list[list[Instance]] = []
        for part in torch.split(eight_bits(images), self.batch_size):
            pixels = processor(images=list(part), return_tensors="pt")["pixel_values"]
            output = network(pixel_values=pixels.to(images.device, network.dtype))
            classes, masks = output.class_queries_logits.float(), output.masks_queries_logits.float()
            detected += coco_instances(classes, masks, images.shape[-2:], self.lowest)
        return detected


def coco_instances(classes: Tensor, masks: Tensor, size: Sequence[int], lowest: float) -> list[list[Instance]]:
    """Select the objects of each of B images with a score above ``lowest``, as mmdet does.

    On a GPU the CPU waits twice for all of them: for the scores of their classes, and for those with their masks.

    Args:
        classes: logits (B, Q, 81) of the queries' classes, the last one for no object.
        masks: logits (B, Q, h, w) of their pixels.
        size: the images' height and width.
        lowest: the score that an object must exceed.
    """
    scores = classes.softmax(-1)[..., :-1].flatten(1)
    best, index = scores.topk(min(_MOST_INSTANCES, scores.shape[1]))
    likely = (best > lowest).cpu()  # a score only falls when the mask's is multiplied in, and the best come first
    covered, measured = [], []
    for image_masks, image_best, image_index, count in zip(masks, best, index, likely.sum(1).tolist(), strict=True):
        queries = image_index[:count]
        logits = image_masks[queries // len(OBJECTS)]
        if count:
            logits = interpolate(logits[None], tuple(size), mode="bilinear", align_corners=False)[0]
        mask = logits > 0
        inside = (logits.sigmoid() * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) + 1e-6)
        columns, lines = mask.any(1).byte(), mask.any(2).byte()
        left, top = columns.argmax(1), lines.argmax(1)
        right, bottom = (hit.shape[1] - hit.flip(1).argmax(1) for hit in (columns, lines))  # one pixel beyond
        covered.append(mask)
        measured.append(torch.stack([image_best[:count] * inside, queries % len(OBJECTS), left, top, right, bottom], 1))
    numbers = torch.split(torch.cat(measured).cpu(), [len(mask) for mask in covered])
    return [
        [
            Instance(Detection(OBJECTS[int(label)], (x1, y1, x2, y2), score), mask)
            for (score, label, x1, y1, x2, y2), mask in zip(rows.tolist(), masks_of_image, strict=True)
            if score > lowest  # then the mask covers at least one pixel
        ]
        for rows, masks_of_image in zip(numbers, covered, strict=True)
    ]


@dataclass(frozen=True)
class OpenVocabularyDetector(TransformersDetector, ABC):
    """A detector of classes by their names, beyond COCO's; it gives boxes without masks."""

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
        """Detect objects of the classes ``names`` of their image, each as the most likely one."""
        network, processor = _opened(self.model, "AutoModelForZeroShotObjectDetection", self.dtype)
        network.to(images.device)
        pixels = eight_bits(images)
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, classes in enumerate(names):
            groups.setdefault(tuple(dict.fromkeys(classes)), []).append(row)
        detected: list[list[Instance]] = [[] for _ in names]
        for group, rows in groups.items():
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                part = torch.stack([pixels[row] for row in batch])
                scores, labels, boxes = self._match(network, processor, part, group)
                matches = torch.cat([scores[..., None], labels[..., None], boxes], -1).float().cpu()
                matches[..., 2:] = self._corners(matches[..., 2:], images.shape[-2:])
                for row, matches_of_image in zip(batch, matches, strict=True):
                    sure = matches_of_image[matches_of_image[:, 0] > self.lowest]
                    objects = [group[int(label)] for label in sure[:, 1]]
                    detected[row] = _instances(objects, sure[:, 0], sure[:, 2:], images.shape[-2:])
        return detected

    @abstractmethod
    def _match(
        self, network: Any, processor: Any, images: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Match images (B, 3, H, W) with names: scores and labels of the best names (B, n), and boxes (B, n, 4).

        Boxes are centers and sizes relative to the image, or to the square that holds it.
        """

    def _corners(self, boxes: Tensor, size: Sequence[int]) -> Tensor:
        """Convert the boxes (..., 4) of an image of height and width ``size`` to corners in pixels."""
        return _corners(boxes, size[1], size[0])


@dataclass(frozen=True)
class Owlv2(OpenVocabularyDetector):
    """OWLv2 (arXiv:2306.09683), which detects classes by their names, beyond COCO's.

    It gives boxes without masks, so colors are judged with their surroundings, and its scores are on another scale
    than GenEval's: the thresholds are round numbers, not fitted to anything. Overlapping boxes of a class are dropped,
    which GenEval need not do.
    """

    model: str = "google/owlv2-base-patch16-ensemble"
    thresholds: Thresholds = _OWL

    def _match(
        self, network: Any, processor: Any, images: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries = [f"a photo of {with_article(name)}" for name in names]
        inputs = processor(text=[queries] * len(images), images=list(images), truncation=True, return_tensors="pt")
        output = network(**_sent(inputs, network))
        best, label = output.logits.float().max(-1)
        return best.sigmoid(), label, output.pred_boxes

    def _corners(self, boxes: Tensor, size: Sequence[int]) -> Tensor:
        return _corners(boxes, max(size), max(size))  # it pads images to squares


@dataclass(frozen=True)
class GroundingDino(OpenVocabularyDetector):
    """Grounding DINO (arXiv:2303.05499), which detects classes by their names, without masks as ``Owlv2``.

    The thresholds are its authors' usual ones, not fitted to GenEval. A box has the class whose words it matches best.
    """

    model: str = "IDEA-Research/grounding-dino-tiny"
    thresholds: Thresholds = _DINO

    def _match(
        self, network: Any, processor: Any, images: Tensor, names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        text, tokens = _caption(processor.tokenizer, names)
        pixels = processor.image_processor(images=list(images), return_tensors="pt")
        words = {key: value.expand(len(images), -1) for key, value in text.items()}
        output = network(**_sent({**pixels, **words}, network))
        logits = output.logits.float()
        scores = torch.stack([logits[..., place].sigmoid().amax(-1) for place in tokens], dim=-1)
        return *scores.max(-1), output.pred_boxes


def _sent(inputs: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Move inputs to the network's device, and pixels to the dtype of its weights."""
    moved = {name: tensor.to(network.device, non_blocking=True) for name, tensor in inputs.items()}
    return {name: tensor.to(network.dtype) if tensor.is_floating_point() else tensor for name, tensor in moved.items()}


def _caption(tokenizer: Any, names: Sequence[str]) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Tokenize "dog. wine glass." as (1, L), and return which tokens belong to each name."""
    text = " ".join(f"{name}." for name in names)
    tokens = tokenizer(text, return_tensors="pt", return_offsets_mapping=True, return_token_type_ids=True)
    offsets = tokens.pop("offset_mapping")[0].tolist()
    starts = [sum(len(other) + 2 for other in names[:i]) for i in range(len(names))]
    places = [
        [i for i, (first, last) in enumerate(offsets) if start <= first < last <= start + len(name)]
        for start, name in zip(starts, names, strict=True)
    ]
    return dict(tokens), places


def _corners(boxes: Tensor, width: int, height: int) -> Tensor:
    """Convert relative centers and sizes (..., 4) to the left, top, right and bottom in pixels (..., 4)."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], -1) * boxes.new_tensor([width, height, width, height])


def _instances(names: Sequence[str], scores: Tensor, boxes: Tensor, size: Sequence[int]) -> list[Instance]:
    """Turn boxes (n, 4) into instances, cut at the border of the image (height, width); boxes beyond it are dropped."""
    height, width = size
    cut = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height])).tolist()
    return [
        Instance(Detection(name, (x1, y1, x2, y2), score))
        for name, (x1, y1, x2, y2), score in zip(names, cut, scores.tolist(), strict=True)
        if x1 < x2 and y1 < y2
    ]
