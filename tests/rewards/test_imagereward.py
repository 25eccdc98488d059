"""Against the published network written out in plain tensor algebra, on tiny random weights in the published layout."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genalign.types import Prompt, Reward
from rewards.imagereward import ImageReward
from tests.rewards.low_precision import require_alike

WIDTH, IMAGE_WIDTH, DEPTH, PATCH, SIDE = 64, 128, 2, 8, 16  # one and two heads of 64
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "ring", "two", "##s"]
PROMPTS = [Prompt("a red circle"), Prompt("two rings"), Prompt("a blue ring a red circle " * 9)]


def shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published checkpoint, with other numbers."""
    found: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, IMAGE_WIDTH),
        "blip.visual_encoder.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, IMAGE_WIDTH),
        "blip.visual_encoder.patch_embed.proj.weight": (IMAGE_WIDTH, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (IMAGE_WIDTH,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS), WIDTH),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, WIDTH),
        "blip.vision_proj.weight": (4, IMAGE_WIDTH),
    }

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    norm("blip.visual_encoder.norm", IMAGE_WIDTH)
    norm("blip.text_encoder.embeddings.LayerNorm", WIDTH)
    for i in range(DEPTH):
        block = f"blip.visual_encoder.blocks.{i}."
        for name, inputs, outputs in (("attn.qkv", 1, 3), ("attn.proj", 1, 1), ("mlp.fc1", 1, 2), ("mlp.fc2", 2, 1)):
            linear(block + name, inputs * IMAGE_WIDTH, outputs * IMAGE_WIDTH)
        norm(block + "norm1", IMAGE_WIDTH)
        norm(block + "norm2", IMAGE_WIDTH)
        layer = f"blip.text_encoder.encoder.layer.{i}."
        for kind, seen in (("attention", WIDTH), ("crossattention", IMAGE_WIDTH)):
            linear(f"{layer}{kind}.self.query", WIDTH, WIDTH)
            linear(f"{layer}{kind}.self.key", seen, WIDTH)
            linear(f"{layer}{kind}.self.value", seen, WIDTH)
            linear(f"{layer}{kind}.output.dense", WIDTH, WIDTH)
            norm(f"{layer}{kind}.output.LayerNorm", WIDTH)
        linear(layer + "intermediate.dense", WIDTH, 2 * WIDTH)
        linear(layer + "output.dense", 2 * WIDTH, WIDTH)
        norm(layer + "output.LayerNorm", WIDTH)
    for i, (inputs, outputs) in zip((0, 2, 4, 6, 7), ((WIDTH, 9), (9, 8), (8, 7), (7, 5), (5, 1)), strict=True):
        linear(f"mlp.layers.{i}", inputs, outputs)
    return found


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = {"mlp": 0.8, "blip": 0.2}
    drawn = {
        name: scale[name.split(".")[0]] * torch.randn(shape, generator=generator) for name, shape in shapes().items()
    }
    drawn["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return drawn


@pytest.fixture(scope="module")
def reward(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> ImageReward:
    folder: Path = tmp_path_factory.mktemp("imagereward")
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return ImageReward(str(folder / "ImageReward.pt"), str(folder))


def images() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads of 64."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(-3, -2) for x in (query, key, value))
    mixed = ((q @ k.mT) / math.sqrt(64)).softmax(-1) @ v
    return mixed.transpose(-3, -2).flatten(-2)


def reference(tensors: dict[str, Tensor], image: Tensor, tokens: list[int]) -> Tensor:
    """The score of one image (3, SIDE, SIDE) and one prompt's tokens, which are not padded."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: Tensor, epsilon: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], epsilon)

    vision = "blip.visual_encoder."
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    kernel, bias = (tensors[f"{vision}patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    patches = F.conv2d(((image - mean) / std)[None], kernel, bias, stride=PATCH)[0].flatten(1).T
    x = torch.cat([tensors[vision + "cls_token"][0], patches]) + tensors[vision + "pos_embed"][0]
    for i in range(DEPTH):
        block = f"{vision}blocks.{i}."
        qkv = linear(block + "attn.qkv", norm(block + "norm1", x, 1e-6))
        x = x + linear(block + "attn.proj", attention(*qkv.chunk(3, -1)))
        x = x + linear(block + "mlp.fc2", F.gelu(linear(block + "mlp.fc1", norm(block + "norm2", x, 1e-6))))
    seen = norm(vision + "norm", x, 1e-6)

    text = "blip.text_encoder."
    words = tensors[text + "embeddings.word_embeddings.weight"][tokens]
    places = tensors[text + "embeddings.position_embeddings.weight"][: len(tokens)]
    h = norm(text + "embeddings.LayerNorm", words + places, 1e-12)
    for i in range(DEPTH):
        layer = f"{text}encoder.layer.{i}."
        for kind in ("attention", "crossattention"):
            source = h if kind == "attention" else seen
            query, key, value = (
                linear(f"{layer}{kind}.self.{name}", x)
                for name, x in (("query", h), ("key", source), ("value", source))
            )
            mixed = linear(f"{layer}{kind}.output.dense", attention(query, key, value))
            h = norm(f"{layer}{kind}.output.LayerNorm", h + mixed, 1e-12)
        inner = linear(layer + "output.dense", F.gelu(linear(layer + "intermediate.dense", h)))
        h = norm(layer + "output.LayerNorm", h + inner, 1e-12)
    score = h[0]
    for i in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{i}", score)
    return (score[0] - 0.16717362830052426) / 1.0333394966054072


def test_the_port_is_the_published_network(reward: ImageReward, tensors: dict[str, Tensor]) -> None:
    assert isinstance(reward, Reward)
    long = [2, *([5, 7, 9, 5, 6, 8] * 9)[:33], 3]  # cut to 35 tokens, the last of them kept
    tokens = [[2, 5, 6, 8, 3], [2, 10, 9, 11, 3], long]
    expected = torch.stack([reference(tensors, image, row) for image, row in zip(images(), tokens, strict=True)])
    scores = reward(images(), PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert scores.std() > 0.1


def test_a_score_stands_alone_and_can_be_trained_on(reward: ImageReward) -> None:
    leaf = images().requires_grad_(True)
    scores = reward(leaf, PROMPTS)
    alone = torch.cat([reward(leaf[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)
    scores.sum().backward()
    assert leaf.grad is not None and (leaf.grad.flatten(1).abs().sum(1) > 0).all()
    broken = images()
    broken[1, 0, 0, 0] = torch.nan
    assert reward(broken, PROMPTS).isnan().tolist() == [False, True, False]
    assert reward(torch.rand(1, 3, 40, 56), PROMPTS[:1]).shape == (1,)
    with pytest.raises(ValueError, match="one prompt per image, not 2 for 3 images"):
        reward(images(), PROMPTS[:2])


def test_another_checkpoint_is_refused(reward: ImageReward, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    def opened(name: str, found: dict[str, Tensor]) -> Tensor:
        torch.save(found, tmp_path / name)
        return ImageReward(str(tmp_path / name), reward.tokenizer)(images(), PROMPTS)

    with pytest.raises(ValueError, match=r"not an ImageReward checkpoint: it has no tensors named blip\.visual"):
        opened("other.pt", {"visual.proj": torch.zeros(1)})
    without = {name: value for name, value in tensors.items() if "crossattention.self.query" not in name}
    with pytest.raises(ValueError, match=r"not the tensors of ImageReward's BLIP.*[\s\S]*crossattention\.self\.query"):
        opened("without.pt", without)


def test_weights_in_bfloat16_score_alike(reward: ImageReward) -> None:
    batch = torch.cat([images(), 1 - images()]).requires_grad_(True)
    prompts = PROMPTS * 2
    scores = replace(reward, dtype="bfloat16")(batch, prompts)
    require_alike(reward(batch.detach(), prompts), scores.detach(), 1.0)  # scores of these weights are around 40
    scores.sum().backward()
    assert batch.grad is not None and bool(batch.grad.isfinite().all()) and bool(batch.grad.abs().sum() > 0)
