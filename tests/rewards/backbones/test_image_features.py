from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from genalign import assets
from genalign.types import Precision
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.encoders import PatchFeatures
from rewards.backbones.image_features import (
    ClipFeatures,
    Dinov2Features,
    Dinov3Features,
    SiglipFeatures,
    extract_features,
)
from rewards.backbones.reference_images import ImageTensor
from rewards.set_rewards import FrechetReward
from tests.rewards import tiny_detectors
from tests.rewards.low_precision import require_alike

PRECISIONS: tuple[Precision, Precision] = "float32", "bfloat16"


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2 for 28 x 28 images, four patches."""
    folder: Path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def dinov3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv3 for 32 x 32 images, four patches, with four registers and its own normalization."""
    folder: Path = tmp_path_factory.mktemp("dinov3")
    torch.manual_seed(0)
    config = DINOv3ViTConfig(**TINY, num_register_tokens=4, image_size=32, initializer_range=0.2)
    DINOv3ViTModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    DINOv3ViTImageProcessor(size=size, image_mean=[0.43, 0.41, 0.29], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SigLIP of both towers for 24 x 24 images, nine patches."""
    folder: Path = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    vision = TINY | {"image_size": 24, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=TINY | {"vocab_size": 20}, vision_config=vision)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


def processed(folder: Path, samples: torch.Tensor) -> torch.Tensor:
    """Images as the checkpoint's own processor prepares them, in floating point."""
    pixels: torch.Tensor = AutoImageProcessor.from_pretrained(folder)(
        list(samples), do_rescale=False, return_tensors="pt"
    ).pixel_values
    return pixels


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_clip_features_are_the_embedding_and_projected_patches() -> None:
    model = open_clip.create_model(f"local-dir:{assets.resolve('shapes-clip')}").eval()
    model.visual.output_tokens = True
    features = ClipFeatures("shapes-clip")
    with torch.no_grad():
        pooled, tokens = model.visual(load_clip("shapes-clip").prepare(images(64)))
        result = features.features(images(64))
    assert isinstance(features, PatchFeatures)
    assert result.global_.shape == (2, 128) and result.patches.shape == (2, 64, 128)
    torch.testing.assert_close(features(images(64)), pooled, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.global_, pooled, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.patches, tokens @ model.visual.proj, rtol=0, atol=1e-4)


def test_transformers_clip_patches(tmp_path: Path) -> None:
    size = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    folder = tiny_detectors.clip(tmp_path, **size, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    model = CLIPModel.from_pretrained(folder).eval()
    result = ClipFeatures(folder).features(images(32))
    with torch.no_grad():
        hidden = model.vision_model(images(32)).last_hidden_state
        tokens = model.visual_projection(model.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(torch.cat([result.global_[:, None], result.patches], 1), tokens, rtol=0, atol=1e-6)


def test_dinov2_agrees_with_transformers(dinov2_folder: Path) -> None:
    features = Dinov2Features(str(dinov2_folder))
    result = features.features(images(28))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(dinov2_folder).eval()((images(28) - mean) / std).last_hidden_state
    assert isinstance(features, PatchFeatures)
    torch.testing.assert_close(torch.cat([result.global_[:, None], result.patches], dim=1), tokens)
    torch.testing.assert_close(features(images(28)), result.global_)


def test_dinov2_takes_any_image_at_any_multiple_of_its_patch(dinov2_folder: Path) -> None:
    for size, patches in (None, 4), (42, 9):
        assert Dinov2Features(str(dinov2_folder), size).features(images(50)).patches.shape == (2, patches, 16)
    with pytest.raises(ValueError, match="size 40 is not a multiple of the patch size 14: try 28"):
        Dinov2Features(str(dinov2_folder), size=40)(images(40))


@pytest.mark.parametrize("size", [32, 50])
def test_dinov3_agrees_with_transformers(dinov3_folder: Path, size: int) -> None:
    features = Dinov3Features(str(dinov3_folder))
    result = features.features(images(size))
    with torch.no_grad():
        network = DINOv3ViTModel.from_pretrained(dinov3_folder).eval()
        output = network(processed(dinov3_folder, images(size)))
    assert isinstance(features, PatchFeatures) and output.last_hidden_state.shape == (2, 1 + 4 + 4, 16)
    torch.testing.assert_close(result.global_, output.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.patches, output.last_hidden_state[:, 5:], rtol=0, atol=1e-5)


def test_dinov3_takes_another_size(dinov3_folder: Path) -> None:
    assert Dinov3Features(str(dinov3_folder), 48).features(images(50)).patches.shape == (2, 9, 16)
    with pytest.raises(ValueError, match="size 40 is not a multiple of the patch size 16: try 32"):
        Dinov3Features(str(dinov3_folder), size=40)(images(40))


@pytest.mark.parametrize("size", [24, 50])
def test_siglip_agrees_with_transformers(siglip_folder: Path, size: int) -> None:
    features = SiglipFeatures(str(siglip_folder))
    result = features.features(images(size))
    units = SiglipFeatures(str(siglip_folder), unit=True).features(images(size))
    with torch.no_grad():
        model, pixels = SiglipModel.from_pretrained(siglip_folder).eval(), processed(siglip_folder, images(size))
        embedding = model.get_image_features(pixel_values=pixels).pooler_output
        patches = model.vision_model(pixels).last_hidden_state
    assert isinstance(features, PatchFeatures) and patches.shape == (2, 9, 16)
    torch.testing.assert_close(result.global_, embedding, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.patches, patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(units.global_, F.normalize(embedding, dim=-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(units.patches.norm(dim=-1), torch.ones(2, 9))


def test_a_siglip_without_its_head_is_refused(tmp_path: Path) -> None:
    config = SiglipConfig(text_config=TINY, vision_config=TINY | {"vision_use_head": False})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no pooling head"):
        SiglipFeatures(str(tmp_path))(images(24))


@pytest.mark.parametrize("name", ["clip", "dinov2", "dinov3", "siglip"])
def test_features_are_differentiable(name: str, request: pytest.FixtureRequest) -> None:
    kinds: dict[str, Any] = {"dinov2": Dinov2Features, "dinov3": Dinov3Features, "siglip": SiglipFeatures}
    folder = None if name == "clip" else str(request.getfixturevalue(f"{name}_folder"))
    features = ClipFeatures("shapes-clip") if folder is None else kinds[name](folder)
    leaf = images(40).requires_grad_(True)
    features(leaf).square().sum().backward()
    assert leaf.grad is not None and (leaf.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("kind", "name"), [(Dinov2Features, "DINOv2"), (Dinov3Features, "DINOv3"), (SiglipFeatures, "SigLIP")]
)
def test_a_checkpoint_of_another_kind_is_refused(kind: Any, name: str, tmp_path: Path) -> None:
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"not {name}"):
        kind(str(tmp_path))(images(28))


def test_patches_need_a_vision_transformer(tmp_path: Path) -> None:
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
            "text_cfg": {"context_length": 12, "vocab_size": 400, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    features = ClipFeatures(str(tmp_path))
    assert features(images(32)).shape == (2, 16)
    with pytest.raises(ValueError, match="is a ModifiedResNet: patch tokens and blocks need a vision transformer"):
        features.features(images(32))


def test_a_reference_set_of_images() -> None:
    pictures = images(64, 5)
    features = ClipFeatures("shapes-clip", unit=True)
    features_of_all = extract_features(ImageTensor(pictures), features, batch_size=2)
    torch.testing.assert_close(features_of_all, features(pictures), rtol=0, atol=1e-5)
    torch.testing.assert_close(features_of_all.norm(dim=1), torch.ones(5), rtol=0, atol=1e-5)
    assert FrechetReward(features(images(64, 5) ** 2))(features_of_all) < 0


def test_features_in_bfloat16_are_alike(dinov2_folder: Path) -> None:
    full, low = (Dinov2Features(str(dinov2_folder), dtype=dtype).features(images(28)) for dtype in PRECISIONS)
    require_alike(full.global_, low.global_, 0.1)
    require_alike(full.patches, low.patches, 0.1)
