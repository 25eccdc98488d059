"""PickScore and HPS, by tiny random checkpoints of the published kinds."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from genalign.types import Prompt, Reward
from rewards.hps import HPSReward
from rewards.pickscore import PickScoreReward
from tests.rewards import tiny_detectors

TEXTS = ["a photo of a red circle", "two squares", "a blue ring"]
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory: pytest.TempPathFactory) -> PickScoreReward:
    """As on the Hub, the weights and the processor are in different places."""
    folder: Path = tmp_path_factory.mktemp("pickscore")
    processor = tiny_detectors.clip(folder)
    model = CLIPModel.from_pretrained(processor)
    torch.nn.init.constant_(model.logit_scale, 4.5)
    model.save_pretrained(folder / "weights")
    return PickScoreReward(str(folder / "weights"), processor)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that open_clip knows by name, as it knows ViT-H-14."""
    folder: Path = tmp_path_factory.mktemp("architecture")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "test-tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "test-tiny-hps.json")
    return "test-tiny-hps"


@pytest.fixture(scope="module")
def hps(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> HPSReward:
    file: Path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.manual_seed(0)
    model = open_clip.create_model(architecture, load_weights=False)
    torch.save({"epoch": 1, "name": "tuned", "state_dict": model.state_dict()}, file)
    return HPSReward(str(file), architecture)


def images(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_pickscore_is_the_models_logit(pickscore: PickScoreReward) -> None:
    assert isinstance(pickscore, Reward)
    model = CLIPModel.from_pretrained(pickscore.model).eval()
    tokens = AutoTokenizer.from_pretrained(pickscore.processor)(TEXTS, padding=True, return_tensors="pt")
    processor = CLIPImageProcessor.from_pretrained(pickscore.processor)
    pixels = processor(images(), do_rescale=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(tokens.input_ids, pixels, tokens.attention_mask).logits_per_image
    torch.testing.assert_close(pickscore(images(), PROMPTS), logits.diagonal(), rtol=0, atol=1e-4)


def test_hps_is_the_cosine_without_a_scale(hps: HPSReward) -> None:
    model = open_clip.create_model(hps.architecture, pretrained=hps.weights).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        image = model.encode_image((images() - mean) / std, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(hps.architecture)(TEXTS), normalize=True)
    torch.testing.assert_close(hps(images(), PROMPTS), (image * text).sum(1), rtol=0, atol=1e-5)


def test_hps_fits_the_whole_image_into_black(hps: HPSReward) -> None:
    """As open_clip's own transform of the published mode does with a picture."""
    _, _, transform = open_clip.create_model_and_transforms(
        hps.architecture, pretrained=hps.weights, image_resize_mode="longest"
    )
    coarse = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC)
    theirs = transform(picture)
    ours = hps.encoder(torch.device("cpu")).prepare(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)
    assert (ours[0] - theirs).abs().mean() < 0.01
    black = ours[0, :, 0]
    assert (black == black[:, :1]).all() and (black < 0).all()


@pytest.mark.parametrize("name", ["pickscore", "hps"])
def test_both_are_rewards_to_be_trained_on(name: str, request: pytest.FixtureRequest) -> None:
    reward = request.getfixturevalue(name)
    leaf = images(40, 56).requires_grad_(True)
    scores = reward(leaf, PROMPTS)
    alone = torch.cat([reward(leaf[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)
    scores.sum().backward()
    assert leaf.grad is not None and (leaf.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in reward.encoder(torch.device("cpu")).parameters())
    broken = images()
    broken[1] = torch.nan
    assert reward(broken, PROMPTS).isnan().tolist() == [False, True, False]


def test_a_checkpoint_that_holds_code_is_not_opened(architecture: str, tmp_path: Path) -> None:
    torch.save({"state_dict": Path("anything")}, tmp_path / "hps.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        HPSReward(str(tmp_path / "hps.pt"), architecture)(images(), PROMPTS)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        HPSReward(str(tmp_path / "absent.pt"), architecture)(images(), PROMPTS)
