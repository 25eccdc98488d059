"""The table of settings and the page of them are current."""

from __future__ import annotations

import json

from scripts.settings_reference import PAGE, TABLE, page, table


def test_the_table_and_the_page_of_settings_are_current() -> None:
    content = table()
    remedy = "run python -m scripts.settings_reference"
    assert json.loads(TABLE.read_text("utf-8")) == content, remedy
    assert PAGE.read_text("utf-8") == page(content), remedy
