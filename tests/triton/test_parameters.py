"""What a request may ask for, against the real server: the official client for what OpenAI defines, raw JSON for the
rest.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from pagoda.server import store
from pagoda.text.tokenizer import Tokenizer
from service import MODEL, Service
from transformers import AutoModelForCausalLM

PROMPT = "The capital of France is"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CLOSE = 1e-3
"""Log-probabilities of the same float32 weights, computed in another order."""


@pytest.fixture
def client(calm: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{calm.url}/v1", api_key="none", max_retries=0, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(store.models_dir() / store.DEFAULT_MODEL)


def post(service: Service, path: str = "completions", **fields: Any) -> tuple[int, dict[str, Any]]:
    base: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    base |= {"prompt": PROMPT} if path == "completions" else {"messages": QUESTION}
    body = json.dumps({**base, **fields}).encode()
    request = urllib.request.Request(f"{service.url}/v1/{path}", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def text_of(service: Service, **fields: Any) -> str:
    status, answer = post(service, **fields)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


# ── log-probabilities ─────────────────────────────────────────────────────────────────────────────────────────────


def true_logprobs(ids: list[int]) -> torch.Tensor:
    """transformers' own: row i predicts token i + 1."""
    model = AutoModelForCausalLM.from_pretrained(store.models_dir() / store.DEFAULT_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)


def test_logprobs_of_prompt_and_output_are_the_models_own(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3, echo=True)
    choice = answer.choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert "".join(found.tokens) == choice.text
    assert [choice.text[start : start + len(t)] for t, start in zip(found.tokens, found.text_offset, strict=True)] == (
        found.tokens
    )
    ids = tokenizer.encode(PROMPT) + tokenizer.encode("".join(found.tokens[len(tokenizer.encode(PROMPT)) :]))
    assert len(ids) == len(found.tokens)
    expected = true_logprobs(ids)
    assert found.token_logprobs[0] is None
    for place, (token, given) in enumerate(zip(ids[1:], found.token_logprobs[1:], strict=True)):
        assert abs(given - float(expected[place, token])) < CLOSE, place
        best = expected[place].topk(3).values
        top = sorted(found.top_logprobs[place + 1].values(), reverse=True)[:3]
        assert all(abs(a - float(b)) < CLOSE for a, b in zip(top, best, strict=True))


def test_chat_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**arguments)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    shown = [token for token in content if not token.token.startswith("<|")]
    assert "".join(token.token for token in shown) == whole.choices[0].message.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content), "greedy tokens are the best ones"
    assert all(bytes(token.bytes or []).decode() == token.token for token in content)
    chunks = client.chat.completions.create(**arguments, stream=True)
    streamed = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert [t.token for t in streamed] == [t.token for t in content]
    assert all(abs(a.logprob - b.logprob) < CLOSE for a, b in zip(streamed, content, strict=True))


def test_logprobs_are_the_models_own_whatever_is_done_to_the_logits(calm: Service, tokenizer: Tokenizer) -> None:
    """A forced token is reported with the probability that the model gave it."""
    [token] = tokenizer.encode(" Berlin")
    _, answer = post(calm, max_tokens=1, logprobs=1, logit_bias={str(token): 100})
    lists = answer["choices"][0]["logprobs"]
    assert lists["tokens"] == [" Berlin"]
    assert lists["token_logprobs"][0] < -2
    assert " Paris" in lists["top_logprobs"][0]


def test_prompt_logprobs_by_token_id(calm: Service, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    for path, fields in (("completions", {"n": 2}), ("chat/completions", {})):
        _, answer = post(calm, path, prompt_logprobs=2, **fields)
        reported = answer["choices"][-1]["prompt_logprobs"] if path == "completions" else answer["prompt_logprobs"]
        assert reported[0] is None
        assert len(reported) == answer["usage"]["prompt_tokens"]
        assert all(2 <= len(token) <= 3 for token in reported[1:])
        if path == "completions":
            assert [next(iter(token)) for token in reported[1:]] == [str(i) for i in ids[1:]]


def test_a_stop_string_cuts_text_and_logprobs_alike(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stop=[" is Par"], logprobs=True
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(token.token for token in logprobs.content or []) == "The capital of France"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


# ── several answers ───────────────────────────────────────────────────────────────────────────────────────────────


def test_answer_i_is_the_lone_one_of_seed_plus_i(client: openai.OpenAI) -> None:
    def draw(seed: int, n: int) -> openai.types.Completion:
        return client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, temperature=1.0, seed=seed, n=n, extra_body={"ignore_eos": True}
        )

    together = draw(7, 3)
    assert [c.text for c in together.choices] == [draw(7 + i, 1).choices[0].text for i in range(3)]
    assert len({c.text for c in together.choices}) > 1
    assert together.usage is not None
    assert together.usage.prompt_tokens == 5
    assert together.usage.completion_tokens == 36


def test_n_streamed_answers_end_once_each(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=1.0, seed=3, n=4, max_tokens=12)
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=1.0, seed=3, n=4, max_tokens=12, stream=True
    )
    texts, reasons = [""] * 4, [0] * 4
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason is not None
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [1] * 4


def test_best_of_shows_the_likeliest(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 10, "temperature": 1.5, "seed": 11}
    every = client.completions.create(**arguments, n=4, logprobs=0).choices

    def mean(choice: Any) -> float:
        return math.fsum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    best = client.completions.create(**arguments, best_of=4)
    assert [c.text for c in best.choices] == [max(every, key=mean).text]
    assert best.choices[0].logprobs is None
    assert best.usage is not None
    assert best.usage.completion_tokens == 40


# ── draws ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_draws_follow_the_models_own_distribution(calm: Service, tokenizer: Tokenizer) -> None:
    """1,024 first tokens, by transformers' logits; the chi-square of a fair draw is above this bound once in 10,000."""
    kept, temperature, ids = 12, 1.3, tokenizer.encode(PROMPT)
    fields = {"temperature": temperature, "top_k": kept, "max_tokens": 1, "n": 4, "ignore_eos": True, "logprobs": 0}
    status, answer = post(calm, prompt=[ids] * 256, skip_special_tokens=False, **fields)
    assert status == 200, answer
    drawn = Counter(choice["logprobs"]["tokens"][0] for choice in answer["choices"])
    best = true_logprobs(ids)[-1].topk(kept)
    chances = torch.softmax(best.values.double() / temperature, dim=0).tolist()
    names = [tokenizer.decode([token], skip_special_tokens=False) for token in best.indices.tolist()]
    expected = {name: 1024 * chance for name, chance in zip(names, chances, strict=True)}
    assert drawn.keys() <= expected.keys()
    assert sum((drawn[name] - want) ** 2 / want for name, want in expected.items()) < 35.0


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_filters_that_leave_the_best_token_are_greedy_at_any_temperature(calm: Service, path: str) -> None:
    """And a temperature close to 0 is."""
    filters: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}]
    with ThreadPoolExecutor(5) as pool:
        asked = [{}, *({"temperature": 5.0, **f} for f in filters)]
        answers = list(pool.map(lambda fields: post(calm, path, **fields)[1]["choices"][0], asked))
    texts = [answer.get("text") or answer["message"]["content"] for answer in answers]
    assert texts == texts[:1] * 5


# ── which tokens may come ─────────────────────────────────────────────────────────────────────────────────────────


def test_bad_words_do_not_come(calm: Service) -> None:
    assert " Paris" in text_of(calm)
    assert "Paris" not in text_of(calm, bad_words=["Paris"])


def test_only_allowed_tokens_come(calm: Service, tokenizer: Tokenizer) -> None:
    allowed = tokenizer.encode(" red green blue")
    text = text_of(calm, allowed_token_ids=allowed, temperature=1.5, seed=1, max_tokens=20, ignore_eos=True)
    assert set(text.split()) <= {"red", "green", "blue"}
    assert len(tokenizer.encode(text)) == 20


def test_a_bias_forces_and_forbids(calm: Service, tokenizer: Tokenizer) -> None:
    [paris], [berlin] = tokenizer.encode(" Paris"), tokenizer.encode(" Berlin")
    assert text_of(calm, logit_bias={str(berlin): 100}, max_tokens=3) == " Berlin" * 3
    assert " Paris" not in text_of(calm, logit_bias={str(paris): -100})


def test_a_frequency_penalty_ends_repetition(calm: Service, tokenizer: Tokenizer) -> None:
    fields: dict[str, Any] = {"prompt": "na na na na na na", "max_tokens": 40, "ignore_eos": True}
    plain, penalised = text_of(calm, **fields), text_of(calm, **fields, frequency_penalty=2, presence_penalty=2)
    assert len(set(tokenizer.encode(penalised))) > len(set(tokenizer.encode(plain)))
    once = tokenizer.encode(text_of(calm, **fields, repetition_penalty=10, presence_penalty=2, frequency_penalty=2))
    assert len(set(once)) > 30


def test_min_tokens_holds_back_end_and_stop(calm: Service, tokenizer: Tokenizer) -> None:
    _, short = post(calm, "chat/completions", max_tokens=60)
    _, long = post(calm, "chat/completions", max_tokens=60, min_tokens=40)
    assert short["usage"]["completion_tokens"] < 40 <= long["usage"]["completion_tokens"]
    status, answer = post(calm, max_tokens=12, min_tokens=6, stop=[" "])
    assert status == 200
    assert answer["usage"]["completion_tokens"] >= 6


def test_mixed_fields_in_one_batch_disturb_nobody(calm: Service) -> None:
    """Twelve requests at once, each with other fields, answer what they answer alone."""
    wishes: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 1, "top_k": 5},
        {"temperature": 0.8, "seed": 2, "min_p": 0.1},
        {"bad_words": ["Paris"]},
        {"logit_bias": {"260": 5}},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.3},
        {"logprobs": 5},
        {"prompt_logprobs": 1},
        {"min_tokens": 10, "stop": ["."]},
        {"n": 3, "temperature": 1.0, "seed": 5},
    ]
    alone = [[c["text"] for c in post(calm, max_tokens=16, **w)[1]["choices"]] for w in wishes]
    with ThreadPoolExecutor(len(wishes)) as pool:
        answers = list(pool.map(lambda w: post(calm, max_tokens=16, **w)[1], wishes))
    assert [[c["text"] for c in answer["choices"]] for answer in answers] == alone


# ── text and time ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_of_the_text_is_shown(calm: Service) -> None:
    assert text_of(calm, stop=["Paris"]) == " "
    assert text_of(calm, stop=["Paris"], include_stop_str_in_output=True) == " Paris"
    assert text_of(calm, echo=True).startswith(f"{PROMPT} Paris")
    _, hidden = post(calm, "chat/completions", max_tokens=60)
    _, shown = post(calm, "chat/completions", max_tokens=60, skip_special_tokens=False)
    assert shown["choices"][0]["message"]["content"] == hidden["choices"][0]["message"]["content"] + "<|im_end|>"


def test_a_stop_token_ends_the_answer_and_has_no_text(calm: Service, tokenizer: Tokenizer) -> None:
    [paris] = tokenizer.encode(" Paris")
    for included, shown in ((False, "The capital of France is"), (True, "The capital of France is Paris")):
        fields = {"stop_token_ids": [paris], "include_stop_str_in_output": included, "max_tokens": 20, "logprobs": True}
        _, answer = post(calm, "chat/completions", **fields)
        [choice] = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (shown, "stop")
        assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["content"]) == 6
        assert post(calm, "chat/completions", ignore_eos=True, **fields)[1]["choices"][0]["finish_reason"] == "stop"


def test_the_prompt_is_cut_to_its_last_tokens(calm: Service) -> None:
    status, answer = post(calm, prompt="word " * 20_000 + PROMPT, truncate_prompt_tokens=5)
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == 5
    assert " Paris" in answer["choices"][0]["text"]


def test_a_chat_may_use_all_that_is_left_of_the_context(calm: Service) -> None:
    _, answer = post(calm, "chat/completions", model="short", max_tokens=None, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 256


def test_a_deadline_ends_a_request_with_504(calm: Service) -> None:
    began = time.monotonic()
    status, answer = post(calm, max_tokens=8000, ignore_eos=True, timeout=1.0)
    assert status == 504
    assert answer["error"]["code"] == "deadline_exceeded"
    assert 0.9 < time.monotonic() - began < 3


def test_priorities_are_taken(calm: Service) -> None:
    for priority in (-100, 0, 100):
        assert " Paris" in text_of(calm, priority=priority)
