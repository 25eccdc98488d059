from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from genalign.types import Prompt, Reward
from rewards import ocr
from rewards.ocr import OCRReward, rapidocr, requested_texts

needs_rapidocr = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("rapidocr", "onnxruntime")),
    reason="needs the extra ocr: rapidocr and onnxruntime",
)


def written(*lines: str, size: tuple[int, int] = (256, 256), ink: str = "black", paper: str = "white") -> torch.Tensor:
    """An image (1, 3, H, W) with these lines on it."""
    picture = Image.new("RGB", size, paper)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((20, 40 + 60 * i), line, fill=ink, font=ImageFont.load_default(36))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def test_the_requested_texts_of_a_prompt() -> None:
    assert requested_texts(Prompt('a sign that says "Open"')) == ("Open",)
    assert requested_texts(Prompt('“Yes” on the left, "No way" on the right')) == ("Yes", "No way")
    assert requested_texts(Prompt("a dog's bowl")) == ()
    assert requested_texts(Prompt('an empty "" sign and " "')) == ()
    assert requested_texts(Prompt('a "shop"', {"text": "SALE"})) == ("SALE",)
    assert requested_texts(Prompt("a shop", {"text": ["SALE", "50%"]})) == ("SALE", "50%")
    assert requested_texts(Prompt('a "shop"', {"tag": "ocr"})) == ("shop",)


def test_the_reader_is_replaceable_and_several_texts_are_averaged() -> None:
    reward = OCRReward(lambda picture: "red sing" if picture.getpixel((0, 0))[0] > 128 else "")
    assert isinstance(reward, Reward)
    images = torch.zeros(5, 3, 4, 4)
    images[:2, 0] = 1
    images[3, 1, 2, 2] = torch.nan
    prompts = [Prompt('"red" and "sign"'), Prompt('"RED"'), Prompt('"red"'), Prompt('"red"'), Prompt("no text")]
    scores = reward(images, prompts).tolist()
    assert scores[:3] == pytest.approx([(1 + 0) / 2, 1, 0])
    assert math.isnan(scores[3]) and math.isnan(scores[4])


@pytest.mark.slow
@needs_rapidocr
def test_text_is_read_line_by_line() -> None:
    images = torch.cat([written("OPEN", "24 hours", ink="white", paper="navy"), written()])
    prompts = [Prompt('a sign, "open 25 hours"'), Prompt('a "sign"')]
    assert OCRReward()(images, prompts).tolist() == pytest.approx([10 / 11, 0])
    assert rapidocr(ocr.pictures(images)[0]) == "OPEN\n24 hours"


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    ocr._engine.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'genalign\[ocr\]'"):
        rapidocr(Image.new("RGB", (8, 8)))
