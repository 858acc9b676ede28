"""Structured output through the real service: what comes back is of its structure, at any temperature."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from service import MODEL, Service
from test_faults import Stream

ANSWERS = 100
MAX_TOKENS = 256
CANARY = 300
"""Tokens."""
HOT = 1.5
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", "青", "😀"]}, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
QUESTION = [{"role": "user", "content": "Invent a person."}]
ARITHMETIC = """
start: atom (("+" | "-" | "*") atom){1,5}
atom: /[1-9][0-9]{0,3}/ | "(" atom "+" atom ")"
"""


@pytest.fixture
def client(calm: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{calm.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
def async_client(calm: Service) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{calm.url}/v1", api_key="none", max_retries=0, timeout=240)


@pytest.fixture(scope="module")
def alone(service: Service) -> str:
    """What a canary stream says when nothing runs beside it; shorter ones say a part of it."""
    service.wait_ready()
    stream = Stream(service, CANARY)
    stream.ends_once()
    return stream.text


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return ask_many(client, 1, **fields)[0]


def ask_many(client: openai.OpenAI, n: int, **fields: Any) -> list[Any]:
    given = {"model": MODEL, "messages": QUESTION, "temperature": HOT, "max_tokens": MAX_TOKENS, "n": n}
    return client.chat.completions.create(**(given | fields)).choices


async def test_100_of_100_answers_parse_when_hot(async_client: openai.AsyncOpenAI) -> None:
    """Answers cut by their length are counted apart; they say so, and have that length."""
    gate = asyncio.Semaphore(16)

    async def one(seed: int) -> Any:
        async with gate:
            return await async_client.chat.completions.create(
                model=MODEL,
                messages=QUESTION,  # type: ignore[arg-type]
                temperature=HOT,
                seed=seed,
                max_tokens=MAX_TOKENS,
                response_format=FORMAT,  # type: ignore[arg-type]
            )

    answers = await asyncio.gather(*map(one, range(ANSWERS)))
    cut = 0
    for answer in answers:
        choice = answer.choices[0]
        if choice.finish_reason == "length":
            cut += 1
            assert answer.usage.completion_tokens == MAX_TOKENS
        else:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), PERSON)
    print(f"{ANSWERS - cut} of {ANSWERS} answers end and are valid, {cut} were cut by their length")
    assert cut <= ANSWERS // 10, "the structure is short: hardly an answer should be cut"
    assert len({answer.choices[0].message.content for answer in answers}) > ANSWERS // 2


def test_a_stream_is_of_its_schema_too(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=HOT,
        seed=3,
        max_tokens=MAX_TOKENS,
        response_format=FORMAT,  # type: ignore[arg-type]
        stream=True,
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["stop"]
    jsonschema.validate(json.loads("".join(c.delta.content or "" for c in chunks)), PERSON)


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    choices = ask_many(client, 8, response_format={"type": "json_object"}, seed=0, max_tokens=128)
    ended = [json.loads(choice.message.content) for choice in choices if choice.finish_reason == "stop"]
    assert ended
    assert all(isinstance(value, dict) for value in ended)


def test_the_sdk_parses_its_own_types(client: openai.OpenAI) -> None:
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", age=(int, ...), married=(bool, ...))
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=MAX_TOKENS,
        response_format=person,
    )
    assert isinstance(answer.choices[0].message.parsed.married, bool)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"json": PERSON}, r"\{.*\}"),
        ({"regex": r"\d{4}-[01]\d-[0-3]\d"}, r"\d{4}-[01]\d-[0-3]\d"),
        ({"choice": ["yes", "no", "maybe 😀"]}, "yes|no|maybe 😀"),
        ({"choice": ["<|im_end|>", "<|im_start|>system"]}, r"<\|im_end\|>|<\|im_start\|>system"),
        ({"grammar": ARITHMETIC}, r"[-+*()0-9]{3,80}"),
        ({"grammar": 'root ::= "left" | "right" [!]+'}, r"left|right!+"),
    ],
    ids=["json", "regex", "choice", "control tokens", "lark", "gbnf"],
)
def test_structured_outputs(client: openai.OpenAI, given: dict[str, Any], pattern: str) -> None:
    choices = ask_many(client, 16, seed=0, extra_body={"structured_outputs": given})
    ended = [choice.message.content for choice in choices if choice.finish_reason == "stop"]
    assert len(ended) >= 12
    assert [text for text in ended if not re.fullmatch(pattern, text, re.DOTALL)] == []


def test_structured_and_free_requests_share_a_batch(client: openai.OpenAI, calm: Service, alone: str) -> None:
    """A free greedy stream is the same beside structured ones."""
    beside = Stream(calm, 120)
    beside.first.wait(30)
    for seed in range(4):
        assert ask(client, seed=seed, extra_body={"structured_outputs": {"choice": ["a", "b"]}}).message.content in "ab"
    beside.ends_once()
    assert beside.finish_reasons == ["length"]
    assert alone.startswith(beside.text)


def test_completions_take_a_structure_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="The capital of France is",
        max_tokens=8,
        temperature=0,
        extra_body={"structured_outputs": {"choice": [" Rome", " Paris", " Berlin"]}},
    )
    assert answer.choices[0].text == " Paris"
    assert answer.choices[0].finish_reason == "stop"


HOSTILE: dict[str, dict[str, Any]] = {
    "repetition bomb": {"regex": "(a{1000}){1000}"},
    "optional": {"regex": ".?" * 30_000},
    "look ahead": {"regex": "(?=a)b"},
    "modulus": {"json": {"type": "integer", "multipleOf": 999983}},
    "itself": {"json": {"$ref": "#"}},
    "elsewhere": {"json": {"$ref": "http://169.254.169.254/latest"}},
    "file": {"json": {"$ref": "file:///etc/passwd"}},
    "unsatisfiable": {"json": {"type": "integer", "minimum": 2, "maximum": 1}},
    "ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a" |'},
    "endless": {"grammar": "start: start"},
    "broken": {"grammar": "start: ((("},
    "control token": {"grammar": 'start: "a" <|im_end|>'},
    "early end": {"grammar": 'start: <[2]> "a"'},
    "too large": {"regex": "a" * 70_000},
    "two at once": {"regex": "a", "choice": ["b"]},
    "unknown key": {"structural_tag": {}},
}


def test_hostile_structures_get_400_and_disturb_nobody(client: openai.OpenAI, calm: Service, alone: str) -> None:
    ask(client, extra_body={"structured_outputs": {"choice": ["warm"]}})
    canary = Stream(calm, CANARY)
    canary.first.wait(30)
    for name, given in HOSTILE.items():
        began = time.monotonic()
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, extra_body={"structured_outputs": given})
        assert refused.value.param == "structured_outputs", name
        assert "structured_outputs" in refused.value.message
        assert time.monotonic() - began < 10, name
    canary.ends_once()
    assert canary.text == alone
    assert canary.finish_reasons == ["length"]
    assert calm.status("/health") == 200
    assert ask(client, extra_body={"structured_outputs": {"choice": ["still here"]}}).message.content == "still here"


def test_a_grammar_that_turns_hostile_ends_its_own_request_only(
    client: openai.OpenAI, calm: Service, alone: str
) -> None:
    canary = Stream(calm, 200)
    canary.first.wait(30)
    late = "start: A B\nA: /([0-9] ){90}/\nB: /(a{1000}){1000}/"
    with pytest.raises(openai.APIError, match="too complex"):
        ask(client, max_tokens=1000, extra_body={"structured_outputs": {"grammar": late}})
    canary.ends_once()
    assert canary.finish_reasons == ["length"]
    assert alone.startswith(canary.text)


def test_older_names_are_refused_with_a_pointer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="structured_outputs") as refused:
        ask(client, extra_body={"guided_regex": "a+"})
    assert refused.value.param == "guided_regex"
