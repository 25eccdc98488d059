from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from genalign import assets
from genalign.cli.generation_settings import RewardChoice
from genalign.cli.parsing import parse
from genalign.evaluation.geneval.grammar import color_attr, colors, counting, position, single_object
from genalign.evaluation.geneval.scoring import Detection, Thresholds
from genalign.evaluation.geneval.vocabulary import COLORS
from genalign.types import Prompt, Reward
from genalign.worlds.shapes.prompts import prompts
from genalign.worlds.shapes.scenes import render, sample_scene
from genalign.worlds.shapes.verifier import verify
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.detectors import Instance, Mask2Former, Owlv2
from rewards.geneval import ClipColors, GenEvalJudge, GenEvalReward, _color_embeddings, crop
from tests.genalign.evaluation.geneval.shapes_judge import PaletteColors, ShapesDetector
from tests.rewards import tiny_detectors

PROMPTS = [single_object("circle"), counting("square", "two"), color_attr("ring", "red", "cross", "blue")]
PROMPTS += [position("moon", "left of", "triangle"), colors("cross", "green")]


def draw(scenes: list[Prompt]) -> torch.Tensor:
    rng = np.random.default_rng(5)
    return render([sample_scene(prompt.metadata, rng) for prompt in scenes])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return draw(PROMPTS)


def shapes_reward(score: str) -> GenEvalReward:
    return GenEvalReward(score, ShapesDetector(), PaletteColors())


@pytest.mark.parametrize("score", ["partial", "strict", "relaxed"])
def test_correct_images_score_one(images: torch.Tensor, score: str) -> None:
    reward: Reward = shapes_reward(score)
    scores = reward(images, PROMPTS)
    assert isinstance(reward, Reward) and scores.dtype == torch.float32
    assert scores.tolist() == [1] * len(PROMPTS)


def test_scores_agree_with_the_verifier_of_the_world() -> None:
    required = [prompt for group in prompts("iid").by_task().values() for prompt in group[::17][:12]]
    images = draw([*required[3:], *required[:3]])
    scores = GenEvalJudge(ShapesDetector(), PaletteColors())(images, required)
    for ours, theirs in zip(scores, verify(images, [prompt.metadata for prompt in required]), strict=True):
        assert ours is not None and ours.relaxed == theirs.relaxed
        assert sorted(ours.criteria) == sorted(theirs.criteria[:-1])  # the last is "clean"


def test_surplus_objects_pass_relaxed_but_not_strict(images: torch.Tensor) -> None:
    assert shapes_reward("relaxed")(images[1:2], [single_object("square")]).tolist() == [1]
    assert shapes_reward("strict")(images[1:2], [single_object("square")]).tolist() == [0]
    assert shapes_reward("partial")(images[1:2], [counting("square", "four")]).tolist() == [0.5]


def test_each_criterion_is_a_score_and_shares_the_detections() -> None:
    """A ring for a circle, a wrong relation, and a red cross for a green one."""
    asked = [single_object("circle"), PROMPTS[3], colors("cross", "green")]
    wrong = draw([single_object("ring"), position("triangle", "left of", "moon"), colors("cross", "red")])
    batches = []

    class CountingDetector(ShapesDetector):
        def __call__(self, images: torch.Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
            batches.append(len(images))
            return super().__call__(images, names)

    expected = {"count": [0, 1, 1], "color": [1, 1, 0], "position": [1, 0, 1], "partial": [0, 2 / 3, 1 / 2]}
    for score, values in expected.items():
        reward = GenEvalReward(score, CountingDetector(), PaletteColors())
        assert reward(wrong, asked).tolist() == pytest.approx(values)
    assert batches == [3]  # by four equal detectors
    wrong[0, 0, 0, 0] = torch.nan  # other samples in the same memory
    assert shapes_reward("color")(wrong, asked).isnan().tolist() == [True, False, False]


def test_images_that_are_not_finite_score_nan(images: torch.Tensor) -> None:
    broken = images.clone()
    broken[1, 0, 0, 0] = torch.nan
    assert shapes_reward("partial")(broken, PROMPTS).isnan().tolist() == [False, True, False, False, False]
    broken[1, 0, 0, 0] = torch.inf
    assert shapes_reward("partial")(broken[1:2], PROMPTS[1:2]).isnan().tolist() == [True]


def test_invalid_prompts_and_shapes_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="'a red dog' has no metadata: GenEval needs its tag"):
        shapes_reward("strict")(images[:1], [Prompt("a red dog")])
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\) with B = 5 prompts, not \(2, 3, 64, 64\)"):
        shapes_reward("strict")(images[:2], PROMPTS)


def test_an_unknown_class_is_refused_before_a_network_is_loaded() -> None:
    names = ("dog", "elf")
    unknown = [Prompt("", {"tag": "x", "include": [{"class": name, "count": 1}], "prompt": ""}) for name in names]
    with pytest.raises(ValueError, match="'elf' in '' is none of the 80 classes that Mask2Former detects: use Owlv2"):
        GenEvalJudge(Mask2Former("no/such-model")).check(unknown)
    GenEvalJudge(Owlv2("no/such-model")).check(unknown)
    with pytest.raises(ValueError, match="'dog' in '' is none of the 6 classes that ShapesDetector detects"):
        shapes_reward("strict")(torch.rand(1, 3, 8, 8), unknown[:1])


def test_upstream_partial_reproduces_the_faults_of_flow_grpo(images: torch.Tensor) -> None:
    """A mirrored relation scores 3 / 4, and four objects in place of one score -2."""
    mirrored = [position("triangle", "left of", "moon")]
    assert shapes_reward("upstream_partial")(images[3:4], mirrored).tolist() == [0.75]
    assert shapes_reward("partial")(images[3:4], mirrored).tolist() == pytest.approx([2 / 3])
    many = draw([counting("square", "four")])
    assert shapes_reward("upstream_partial")(many, [single_object("square")]).tolist() == [-2]
    assert shapes_reward("upstream_partial")(images, PROMPTS).tolist() == [1] * len(PROMPTS)


def test_upstream_partial_judges_jpegs() -> None:
    """Flow-GRPO sends JPEG to its server; the other scores are of the image itself."""
    seen: list[torch.Tensor] = []

    class Watching(ShapesDetector):
        def __call__(self, images: torch.Tensor, names: Sequence[Sequence[str]]) -> list[list[Instance]]:
            seen.append(images)
            return super().__call__(images, names)

    sharp = draw([single_object("circle")])
    for score in ("partial", "upstream_partial"):
        GenEvalReward(score, Watching(), PaletteColors())(sharp, [single_object("circle")])
    file = io.BytesIO()
    Image.fromarray((sharp[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=75)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(seen[0], (sharp * 255).round() / 255)
    torch.testing.assert_close(seen[1], expected)
    assert not torch.equal(seen[0], seen[1])


class FakeNetworks:
    """A detector that returns fixed objects, and a color classifier that records its crops."""

    description: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, *detections: Detection, mask: torch.Tensor | None = None) -> None:
        self.thresholds, self.classes, self.crops = Thresholds(), None, []
        self.instances = [Instance(detection, mask) for detection in detections]

    def __call__(self, images, names):
        if images[0].ndim == 3 and not isinstance(images, list):
            return [self.instances for _ in images]
        self.crops += list(zip([tuple(image.shape[1:]) for image in images], names, strict=True))
        return ["red"] * len(images)


def test_only_colors_that_a_rule_needs_are_classified() -> None:
    car = [Detection("car", (0, 0, 4 + i, 5), score) for i, score in enumerate((0.5, 0.9, 0.29))]
    networks = FakeNetworks(*car, Detection("dog", (0, 0, 9, 9), 0.9))
    prompt = Prompt("", {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": ""})
    (score,) = GenEvalJudge(networks, networks)(torch.rand(1, 3, 10, 10), [prompt])
    assert networks.crops == [((5, 5), "car")]  # only the most confident one
    assert [(item.name, item.score, item.color) for item in score.detections] == [
        ("car", 0.9, "red"),
        ("car", 0.5, None),
        ("dog", 0.9, None),
    ]
    unsure = FakeNetworks(car[2])
    assert not GenEvalJudge(unsure, unsure)(torch.rand(1, 3, 10, 10), [prompt])[0].relaxed
    assert unsure.crops == []


@pytest.mark.parametrize("box", [(2.0, 3.0, 9.0, 8.0), (1.5, 2.5, 7.5, 6.51), (0.0, 0.0, 12.0, 10.0)])
def test_crops_match_pillow(box: tuple[float, float, float, float]) -> None:
    rng = np.random.default_rng(0)
    pixels, mask = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8), rng.random((10, 12)) < 0.5
    picture = Image.fromarray(pixels)
    gray = Image.new("RGB", picture.size, color="#999")
    theirs = Image.composite(picture, gray, Image.fromarray(mask)).crop(box)
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    ours = crop(image, box, torch.from_numpy(mask))
    assert torch.equal(ours, torch.from_numpy(np.array(theirs)).permute(2, 0, 1).float() / 255)
    assert torch.equal(crop(image, box), torch.from_numpy(np.array(picture.crop(box))).permute(2, 0, 1).float() / 255)


def test_a_crop_has_at_least_one_pixel() -> None:
    assert crop(torch.rand(3, 8, 8), (7.9, 7.9, 8.0, 8.0)).shape == (3, 1, 1)
    assert crop(torch.rand(3, 8, 8), (3.2, 3.2, 3.3, 3.3)).shape == (3, 1, 1)


def test_the_classifier_matches_open_clip() -> None:
    name = f"local-dir:{assets.resolve('shapes-clip')}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    templates = ["a photo of a {} ring", "a photo of a {}-colored ring", "a photo of a {} object"]
    theirs = open_clip.build_zero_shot_classifier(
        model.eval(), open_clip.get_tokenizer(name), COLORS, [t.format for t in templates]
    )
    torch.testing.assert_close(
        _color_embeddings(load_clip("shapes-clip"), ["ring"])["ring"], theirs.T, rtol=0, atol=1e-5
    )


def test_a_trained_clip_classifies_colors() -> None:
    """The embedded CLIP was trained on captions of whole scenes; one object on gray is close enough to them."""
    expected = [color for _ in range(3) for color in COLORS]
    images = draw([colors(shape, color) for shape in ("circle", "square", "cross") for color in COLORS])
    objects = [instances[0] for instances in ShapesDetector()(images, [[]] * len(images))]
    crops = [crop(image, item.detection.box, item.mask) for image, item in zip(images, objects, strict=True)]
    names = [item.detection.name for item in objects]
    assert PaletteColors()(crops, names) == expected
    right = [a == b for a, b in zip(ClipColors("shapes-clip")(crops, names), expected, strict=True)]
    assert sum(right) / len(right) >= 0.5  # 0.1 by chance


def test_mask2former_and_clip_judge_together(tmp_path: Path) -> None:
    model, clip = tiny_detectors.mask2former(tmp_path / "detector"), tiny_detectors.clip(tmp_path / "clip")
    detector, classifier = Mask2Former(model, Thresholds(confidence=0.2, counting=0.2)), ClipColors(clip)
    include = [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}]
    prompt = Prompt("two", {"tag": "color_attr", "include": include, "prompt": "two"})
    images = torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(3))
    scores = [score for score in GenEvalJudge(detector, classifier)(images, [prompt] * 4) if score is not None]
    assert len(scores) == 4 and all(score.detections for score in scores)
    for score in scores:
        best = {item.name: item for item in reversed(score.detections)}  # the first of each class
        assert all(item.color in COLORS for item in best.values())
        assert not score.reason.startswith("expected dog>=1")
    reward = GenEvalReward("partial", detector, classifier)
    assert reward(images, [prompt] * 4).tolist() == pytest.approx([score.partial for score in scores])


def test_the_description_names_detector_thresholds_and_colors() -> None:
    plain = GenEvalJudge().description
    json.dumps(plain)
    assert plain["detector"]["model"] == "facebook/mask2former-swin-small-coco-instance"
    assert plain["detector"]["thresholds"] == vars(Thresholds(0.3, 0.9, 16, 1.0, 0.1))
    assert plain["colours"]["model"] == "openai/clip-vit-large-patch14"  # the spelling in protocols of 0.1.0
    assert plain["colours"]["class"] == "ClipColours"
    assert GenEvalJudge(colors=ClipColors("other")).description != plain


def test_detectors_are_configurable() -> None:
    detector = "{class_path: rewards.backbones.detectors.Owlv2, init_args: {thresholds: {confidence: 0.4}}}"
    function = f"{{class_path: rewards.geneval.GenEvalReward, init_args: {{score: strict, detector: {detector}}}}}"
    parsed, plain = parse(RewardChoice, ["--function", function], "test")
    thresholds = replace(Owlv2().thresholds, confidence=0.4)  # the others are the detector's defaults
    assert parsed.function == GenEvalReward("strict", Owlv2(thresholds=thresholds))
    assert plain["function"]["init_args"]["detector"]["init_args"]["thresholds"]["counting"] == 0.3


def test_crops_are_classified_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    crops = [torch.rand(3, 8 + 3 * i, 40 - 2 * i, generator=generator) * torch.rand(3, 1, 1) for i in range(7)]
    names = ["circle", "ring", "circle", "square", "ring", "circle", "moon"]
    alone = [ClipColors("shapes-clip")([crop], [name])[0] for crop, name in zip(crops, names, strict=True)]
    encoder, sizes = load_clip("shapes-clip"), []
    embed = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda pixels: (sizes.append(len(pixels)), embed(pixels))[1])
    monkeypatch.setattr("rewards.geneval._CROPS", 5)
    assert ClipColors("shapes-clip")(crops, names) == alone and sizes == [5, 2]
    assert len(ClipColors("shapes-clip", dtype="bfloat16")(crops, names)) == 7
