from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from rewards.backbones.depth import DepthModel
from tests.rewards.low_precision import require_alike


@pytest.fixture(scope="module")
def dpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DPT with its processor."""
    folder: Path = tmp_path_factory.mktemp("dpt")
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = DPTConfig(**tower, **sizes, backbone_out_indices=[0, 1, 2, 3], readout_type="ignore")
    DPTForDepthEstimation(config).save_pretrained(folder)
    return folder


def test_nearness_has_the_size_of_the_images(dpt: Path) -> None:
    images = torch.rand(3, 3, 40, 52, generator=torch.Generator().manual_seed(0))
    nearness = DepthModel(str(dpt), batch_size=2)(images)
    assert nearness.shape == (3, 40, 52) and nearness.std() > 0
    torch.testing.assert_close(DepthModel(str(dpt), inverse=False)(images), -nearness, rtol=1e-4, atol=1e-5)


def test_weights_in_bfloat16_see_alike(dpt: Path) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    full, low = (DepthModel(str(dpt), dtype=dtype)(images) for dtype in ("float32", "bfloat16"))
    require_alike(full, low, 0.02 * float(full.max()))
