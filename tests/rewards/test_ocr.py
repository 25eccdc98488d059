from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from genalign.types import Prompt, Reward
from rewards import ocr
from rewards.backbones import text_engine
from rewards.ocr import OCRReward, cores_of_rank, rapidocr, requested_texts
from tests.packages import ROOT
from tests.rewards.text_readers import level, process_and_level

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
    text_engine.engine.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'genalign\[ocr\]'"):
        rapidocr(Image.new("RGB", (8, 8)))


def test_processes_read_as_one_does() -> None:
    levels = [7, 70, 255, 30, 200, 12, 128, 99]
    images = (torch.tensor(levels) / 255)[:, None, None, None].expand(-1, 3, 8, 8).clone()
    images[5] = torch.nan
    prompts = [Prompt(f'"{number}"') for number in (7, 7, 255, 31, 2, 12, 128, 99)]
    alone, pooled = OCRReward(level), OCRReward(level, processes=2)
    expected = alone(images, prompts)
    assert torch.equal(pooled(images, prompts).nan_to_num(-1), expected.nan_to_num(-1))

    reading = OCRReward(process_and_level, processes=2)
    listed = [picture for picture in ocr.pictures(images) if picture is not None]
    processes = {text.split()[0] for text in reading._read(listed)}
    assert len(processes) == 2 and str(os.getpid()) not in processes

    # A picture that cannot be read fails its call, and one that ends its process is followed by a new pool
    with pytest.raises(ValueError, match="a black picture"):
        reading._read([*listed, Image.new("RGB", (8, 8))])
    assert {text.split()[0] for text in reading._read(listed)} <= processes
    with pytest.raises(RuntimeError, match="a process that reads text has died; new ones start"):
        reading._read([*listed, Image.new("RGB", (4, 4))])
    again = {text.split()[0] for text in reading._read(listed)}
    assert again and not again & processes
    ocr._pool(2).shutdown()
    ocr._pool.cache_clear()


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    for ranks, cores in ((None, 16), ("8", 2), ("64", 1)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if ranks:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert cores_of_rank() == cores
    monkeypatch.setattr(ocr, "_pool", None)
    monkeypatch.setattr(text_engine, "read", lambda *arguments: str(arguments[2:]))
    assert OCRReward()._read([Image.new("RGB", (8, 8))] * 2) == ["(1,)"] * 2  # few cores: in this process


SCRIPT = """
import os, signal, sys, time
from PIL import Image
from rewards.ocr import OCRReward
from tests.rewards.text_readers import process_and_level

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background ignore
print("script")
pictures = [Image.new("RGB", (8, 8), (9, 9, 9))] * 8
print(*{text.split()[0] for text in OCRReward(process_and_level, 2)._read(pictures)}, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "interrupted":
    os.killpg(os.getpgrp(), signal.SIGINT)
    time.sleep(30)
"""


def _runs(process: str) -> bool:
    """Whether a process has not ended; who inherits those of a killed one may not have asked for their ends."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "interrupted", "done"])
def test_processes_end_with_theirs(how: str, tmp_path: Path) -> None:
    """Even in a script that does not guard what it does against being imported by them."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), how]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, env=environment, timeout=300, capture_output=True, text=True, start_new_session=True
    )
    first, processes = ended.stdout.splitlines()
    assert first == "script" and len(processes.split()) == 2
    interrupt = "KeyboardInterrupt" if how == "interrupted" else ""
    assert ended.stderr.strip().endswith(interrupt) and ended.stderr.count("Traceback") == bool(interrupt)
    deadline = time.monotonic() + 20
    while any(_runs(process) for process in processes.split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@needs_rapidocr
def test_rapidocr_reads_in_processes_as_in_this_one() -> None:
    images = torch.cat([written("OPEN"), written("24 hours"), written("SALE", ink="white", paper="navy")])
    prompts = [Prompt('"open"'), Prompt('"25 hours"'), Prompt('"sail"')]
    assert torch.equal(OCRReward(processes=2)(images, prompts), OCRReward(processes=1)(images, prompts))
