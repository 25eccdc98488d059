"""PP-OCR in a process of its own; imports little, since every process of a pool imports it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from multiprocessing.synchronize import Barrier
from typing import Any

from PIL import Image


@functools.cache
def engine(threads: int) -> Any:
    """Open rapidocr with this number of threads, once per process. Raises ModuleNotFoundError without the package."""
    try:
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("OCR needs rapidocr and onnxruntime: pip install 'genalign[ocr]'") from error
    setting = "EngineConfig.onnxruntime.intra_op_num_threads"
    return RapidOCR(params={"Global.log_level": "critical", setting: threads})


def read(picture: Image.Image, least_confidence: float = 0.5, threads: int = 1) -> str:
    """Read the lines of a picture from top to bottom, without those of low confidence."""
    output = engine(threads)(picture, text_score=least_confidence)
    return "\n".join(output.txts or ())


def start(others: Barrier) -> None:
    """Prepare a process of a pool: it waits for the others, and ends when its parent has ended, however that did."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="genalign-parent", daemon=True).start()
    others.wait()
