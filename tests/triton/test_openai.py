"""The official OpenAI client against the real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from lone_judge import LoneJudge
from pagoda.server import store
from pagoda.text.tokenizer import Tokenizer
from service import MODEL, Service

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(calm: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{calm.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
def async_client(calm: Service) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{calm.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_chat_answers_and_streams_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_models_are_listed_with_their_context(client: openai.OpenAI) -> None:
    found = {m.id: m.max_model_len for m in client.models.list().data}  # type: ignore[attr-defined]
    assert found == {MODEL: 8192, "short": 256}
    assert client.models.retrieve("short").id == "short"
    with pytest.raises(openai.NotFoundError, match="loaded models: short, smollm2"):
        client.models.retrieve("absent")


def test_both_models_answer_by_name(client: openai.OpenAI) -> None:
    for name in (MODEL, "short"):
        answer = client.chat.completions.create(model=name, messages=QUESTION, temperature=0)
        assert answer.model == name
        assert "Paris" in (answer.choices[0].message.content or "")
    with pytest.raises(openai.BadRequestError, match="context of 256 tokens by"):
        client.completions.create(model="short", prompt="hello", max_tokens=300)


async def test_32_at_once_finish_once_each(async_client: openai.AsyncOpenAI) -> None:
    async def one(i: int) -> list[str]:
        messages = [{"role": "user", "content": f"Name {i + 2} animals."}]
        stream = await async_client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=24, temperature=0, stream=True
        )
        return [c.choices[0].finish_reason async for c in stream if c.choices and c.choices[0].finish_reason]

    reasons = await asyncio.gather(*(one(i) for i in range(32)))
    assert all(len(r) == 1 and r[0] in ("stop", "length") for r in reasons), reasons


async def test_greedy_text_equals_the_lone_run_and_transformers(async_client: openai.AsyncOpenAI) -> None:
    """20 prompts of mixed length at once, every fourth alone, all by transformers: the same but for near ties."""
    prompts = [
        " ".join(f"Fact {k}: the number {k * i} is interesting." for k in range(1 + 3 * i)) for i in range(1, 21)
    ]

    async def complete(prompt: str) -> str:
        answer = await async_client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=64, temperature=0, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    together = await asyncio.gather(*map(complete, prompts))
    alone = [await complete(prompt) for prompt in prompts[::4]]
    judge = LoneJudge()
    answers = {*zip(prompts, together, strict=True), *zip(prompts[::4], alone, strict=True)}
    near_ties = sum(judge.check_text(prompt, text) for prompt, text in answers)
    print(f"near ties among {20 * 64} tokens: {near_ties}")
    assert near_ties <= 2


def test_completion_of_several_prompts_and_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["The capital of France is", "2 + 2 ="], max_tokens=4, temperature=0
    )
    assert [c.index for c in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text
    ids = Tokenizer.from_folder(store.models_dir() / store.DEFAULT_MODEL).encode("The capital of France is")
    same = client.completions.create(model=MODEL, prompt=ids, max_tokens=4, temperature=0)
    assert same.choices[0].text == answer.choices[0].text
    assert same.usage is not None
    assert same.usage.prompt_tokens == len(ids)


def test_stop_string_never_leaks_and_counts_agree(client: openai.OpenAI) -> None:
    arguments = {"model": MODEL, "messages": QUESTION, "temperature": 0, "stop": [" is Par"]}
    whole = client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == "The capital of France"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == 6
    stream = client.chat.completions.create(**arguments, stream=True)  # type: ignore[call-overload]
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert text == "The capital of France"


def test_seeded_sampling_repeats(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=24, temperature=1.2, seed=seed
        )
        return answer.choices[0].text

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_length_is_told_truthfully(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Count: 1, 2, 3,", max_tokens=5, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
