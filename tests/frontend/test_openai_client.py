"""The official client reads our shapes: whole and streamed, with log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from frontend.fake_engine import MODEL, FakeEngine
from openai.types.chat import ChatCompletionTokenLogprob
from pagoda.text.tokenizer import Tokenizer

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def client(folder: Path, tokenizer: Tokenizer) -> openai.AsyncOpenAI:
    engine = FakeEngine(folder, tokenizer.vocab_size, lambda asked, index: tokenizer.encode("Hello Paris 日"))
    web = httpx.AsyncClient(transport=httpx.ASGITransport(engine.app()))
    return openai.AsyncOpenAI(base_url="http://pagoda/v1", api_key="none", max_retries=0, http_client=web)


async def test_chat(client: openai.AsyncOpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 3}
    whole = await client.chat.completions.create(**arguments)
    contents = [choice.logprobs.content or [] for choice in whole.choices if choice.logprobs is not None]
    assert len(contents) == 2
    for content in contents:
        assert b"".join(bytes(token.bytes or []) for token in content).decode() == "Hello Paris 日"
        assert all(len(token.top_logprobs) == 3 for token in content)
    streamed: list[list[ChatCompletionTokenLogprob]] = [[], []]
    async for chunk in await client.chat.completions.create(**arguments, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += (choice.logprobs.content or []) if choice.logprobs else []
    assert streamed == contents


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="The", echo=True, logprobs=2, best_of=2)
    [choice] = answer.choices
    assert choice.text == "TheHello Paris 日"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens[:3] == ["The", "Hello", " Paris"]
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens)


async def test_an_error_is_the_clients_own_kind(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model=MODEL, prompt="The", presence_penalty=3)
    assert caught.value.param == "presence_penalty"
    assert "presence_penalty must be in [-2, 2], not 3.0" in caught.value.message
