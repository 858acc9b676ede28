"""A request's words about structure, read without the engine."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pagoda.errors import InvalidRequest
from pagoda.sampling_params import Structure
from pagoda.text.structured_outputs import GUIDED, guided_refusal, structure_of

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
TEXT = '{"type":"object","properties":{"b":{},"a":{}}}'
"""The order of properties is kept."""


def wrapped(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize(
    ("response_format", "structured_outputs", "expected"),
    [
        (None, None, None),
        ({"type": "text"}, None, None),
        (None, {}, None),
        ({"type": "text"}, {"json": None, "json_object": False}, None),
        ({"type": "json_object"}, None, Structure("json_object")),
        (wrapped(SCHEMA), None, Structure("json_schema", TEXT)),
        (None, {"json": SCHEMA}, Structure("json_schema", TEXT)),
        (None, {"json": '{"type": "object", "properties": {"b": {}, "a": {}}}'}, Structure("json_schema", TEXT)),
        (None, {"json_object": True, "regex": None}, Structure("json_object")),
        (None, {"regex": "a+"}, Structure("regex", "a+")),
        (None, {"choice": ["ja", "nein", "😀"]}, Structure("choice", '["ja","nein","😀"]')),
        (None, {"grammar": 'start: "a"'}, Structure("lark", 'start: "a"')),
        ({"type": "text"}, {"regex": "a"}, Structure("regex", "a")),
    ],
)
def test_what_is_asked_for(response_format: Any, structured_outputs: Any, expected: Structure | None) -> None:
    assert structure_of(response_format, structured_outputs) == expected


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("field", "given", "why"),
    [
        ("response_format", {}, "must have one of these"),
        ("response_format", {"type": "yaml"}, "'yaml'"),
        ("response_format", {"type": "structural_tag"}, "'structural_tag'"),
        ("response_format", {"type": ["x"] * 1000}, "…"),
        ("response_format", {"type": "json_schema"}, "needs json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "needs json_schema"),
        ("response_format", wrapped(None), "as an object, not None"),
        ("response_format", wrapped([1]), r"as an object, not \[1\]"),
        ("response_format", wrapped("{"), "not valid JSON"),
        ("response_format", wrapped("[" * 100_000), "not valid JSON|nested too deeply"),
        ("response_format", wrapped(nested(100_000)), "nested too deeply"),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, "one of its keys, not regex and choice"),
        ("structured_outputs", {"regex": 1}, "a string for regex, not 1"),
        ("structured_outputs", {"regex": ""}, "a string for regex"),
        ("structured_outputs", {"grammar": ["a"]}, "a string for grammar"),
        ("structured_outputs", {"choice": []}, "a list of strings"),
        ("structured_outputs", {"choice": ["a", 1]}, "a list of strings"),
        ("structured_outputs", {"choice": [""]}, "a list of strings"),
        ("structured_outputs", {"json": True}, "as an object, not True"),
        ("structured_outputs", {"json": False}, "as an object, not False"),
        ("structured_outputs", {"regex": False}, "a string for regex, not False"),
        ("structured_outputs", {"json_object": "yes"}, "true or false"),
        ("structured_outputs", {"json_object": 0}, "true or false"),
        ("structured_outputs", {"structural_tag": {}}, "has no key 'structural_tag'; its keys are json, regex"),
        ("structured_outputs", {"whitespace_pattern": " *", "json": {}}, "has no key 'whitespace_pattern'"),
    ],
)
def test_refusals_name_the_field_and_what_is_allowed(field: str, given: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as refused:
        structure_of(**{"response_format": None, "structured_outputs": None, field: given})
    assert refused.value.field == field
    assert refused.value.message.startswith(field)
    assert len(refused.value.message) < 300


def test_both_fields_at_once_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot go together with response_format"):
        structure_of({"type": "json_object"}, {"regex": "a"})


def test_older_names_point_to_the_new_field() -> None:
    for name, key in GUIDED.items():
        error = guided_refusal(name)
        assert error.field == name
        assert f'structured_outputs: {{"{key}": …}}' in error.message


def test_reading_it_needs_neither_torch_nor_llguidance() -> None:
    code = "import sys, pagoda.text.structured_outputs; assert not {'torch', 'llguidance', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
