"""What a request's fields become: the engine's parameters, several answers and the best of them, usage, text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from frontend.fake_engine import FakeEngine
from pagoda import protocol as wire
from pagoda.errors import InvalidRequest
from pagoda.sampling_params import SamplingParams, Structure
from pagoda.text import parameters as text_parameters
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.wire import TextRequest
from pagoda_openai.refused import NEUTRAL
from pagoda_openai.requests import ChatRequest, CompletionRequest

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


async def params_of(engine: FakeEngine, path: str = TEXT, **fields: Any) -> SamplingParams:
    prompt = {"prompt": "The"} if path == TEXT else {"messages": MESSAGES}
    answer = await engine.post(path, **prompt, **fields)
    assert answer.status_code == 200, answer.text
    return engine.generates[-1].params


FIELDS = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "seed": -5,
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "repetition_penalty": 1.2,
    "min_tokens": 2,
    "ignore_eos": True,
    "stop_token_ids": [1, 2],
    "allowed_token_ids": [3, 4],
    "max_tokens": 9,
}


@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_every_field_reaches_the_engine(engine: FakeEngine, path: str) -> None:
    params = await params_of(engine, path, **FIELDS, logit_bias={"5": -100, "6": 1.5})
    for name, value in FIELDS.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value), name
    assert params.logit_bias == {5: -100, 6: 1.5}


@pytest.mark.parametrize(("path", "limit"), [(TEXT, 16), (CHAT, None)])
async def test_fields_left_out_or_null_are_neutral(engine: FakeEngine, path: str, limit: int | None) -> None:
    neutral = SamplingParams(max_tokens=limit)
    assert await params_of(engine, path) == neutral
    nulls = dict.fromkeys((*FIELDS, "n", "stop", "logit_bias", "logprobs", "bad_words", "priority", "timeout"))
    assert await params_of(engine, path, **{**nulls, "max_tokens": limit}) == neutral


async def test_the_models_defaults_stand_behind_the_requests_fields(engine: FakeEngine) -> None:
    defaults = SamplingParams(temperature=0.3, top_k=5, repetition_penalty=1.1)
    engine.facts = msgspec.structs.replace(engine.facts, default_params=defaults)
    params = await params_of(engine, CHAT, top_k=9)
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.3, 9, 1.1)


async def test_bad_words_with_and_without_a_space(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    params = await params_of(engine, bad_words=["Paris", "Hello"])
    plain = tuple(tokenizer.encode("Paris"))
    assert params.bad_words == (plain, tuple(tokenizer.encode(" Paris")), tuple(tokenizer.encode("Hello")))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, "json_schema"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema"),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark"),
    ],
)
async def test_structures(engine: FakeEngine, fields: dict[str, Any], kind: str) -> None:
    structure = (await params_of(engine, CHAT, **fields)).structure
    assert isinstance(structure, Structure)
    assert structure.kind == kind
    if kind == "json_schema":
        assert json.loads(structure.text) == SCHEMA


async def test_plain_text_is_no_structure(engine: FakeEngine) -> None:
    assert (await params_of(engine, CHAT, response_format={"type": "text"})).structure is None


async def test_priority_timeout_and_salt_travel_beside_the_parameters(engine: FakeEngine) -> None:
    await params_of(engine, priority=-3, timeout=2.5, cache_salt="tenant", n=2)
    sent = engine.generates[-1]
    assert (sent.priority, sent.timeout, sent.cache_salt, sent.n) == (-3, 2.5, "tenant", 2)


async def test_n_answers_to_each_prompt(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    answer = (await engine.post(TEXT, prompt=["The", "Paris"], n=3)).json()
    texts = ["Hello", "Hello Paris", "Hello Paris Paris"]
    assert [c["text"] for c in answer["choices"]] == texts * 2
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert [g.id for g in engine.generates] == [1, 4]
    prompt = len(tokenizer.encode("The")) + len(tokenizer.encode("Paris"))
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["completion_tokens"] == 2 * (1 + 2 + 3)
    assert answer["usage"]["total_tokens"] == prompt + 12


@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_n_answers_streamed(engine: FakeEngine, path: str) -> None:
    fields = {"prompt": "The"} if path == TEXT else {"messages": MESSAGES}
    events = await engine.events(path, **fields, n=3, stream_options={"include_usage": True})
    texts, reasons = ["", "", ""], []
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"] if path == TEXT else choice["delta"].get("content") or ""
            reasons += [choice["index"]] if choice["finish_reason"] else []
    assert texts == ["Hello", "Hello Paris", "Hello Paris Paris"]
    assert sorted(reasons) == [0, 1, 2]
    assert events[-1]["usage"]["completion_tokens"] == 6
    assert events[-1]["usage"]["prompt_tokens"] == len(engine.generates[0].prompt_ids)


async def test_best_of_shows_the_likeliest(folder: Path, tokenizer: Tokenizer) -> None:
    """A token's log-probability is (1 + id mod 8) / -8 here: the mean counts, whatever an answer's length."""
    answers = [[71, 71], [64, 66, 64], [70], [64, 64, 64, 64]]
    engine = FakeEngine(folder, tokenizer.vocab_size, lambda asked, index: answers[index])
    answer = (await engine.post(TEXT, prompt="The", n=2, best_of=4)).json()
    assert [c["text"] for c in answer["choices"]] == [tokenizer.decode(answers[3]), tokenizer.decode(answers[1])]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert [c["logprobs"] for c in answer["choices"]] == [None, None]
    assert engine.generates[0].params.logprobs == 0
    assert answer["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize(("included", "shown"), [(False, "Hello"), (True, "Hello Paris")])
async def test_the_stop_string_is_shown_when_asked_for(engine: FakeEngine, included: bool, shown: str) -> None:
    fields = {"prompt": "The", "n": 3, "stop": " Paris", "include_stop_str_in_output": included}
    answer = (await engine.post(TEXT, **fields)).json()
    assert [c["text"] for c in answer["choices"]] == ["Hello", shown, shown]
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "stop", "stop"]
    events = await engine.events(TEXT, **fields)
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == 2) == shown


async def test_min_tokens_lets_earlier_stop_strings_pass(folder: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello Paris Paris")
    engine = FakeEngine(folder, tokenizer.vocab_size, lambda asked, index: ids)
    answer = (await engine.post(TEXT, prompt="The", stop="Paris", min_tokens=2)).json()
    assert answer["choices"][0]["text"] == "Hello Paris "


@pytest.mark.parametrize(("skip", "text"), [(True, "Hello"), (False, "Hello<|end|>")])
async def test_control_tokens_are_shown_when_asked_for(
    folder: Path, tokenizer: Tokenizer, skip: bool, text: str
) -> None:
    ids = tokenizer.encode("Hello<|end|>")
    engine = FakeEngine(folder, tokenizer.vocab_size, lambda asked, index: ids)
    answer = (await engine.post(CHAT, messages=MESSAGES, skip_special_tokens=skip)).json()
    assert answer["choices"][0]["message"]["content"] == text


async def test_a_prompt_is_cut_to_its_last_tokens(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The Paris Hello" * 300)
    for prompt in ("The Paris Hello" * 300, ids):
        answer = await engine.post(TEXT, prompt=prompt, truncate_prompt_tokens=7)
        assert answer.status_code == 200, answer.text
        assert engine.generates[-1].prompt_ids == ids[-7:]
    await engine.post(CHAT, messages=MESSAGES, truncate_prompt_tokens=4)
    assert len(engine.generates[-1].prompt_ids) == 4


async def test_a_deadline_passed_is_504(engine: FakeEngine) -> None:
    async def fail(asked: wire.Generate, index: int) -> None:
        engine.feed(wire.Failed(asked.id + index, "deadline_exceeded", "timeout of 1 s has passed"))

    engine._answer = fail  # type: ignore[method-assign]
    answer = await engine.post(TEXT, prompt="The", timeout=1, n=2)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"


REFUSED = [
    (TEXT, {"n": 0}, "n"),
    (TEXT, {"n": 129}, "n"),
    (TEXT, {"n": 10**9}, "n"),
    (TEXT, {"n": True}, "n"),
    (TEXT, {"n": 2, "best_of": 1}, "best_of"),
    (TEXT, {"best_of": 129}, "best_of"),
    (TEXT, {"best_of": 2, "stream": True}, "best_of"),
    (CHAT, {"best_of": 2}, "best_of"),
    (TEXT, {"prompt": ["a"] * 100, "n": 11}, "n"),
    (TEXT, {"logprobs": 21}, "logprobs"),
    (TEXT, {"logprobs": -1}, "logprobs"),
    (TEXT, {"logprobs": True}, "logprobs"),
    (CHAT, {"logprobs": 2}, "logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": False, "top_logprobs": 0}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (TEXT, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (TEXT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (TEXT, {"prompt_logprobs": 20, "n": 128, "prompt": [5] * 400}, "prompt_logprobs"),
    (TEXT, {"echo": True, "logprobs": 20, "n": 128, "prompt": [5] * 400}, "logprobs"),
    (TEXT, {"echo": True, "logprobs": 20, "n": 4, "prompt": [[5] * 400] * 32}, "logprobs"),
    (CHAT, {"echo": True}, "echo"),
    (TEXT, {"echo": 1}, "echo"),
    (TEXT, {"suffix": "x"}, "suffix"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (TEXT, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    (CHAT, {"min_tokens": 511}, "min_tokens"),
    (TEXT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (TEXT, {"logit_bias": {"1.5": 1}}, "logit_bias"),
    (TEXT, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    (TEXT, {"logit_bias": {"5": 101}}, "logit_bias"),
    (TEXT, {"logit_bias": {"5": "1"}}, "logit_bias"),
    (TEXT, {"logit_bias": [1]}, "logit_bias"),
    (TEXT, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (TEXT, {"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias"),
    (TEXT, {"allowed_token_ids": []}, "allowed_token_ids"),
    (TEXT, {"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    (TEXT, {"allowed_token_ids": ["1"]}, "allowed_token_ids"),
    (TEXT, {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}, "allowed_token_ids"),
    (TEXT, {"bad_words": [""]}, "bad_words"),
    (TEXT, {"bad_words": ["a"] * 129}, "bad_words"),
    (TEXT, {"bad_words": ["a b" * 80]}, "bad_words"),
    (TEXT, {"bad_words": ["é" * 40]}, "bad_words"),
    (TEXT, {"bad_words": "a"}, "bad_words"),
    (TEXT, {"priority": 101}, "priority"),
    (TEXT, {"priority": 0.5}, "priority"),
    (TEXT, {"timeout": 0}, "timeout"),
    (TEXT, {"timeout": 86401}, "timeout"),
    (TEXT, {"cache_salt": "s" * 257}, "cache_salt"),
    (TEXT, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (TEXT, {"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"response_format": "json"}, "response_format"),
    (TEXT, {"structured_outputs": {"xml": "a"}}, "structured_outputs"),
    (TEXT, {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    (TEXT, {"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens"),
    (TEXT, {"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    (TEXT, {"guided_regex": "a"}, "guided_regex"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"tool_choice": "auto"}, "tool_choice"),
    (TEXT, {"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    (TEXT, {"use_beam_search": True}, "use_beam_search"),
    (CHAT, {"audio": {}}, "audio"),
    (TEXT, {"add_special_tokens": False}, "add_special_tokens"),
    (CHAT, {"add_special_tokens": True}, "add_special_tokens"),
    (CHAT, {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    (TEXT, {"return_token_ids": True}, "return_token_ids"),
    (TEXT, {"prompt_embeds": "QUJD"}, "prompt_embeds"),
    (CHAT, {"logits_processors": ["a.b"]}, "logits_processors"),
    (TEXT, {"truncation_side": "right"}, "truncation_side"),
    (CHAT, {"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    (CHAT, {"guided_whitespace_pattern": ""}, "guided_whitespace_pattern"),
    (CHAT, {"structural_tag": "{}"}, "structural_tag"),
    (TEXT, {"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
    (TEXT, {"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    (CHAT, {"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
    (CHAT, {"media_io_kwargs": {"video": {}}}, "media_io_kwargs"),
    (CHAT, {"include_reasoning": False}, "include_reasoning"),
    (TEXT, {"request_id": "a"}, "request_id"),
    (TEXT, {"max_completion_tokens": 5}, "max_completion_tokens"),
    (TEXT, {"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"continuous_usage_stats": "yes"}}, "stream_options"),
    (CHAT, {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "b"}}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
]


@pytest.mark.parametrize(("path", "fields", "param"), REFUSED)
async def test_bad_values_are_refused_by_name(
    engine: FakeEngine, path: str, fields: dict[str, Any], param: str
) -> None:
    base: dict[str, Any] = {"prompt": "The"} if path == TEXT else {"messages": MESSAGES}
    answer = await engine.post(path, **{**base, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert param in error["message"]
    assert len(error["message"]) < 600
    assert not engine.generates


@pytest.mark.parametrize("name", ["suffix", "tools", "use_beam_search", "guided_json", "chat_template", "echo"])
async def test_asking_for_nothing_is_not_refused(engine: FakeEngine, name: str) -> None:
    assert (await engine.post(CHAT, messages=MESSAGES, **{name: None})).status_code == 200
    assert (await engine.post(CHAT, messages=MESSAGES, tools=[], use_beam_search=False, length_penalty=1.0)).is_success


@pytest.mark.parametrize(("path", "base"), [(TEXT, {"prompt": "The"}), (CHAT, {"messages": MESSAGES})])
async def test_every_refused_field_has_values_that_ask_for_nothing(
    engine: FakeEngine, path: str, base: dict[str, Any]
) -> None:
    plain = {"add_special_tokens": path == TEXT, "stream_options": {"continuous_usage_stats": False}, "stream": True}
    assert (await engine.post(path, **base, **plain)).is_success
    served = (CompletionRequest if path == TEXT else ChatRequest).__struct_fields__
    for name, values in NEUTRAL.items():
        for value in (None, *values) if name not in served else ():
            answer = await engine.post(path, **base, **{name: value})
            assert answer.is_success, (name, value, answer.text)


async def test_a_refusal_says_what_to_send_instead(engine: FakeEngine) -> None:
    error = (await engine.post(TEXT, prompt="The", max_completion_tokens=5)).json()["error"]
    assert "send max_tokens instead" in error["message"]


async def test_an_answer_may_be_sent_back_as_the_client_holds_it(engine: FakeEngine) -> None:
    nothing = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []}
    messages = [*MESSAGES, {"role": "assistant", "content": "Yes.", **nothing}, *MESSAGES]
    assert (await engine.post(CHAT, messages=messages)).is_success


async def test_a_refused_message_is_named_by_its_place(engine: FakeEngine) -> None:
    refused = {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}
    answer = await engine.post(CHAT, messages=[*MESSAGES, refused])
    assert f"messages[{len(MESSAGES)}].tool_calls is not available" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            {"role": "bogus", "content": "a"},
            "messages[1].role must be one of 'system', 'developer', 'user', 'assistant', 'tool'; not 'bogus'",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]},
            "messages[1].content[1] is of type 'text' and has no text: give it one",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[1].content[0] is of type 'image_url': only parts of type 'text' are available here",
        ),
    ],
)
async def test_a_message_that_is_no_text_is_told_what_it_lacks(
    engine: FakeEngine, message: dict[str, Any], said: str
) -> None:
    error = (await engine.post(CHAT, messages=[*MESSAGES, message])).json()["error"]
    assert (error["message"], error["param"]) == (said, "messages")


@pytest.mark.parametrize("text", ["é" * 260, "Hello" * 20_000], ids=["by its tokens", "before it is tokenized"])
@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_what_is_too_long_is_named_as_the_endpoint_calls_it(engine: FakeEngine, path: str, text: str) -> None:
    name, value = ("prompt", text) if path == TEXT else ("messages", [{"role": "user", "content": text}])
    answer = await engine.post(path, **{name: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, name)
    assert error["message"].startswith(f"{name} ")
    assert "context of 512 tokens" in error["message"]


async def test_bad_words_beside_a_structure_are_shown_as_words(engine: FakeEngine) -> None:
    error = (await engine.post(TEXT, prompt="The", bad_words=["Paris"], response_format={"type": "json_object"})).json()
    assert error["error"]["param"] == "bad_words"
    assert error["error"]["message"].endswith("leave one of them out, not bad_words=['Paris']")


def test_bad_words_beside_a_structure_are_shown_as_words_by_the_text_contract_too(tokenizer: Tokenizer) -> None:
    raw = json.dumps({"bad_words": ["Paris"], "structured_outputs": {"regex": "a"}})
    with pytest.raises(InvalidRequest, match=r"not bad_words=\['Paris'\]") as refused:
        text_parameters.parse(TextRequest(1, "The", False, {}, raw, None, False, False, False), tokenizer)
    assert refused.value.field == "bad_words"


async def test_a_type_error_shows_the_value(engine: FakeEngine) -> None:
    error = (await engine.post(TEXT, prompt="The", temperature="hot")).json()["error"]
    assert error["param"] == "temperature"
    assert '"hot"' in error["message"]
