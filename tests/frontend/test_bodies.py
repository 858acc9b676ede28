"""Bodies that are hardly JSON, no object, empty, or deep: what their errors say, and what is text after all."""

from __future__ import annotations

import pytest
from frontend.fake_engine import FakeEngine

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"

HARDLY_JSON = [b'"\\ud800"', b"[" * 50_000, b"[" * 50_000 + b"]" * 50_000, b"1e400", b"NaN", b'"\xff"']


@pytest.mark.parametrize("name", ["stop", "response_format", "logit_bias", "tools", "no_such_field"])
@pytest.mark.parametrize("value", HARDLY_JSON, ids=["surrogate", "open", "deep", "huge", "NaN", "latin-1"])
async def test_values_that_are_hardly_json(engine: FakeEngine, name: str, value: bytes) -> None:
    body = b'{"model": "fake", "prompt": "The", "%s": %s}' % (name.encode(), value)
    answer = await engine.post_raw(TEXT, body)
    assert answer.status_code in ((400, 200) if name == "no_such_field" else (400,)), answer.text
    assert answer.status_code == 200 or answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"5"])
async def test_a_body_that_is_no_object_names_no_field(engine: FakeEngine, body: bytes) -> None:
    answer = await engine.post_raw(CHAT, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] is None
    assert "Expected `object`" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b" \n"])
async def test_an_empty_body_is_called_so(engine: FakeEngine, body: bytes) -> None:
    error = (await engine.post_raw(TEXT, body)).json()["error"]
    assert (error["message"], error["param"]) == ("the body is empty: send a JSON object", None)


HALVES = [
    r"\ud800",
    r"a \uD83D b and more",
    r"\ud83d\u0041 b",
    r"\ude00",
    r"\\\ud800",
    r"\ude00\ud83d",
    r"\ud83d\ude00\ud800",
]


@pytest.mark.parametrize("text", HALVES)
@pytest.mark.parametrize("name", ["prompt", "tools", "no_such_field"])
async def test_a_lone_surrogate_is_called_so(engine: FakeEngine, name: str, text: str) -> None:
    answer = await engine.post_raw(TEXT, f'{{"model": "fake", "prompt": "The", "{name}": "{text}"}}'.encode())
    assert answer.status_code == 400
    assert "is no text: send surrogates in pairs, or the character itself" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\\ud83d", r"\uD83D\uDE00\ud83d\ude00"])
async def test_a_pair_of_surrogates_is_text(engine: FakeEngine, text: str) -> None:
    body = f'{{"model": "fake", "prompt": "{text}"'
    assert (await engine.post_raw(TEXT, f"{body}}}".encode())).is_success
    assert "surrogate" not in (await engine.post_raw(TEXT, body.encode())).text


async def test_a_body_may_be_nested_as_deep_as_the_docs_say(engine: FakeEngine) -> None:
    body = b'{"model": "fake", "prompt": "The", "metadata": %s}' % (b"[" * 900 + b"]" * 900)
    assert (await engine.post_raw(TEXT, body)).status_code == 200
