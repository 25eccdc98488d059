"""Warnings of libraries appear once, in words that help."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from genalign.runtime.library_logs import quiet_libraries
from pipelines import SD3


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """What diffusers and transformers print."""
    stream, loggers = io.StringIO(), [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [(logger, logger.handlers, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.level = [logging.StreamHandler(stream)], logging.WARNING
    yield stream
    for logger, handlers, level in before:
        logger.handlers, logger.level = handlers, level


def test_prompts_that_are_cut_have_one_warning_for_each_length(tiny: SD3, printed: io.StringIO) -> None:
    quiet_libraries()
    quiet_libraries()
    for number in range(2):
        tiny.encode([f"a red circle {number} " * 60])
    lines = printed.getvalue().splitlines()
    assert len(lines) == len(set(lines)) and 1 <= len(lines) <= 2
    assert all("the rest of longer ones is cut" in line for line in lines)


def test_other_records_pass(printed: io.StringIO) -> None:
    quiet_libraries()
    logging.getLogger("diffusers.loaders").warning("of use")
    logging.getLogger("transformers.tokenization_utils_base").warning("of use, too")
    assert printed.getvalue() == "of use\nof use, too\n"
