from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    GroundingDinoForObjectDetection,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2ForObjectDetection,
)

from genalign.evaluation.geneval.scoring import Thresholds
from genalign.evaluation.geneval.vocabulary import OBJECTS
from genalign.runtime.media import eight_bits
from rewards.backbones.detectors import (
    GroundingDino,
    Instance,
    Mask2Former,
    Owlv2,
    _caption,
    coco_instances,
)
from tests.rewards import tiny_detectors

ALL = Thresholds(confidence=0.0, counting=0.0)
SOME = Thresholds(confidence=0.05, counting=0.1)
NOTHING = -20.0
KINDS = (Mask2Former, Owlv2, GroundingDino)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root: Path = tmp_path_factory.mktemp("detectors")
    makers = (tiny_detectors.mask2former, tiny_detectors.owlv2, tiny_detectors.grounding_dino)
    return {kind.__name__: make(root / kind.__name__) for kind, make in zip(KINDS, makers, strict=True)}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def boxes(detected: list[Instance]) -> list[tuple[str, tuple[float, ...]]]:
    return sorted((item.detection.name, tuple(round(v, 2) for v in item.detection.box)) for item in detected)


# --- Mask2Former ------------------------------------------------------------------------------------------------------


def logits(*queries: tuple[int, float, slice, slice]) -> tuple[torch.Tensor, torch.Tensor]:
    """A query of one image for each (class, its probability, rows, columns): sure of its pixels, on an 8 x 10 grid."""
    classes, masks = torch.full((len(queries), 81), NOTHING), torch.full((len(queries), 8, 10), NOTHING)
    for query, (label, probability, rows, columns) in enumerate(queries):
        classes[query, label] = torch.tensor(probability).logit()
        classes[query, 80] = 0
        masks[query, rows, columns] = 20
    return classes[None], masks[None]


def test_instances_are_read_from_masks() -> None:
    dog, cat = (16, 0.9, slice(2, 6), slice(1, 4)), (15, 0.6, slice(0, 8), slice(5, 10))
    [detected] = coco_instances(*logits(dog, cat, (0, 0.2, slice(0, 2), slice(0, 2))), (8, 10), 0.3)
    assert [item.detection.name for item in detected] == ["dog", "cat"]
    assert [item.detection.box for item in detected] == [(1, 2, 4, 6), (5, 0, 10, 8)]
    assert [item.detection.score for item in detected] == pytest.approx([0.9, 0.6], abs=1e-5)
    assert detected[0].mask is not None and detected[0].mask.sum() == 12


def test_masks_are_enlarged_to_the_image() -> None:
    [detected] = coco_instances(*logits((16, 0.9, slice(2, 6), slice(0, 10))), (32, 40), 0.3)
    assert detected[0].mask is not None and detected[0].mask.shape == (32, 40)
    assert detected[0].detection.box == (0, 8, 40, 24)


def test_an_unsure_mask_lowers_the_score() -> None:
    classes, masks = logits((16, 0.8, slice(2, 6), slice(1, 4)))
    masks[0, 0, 2:6, 1:4] = torch.tensor(0.75).logit()
    assert coco_instances(classes, masks, (8, 10), 0.3)[0][0].detection.score == pytest.approx(0.6, abs=1e-5)
    assert coco_instances(classes, masks, (8, 10), 0.61) == [[]]


def test_a_query_without_pixels_is_no_instance() -> None:
    assert coco_instances(*logits((16, 0.9, slice(0, 0), slice(0, 0))), (8, 10), 0.0) == [[]]
    assert coco_instances(*logits(), (8, 10), 0.0) == [[]]


def test_one_query_may_be_two_classes() -> None:
    classes, masks = logits((16, 0.5, slice(2, 6), slice(1, 4)))
    classes[0, 0, 15] = classes[0, 0, 16]
    [detected] = coco_instances(classes, masks, (8, 10), 0.2)
    assert sorted(item.detection.name for item in detected) == ["cat", "dog"]


def test_a_real_mask2former_agrees_with_its_own_postprocessing(folders: dict[str, str]) -> None:
    """transformers enlarges masks to 384 x 384 alone, which is ours for images of that size."""
    images = torch.rand(2, 3, 384, 384, generator=torch.Generator().manual_seed(1))
    ours = Mask2Former(folders["Mask2Former"], ALL)(images, [["dog"], ["cat"]])
    processor = Mask2FormerImageProcessor.from_pretrained(folders["Mask2Former"])
    network = Mask2FormerForUniversalSegmentation.from_pretrained(folders["Mask2Former"]).eval()
    with torch.no_grad():
        output = network(**processor(images=list(eight_bits(images)), return_tensors="pt"))
    theirs = processor.post_process_instance_segmentation(output, threshold=0.05, return_binary_maps=True)
    for detected, expected in zip(ours, theirs, strict=True):
        assert len(expected["segments_info"]) == 10  # as many as queries, where mmdet and we take the best 100
        for reference in expected["segments_info"]:
            item = min(detected, key=lambda item: abs(item.detection.score - reference["score"]))
            assert item.detection.score == pytest.approx(reference["score"], abs=1e-5)
            assert OBJECTS.index(item.detection.name) == reference["label_id"]
            assert item.mask is not None and torch.equal(item.mask, expected["segmentation"][reference["id"]].bool())


def test_mask2former_has_the_coco_classes_only(images: torch.Tensor, tmp_path: Path) -> None:
    assert Mask2Former().classes == OBJECTS and Owlv2().classes is None is GroundingDino().classes
    other = tiny_detectors.mask2former(tmp_path / "other", labels=20)
    with pytest.raises(ValueError, match="has 20 classes: give a COCO instance checkpoint"):
        Mask2Former(other)(images, [["dog"]] * 3)


# --- open vocabularies ------------------------------------------------------------------------------------------------


def agree(detected: list[Instance], names: list[str], scores: torch.Tensor, boxes: torch.Tensor) -> None:
    """Compare with the best of the scores (n, names) of boxes (n, 4), cut at the border of an image."""
    cut = boxes.clamp(min=0).minimum(torch.tensor([64, 48, 64, 48]))
    inside = (cut[:, :2] < cut[:, 2:]).all(1)
    best, label = scores[inside].max(-1)
    assert [item.detection.score for item in detected] == pytest.approx(best.tolist(), abs=1e-5)
    assert [item.detection.name for item in detected] == [names[i] for i in label.tolist()]
    torch.testing.assert_close(torch.tensor([item.detection.box for item in detected]), cut[inside])


def test_owlv2_agrees_with_transformers(folders: dict[str, str], images: torch.Tensor) -> None:
    processor = AutoProcessor.from_pretrained(folders["Owlv2"])
    network = Owlv2ForObjectDetection.from_pretrained(folders["Owlv2"]).eval()
    text = [["a photo of a circle", "a photo of a cross"]]
    with torch.no_grad():
        output = network(**processor(text=text, images=[eight_bits(images)[0]], return_tensors="pt"))
    (theirs,) = processor.post_process_grounded_object_detection(output, 0.0, [(48, 64)])
    detected = Owlv2(folders["Owlv2"], ALL)(images[:1], [["circle", "cross"]])[0]
    agree(detected, ["circle", "cross"], output.logits[0].sigmoid(), theirs["boxes"])


def test_grounding_dino_agrees_with_transformers(folders: dict[str, str], images: torch.Tensor) -> None:
    processor = AutoProcessor.from_pretrained(folders["GroundingDino"])
    network = GroundingDinoForObjectDetection.from_pretrained(folders["GroundingDino"]).eval()
    inputs = processor(images=[eight_bits(images)[0]], text="dog. wine glass.", return_tensors="pt")
    with torch.no_grad():
        output = network(**inputs)
    (theirs,) = processor.post_process_grounded_object_detection(
        output, inputs["input_ids"], threshold=0.0, text_threshold=0.0, target_sizes=[(48, 64)]
    )
    detected = GroundingDino(folders["GroundingDino"], ALL)(images[:1], [["dog", "wine glass"]])[0]
    logits = output.logits[0].sigmoid()
    scores = torch.stack([logits[:, 1], logits[:, 3:5].amax(-1)], -1)
    agree(detected, ["dog", "wine glass"], scores, theirs["boxes"])


@pytest.mark.parametrize("kind", KINDS)
def test_detections_do_not_depend_on_the_batch(kind: type, folders: dict[str, str], images: torch.Tensor) -> None:
    names = [["dog"], ["cat", "wine glass"], ["dog", "dog"]]
    detector = kind(folders[kind.__name__], SOME)
    detected = detector(images, names)
    alone = [detector(images[i : i + 1], names[i : i + 1])[0] for i in range(3)]
    assert [boxes(items) for items in detected] == [boxes(items) for items in alone]
    for classes, items in zip(names, detected, strict=True):
        assert items and {item.detection.name for item in items} <= {*classes, *(detector.classes or ())}
        assert all(item.detection.score > 0.05 for item in items)
        assert all(item.mask.shape == (48, 64) if kind is Mask2Former else item.mask is None for item in items)


def test_names_are_located_in_the_caption(folders: dict[str, str]) -> None:
    tokenizer = AutoProcessor.from_pretrained(folders["GroundingDino"]).tokenizer
    text, places = _caption(tokenizer, ["dog", "wine glass", "cat"])
    words = tokenizer.convert_ids_to_tokens(text["input_ids"][0].tolist())
    assert words == ["[CLS]", "dog", ".", "wine", "glass", ".", "cat", ".", "[SEP]"]
    assert [[words[i] for i in place] for place in places] == [["dog"], ["wine", "glass"], ["cat"]]


@pytest.mark.parametrize("detector", KINDS)
def test_descriptions_hold_all_settings(detector: type) -> None:
    plain, other = detector(), detector(thresholds=Thresholds(confidence=0.123))
    assert plain.description["class"] == detector.__name__ and plain.description["model"] == plain.model
    assert other.description["thresholds"]["confidence"] == 0.123
    assert plain.description != other.description


def test_a_missing_detector_is_named(images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the detector .*nothing is neither a checkpoint's folder nor in the"):
        Mask2Former(str(tmp_path / "nothing"))(images, [["dog"]] * 3)


def test_images_of_a_batch_are_read_as_alone() -> None:
    dog, cat = (16, 0.9, slice(2, 6), slice(1, 4)), (15, 0.6, slice(0, 8), slice(5, 10))
    nothing = (0, 0.2, slice(0, 2), slice(0, 2))
    alone = [logits(dog, cat), logits(nothing, nothing), logits(nothing, dog)]
    classes, masks = (torch.cat(parts) for parts in zip(*alone, strict=True))
    together = coco_instances(classes, masks, (32, 40), 0.3)
    assert [len(detected) for detected in together] == [2, 0, 1]
    for detected, of_one in zip(together, alone, strict=True):
        [expected] = coco_instances(*of_one, (32, 40), 0.3)
        assert [item.detection for item in detected] == [item.detection for item in expected]
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(detected, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_bfloat16_detect_alike(
    kind: type[Mask2Former] | type[Owlv2] | type[GroundingDino], folders: dict[str, str], images: torch.Tensor
) -> None:
    names = [["dog", "cat"]] * len(images)
    folder = folders[kind.__name__]
    full, low = (kind(folder, ALL, dtype=dtype)(images, names) for dtype in ("float32", "bfloat16"))
    scores = [torch.tensor([max(i.detection.score for i in one) for one in detected]) for detected in (full, low)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=0.02)  # each layer rounds by 2^-9
    assert full[0][0].detection != low[0][0].detection
    assert kind(folder).description == kind(folder, dtype="float32").description != kind(folder, dtype="bfloat16")
    assert kind(folder, dtype="bfloat16").description["dtype"] == "bfloat16" and "dtype" not in kind(folder).description
