"""Readers of text that other processes can import."""

from __future__ import annotations

import os
import time

from PIL import Image


def process_and_level(picture: Image.Image) -> str:
    """The process, and how bright the picture is; one that is black is refused, and ends the process if it is small."""
    level = picture.getpixel((0, 0))
    assert isinstance(level, tuple)
    if level[0] == 0:
        if picture.width < 8:
            os._exit(3)
        raise ValueError("a black picture")
    time.sleep(0.02)  # so that no process reads all of them
    return f"{os.getpid()} {level[0]}"


def level(picture: Image.Image) -> str:
    return process_and_level(picture).partition(" ")[2]
