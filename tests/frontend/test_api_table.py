"""docs/api.md is up to date, and every field in it says what it means."""

from __future__ import annotations

from pathlib import Path

import pytest
from pagoda.text.parameters import _Given
from pagoda_openai import api_table

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text("utf-8")
    assert api_table.updated(page) == page, "run: python -m pagoda_openai.api_table docs/api.md"


def test_the_text_contract_is_listed() -> None:
    section = PAGE.read_text("utf-8").partition("## Triton's text inputs")[2]
    assert [name for name in _Given.__struct_fields__ if f"`{name}`" not in section] == []


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="the page must hold the lines"):
        api_table.updated("# nothing here\n")
