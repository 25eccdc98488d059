"""Attention to users in every family: seen where the network runs whole batches, else refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pipelines
from genalign.diffusion.user_attention import Users, projections_of
from genalign.types import Prompt
from pipelines.base import DiffusersPipeline
from tests.pipelines.tiny_checkpoints import FAMILIES, FolderOf

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]

REFUSED = {"ace_step", "qwen_image21", "z_image"}


def _predicted(pipeline: DiffusersPipeline, prompts: list[Prompt]) -> Tensor:
    x = pipeline.initial_noise([7] * len(prompts))
    with torch.no_grad():
        return pipeline.predict(x, pipeline.grid(4)[1], pipeline.encode(prompts), 1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_users_of_every_family(name: str, folder_of: FolderOf, tmp_path: Path) -> None:
    path, family = tmp_path / "users.safetensors", FAMILIES[name]
    Users({user: torch.randn(2, 6) for user in ("ada", "bob")}, {}).save(path)
    if name in REFUSED:
        with pytest.raises(ValueError, match=r"which users cannot follow: leave\s+model.users out"):
            pipelines.load(folder_of(name), users=str(path), **family.options)
        return
    plain = pipelines.load(folder_of(name), **family.options)
    seeing = pipelines.load(folder_of(name), users=str(path), **family.options)
    ada, bob, nobody = Prompt("a dog", {"user": "ada"}), Prompt("a dog", {"user": "bob"}), Prompt("a dog")
    expected = _predicted(plain, [nobody] * 3)
    assert torch.equal(_predicted(seeing, [ada, bob, nobody]), expected)  # values of users start at zero
    for projections in projections_of(seeing.denoiser):
        torch.nn.init.normal_(projections.to_value.weight, std=10.0)
    seen = _predicted(seeing, [ada, bob, nobody])
    torch.testing.assert_close(seen[2], expected[2], rtol=1e-4, atol=1e-4)
    rounding = float((seen[2] - expected[2]).abs().max())
    assert min(float((seen[0] - other).abs().max()) for other in (seen[1], expected[0])) > 1e-4 + 10 * rounding
