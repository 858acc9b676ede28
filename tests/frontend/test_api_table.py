"""docs/api.md is up to date, and every field in it says what it means."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import pytest
from pagoda.structured.limits import MAX_TEXT_BYTES, TRIAL_MEMORY_BYTES
from pagoda.text.parameters import _Given
from pagoda.text.structured_outputs import KEYS
from pagoda_openai import api_table
from pagoda_openai.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text("utf-8")
    assert api_table.updated(page) == page, "run: python -m pagoda_openai.api_table docs/api.md"


def test_the_text_contract_is_listed() -> None:
    section = PAGE.read_text("utf-8").partition("## Triton's text inputs")[2]
    assert [name for name in _Given.__struct_fields__ if f"`{name}`" not in section] == []


def test_parameters_that_hold_lists_or_objects_are_told_where_to_go() -> None:
    """Triton's `/generate` takes none as a request's own parameter; a structure may also be JSON in a string."""
    [told] = [p for p in PAGE.read_text("utf-8").split("\n\n") if p.startswith("On plain `/generate`")]
    hints = {name: str(hint) for name, hint in get_type_hints(_Given).items()}
    held = [name for name, hint in hints.items() if ("list" in hint or "dict" in hint) and name != "structured_outputs"]
    assert held
    assert [name for name in held if f"`{name}`" not in told] == []


def test_the_bounds_are_those_of_the_code() -> None:
    section = PAGE.read_text("utf-8").partition("## Bounds of a request")[2].partition("\n## ")[0]
    for bound in (Settings().max_body_bytes, MAX_TEXT_BYTES):
        assert f"at most {bound:,} bytes" in section
    assert f"{TRIAL_MEMORY_BYTES >> 20} MiB" in section


def test_every_key_of_structured_outputs_is_listed() -> None:
    [row] = [line for line in PAGE.read_text("utf-8").split("\n") if line.startswith("| `structured_outputs`")]
    assert [key for key in KEYS if f"`{key}`" not in row] == []


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="the page must hold the lines"):
        api_table.updated("# nothing here\n")
