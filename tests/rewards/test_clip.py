from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

from genalign import assets
from genalign.evaluation.geneval.grammar import color_attr, counting, single_object
from genalign.scoring.reward_check import Expected, Probe, check
from genalign.types import Prompt, Reward
from genalign.worlds.shapes.scenes import render, sample_scene
from rewards.backbones.clip_encoder import ImagePreprocessor, load_clip, resize
from rewards.clip import ClipReward
from tests.packages import ROOT
from tests.rewards import tiny_detectors
from tests.rewards.low_precision import require_alike

PROMPTS = [single_object("circle"), counting("square", "two"), color_attr("ring", "red", "cross", "blue")]
PROMPTS += [single_object("moon")]
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    rng = np.random.default_rng(5)
    return render([sample_scene(prompt.metadata, rng) for prompt in PROMPTS])


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_detectors.clip(tmp_path_factory.mktemp("clip"), image_mean=[0.4] * 3, image_std=[0.3] * 3)


def smooth(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def test_the_right_prompt_scores_higher(images: torch.Tensor) -> None:
    reward = ClipReward("shapes-clip")
    assert isinstance(reward, Reward)
    right, wrong = reward(images, PROMPTS), reward(images, PROMPTS[1:] + PROMPTS[:1])
    assert right.shape == (4,)
    assert (right > wrong + 0.3).all()


def test_the_cosine_agrees_with_open_clip(images: torch.Tensor) -> None:
    name = f"local-dir:{assets.resolve('shapes-clip')}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    pictures = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    with torch.no_grad():
        image = model.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)([prompt.text for prompt in PROMPTS]), normalize=True)
    exact = torch.cat([as_tensor(picture) for picture in pictures])
    torch.testing.assert_close(ClipReward("shapes-clip")(exact, PROMPTS), (image * text).sum(1), rtol=0, atol=1e-5)


def test_the_cosine_agrees_with_transformers(transformers_folder: str) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = ["a photo of a red circle", "two squares"]
    model = CLIPModel.from_pretrained(transformers_folder).eval()
    tokens = AutoTokenizer.from_pretrained(transformers_folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        result = model(tokens.input_ids, (images - 0.4) / 0.3, tokens.attention_mask)
    ours = ClipReward(transformers_folder)(images, [Prompt(text) for text in texts])
    torch.testing.assert_close(ours, (result.image_embeds * result.text_embeds).sum(1), rtol=0, atol=1e-6)
    assert load_clip(transformers_folder).logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_the_contract_of_rewards_holds(images: torch.Tensor) -> None:
    checks = list(check(ClipReward("shapes-clip"), Probe(images, PROMPTS), Expected(gradient=True)))
    assert [result for result in checks if result.passed is False] == []
    assert all(not p.requires_grad and p.grad is None for p in load_clip("shapes-clip").parameters())


def test_a_text_is_encoded_once(transformers_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_clip(transformers_folder)
    encode, seen = encoder.encode_texts, []
    monkeypatch.setattr(encoder, "encode_texts", lambda texts: seen.append(texts) or encode(texts))
    reward = ClipReward(transformers_folder)
    for texts in (["one ring", "one cross", "one ring"], ["one cross", "one star"]):
        reward(torch.rand(len(texts), 3, 32, 32), [Prompt(text) for text in texts])
    assert seen == [["one ring"], ["one cross"], ["one star"]]


@pytest.mark.parametrize(("height", "width"), [(90, 61), (40, 70), (32, 32)])
def test_preprocessing_follows_pillow(height: int, width: int) -> None:
    image = smooth(height, width)
    config = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    theirs = CLIPImageProcessorPil(**config, image_mean=[0.4] * 3, image_std=[0.3] * 3)(image, return_tensors="pt")
    ours = ImagePreprocessor((32, 32), (0.4,) * 3, (0.3,) * 3)(as_tensor(image))
    assert (ours - theirs.pixel_values).abs().mean() < 0.01


def test_pad_keeps_the_whole_image_in_black() -> None:
    padded = ImagePreprocessor((8, 8), fit="pad", **UNIT)(torch.ones(1, 3, 8, 16))
    assert padded[0, 0].sum(1).tolist() == pytest.approx([0, 0, 8, 8, 8, 8, 0, 0])


def test_crop_keeps_the_middle_and_squash_keeps_all() -> None:
    image = torch.zeros(1, 3, 8, 24)
    image[..., 8:16] = 1
    assert ImagePreprocessor((8, 8), fit="crop", **UNIT)(image).mean() == 1
    assert ImagePreprocessor((8, 8), fit="squash", **UNIT)(image).mean() == pytest.approx(1 / 3, abs=0.02)


def test_resizing_stays_in_range() -> None:
    image = (torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    resized = resize(image, (33, 33))
    assert resized.min() == 0 and resized.max() == 1


def test_wrong_shapes_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        ClipReward("shapes-clip")(images[:, :1], PROMPTS)
    with pytest.raises(ValueError, match="one prompt per sample"):
        ClipReward("shapes-clip")(images, PROMPTS[:2])


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither an open_clip_config\.json nor a config\.json"):
        ClipReward(str(tmp_path))(torch.rand(1, 3, 8, 8), PROMPTS[:1])
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="clip_vision_model checkpoint, not CLIP"):
        load_clip(str(tmp_path))
    with pytest.raises(ValueError, match="leave processor out"):
        load_clip("shapes-clip", "somewhere")


def test_a_checkpoint_is_opened_once_and_not_before_the_first_call() -> None:
    assert load_clip("shapes-clip") is load_clip(assets.resolve("shapes-clip"), None)
    assert ClipReward("no/such-model").model == "no/such-model"


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_weights_in_bfloat16_score_alike(library: str, transformers_folder: str, images: torch.Tensor) -> None:
    model = "shapes-clip" if library == "open_clip" else transformers_folder
    batch, prompts = images.repeat(2, 1, 1, 1).requires_grad_(True), PROMPTS + PROMPTS[::-1]
    scores = ClipReward(model, dtype="bfloat16")(batch, prompts)
    require_alike(ClipReward(model)(images.repeat(2, 1, 1, 1), prompts), scores.detach(), 0.01)
    encoder, full = load_clip(model, None, "bfloat16"), load_clip(model)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16} and encoder.logit_scale == full.logit_scale
    scores.sum().backward()
    expected = torch.autograd.grad(ClipReward(model)(batch, prompts).sum(), batch)[0]
    assert batch.grad is not None
    assert torch.nn.functional.cosine_similarity(batch.grad.flatten(), expected.flatten(), dim=0) > 0.99


_OPENAI_NAMES = [
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
    (r"self_attn", "attn"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
]


def openai_state(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The weights of a model of transformers in the layout of OpenAI's files."""
    state, fused = {}, {}
    for name, value in model.state_dict().items():
        for pattern, openai in _OPENAI_NAMES:
            name = re.sub(pattern, openai, name)
        if match := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name):
            fused.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = value
        elif "position_ids" not in name:
            state[name] = value.T if name in ("visual.proj", "text_projection") else value
    state |= {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in fused.items()}
    return state | {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}


def test_the_conversion_of_the_rewards_page_keeps_the_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model with QuickGELU, in OpenAI's layout; transformers computes the cosine."""
    (code,) = re.findall(
        r"```python\n(# convert_clip\.py\n.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL
    )
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 2}
    towers = {
        "text_config": tower | {"bos_token_id": 49406, "eos_token_id": 49407, "projection_dim": 16},
        "vision_config": tower | {"image_size": 32, "patch_size": 8, "projection_dim": 16},
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**towers, projection_dim=16)).eval()
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "quick_gelu"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    (tmp_path / "tiny-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-quickgelu.json")
    torch.save(openai_state(model), tmp_path / "social_reward.pt")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("ViT-L-14-quickgelu", "tiny-quickgelu"), {})

    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = ["a red circle", "two blue squares and a ring", "a photo"]
    tokens = open_clip.get_tokenizer("ViT-L-14-quickgelu")(texts)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        output = model(tokens, (images - mean) / std)
    expected = (output.image_embeds * output.text_embeds).sum(1)
    scores = ClipReward(str(tmp_path / "social-reward"))(images, [Prompt(text) for text in texts])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)

    settings = json.loads((tmp_path / "social-reward" / "open_clip_config.json").read_text())
    settings["model_cfg"]["quick_gelu"] = False
    (tmp_path / "social-reward").rename(tmp_path / "gelu")
    (tmp_path / "gelu" / "open_clip_config.json").write_text(json.dumps(settings))
    other = ClipReward(str(tmp_path / "gelu"))(images, [Prompt(text) for text in texts])
    assert (other - expected).abs().max() > 1e-3
