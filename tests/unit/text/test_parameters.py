"""The parameters of Triton's text inputs: vLLM's names, numbers as strings, refusals by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from pagoda.errors import InvalidRequest
from pagoda.sampling_params import SamplingParams, Structure
from pagoda.text.parameters import TextParameters, parse
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.wire import TextRequest


def request_of(parameters: dict[str, Any], raw: str = "") -> TextRequest:
    return TextRequest(1, "text", False, parameters, raw, None, False, False, False)


def asking(shown: str, **parameters: Any) -> TextRequest:
    """A request with one of the return_… inputs."""
    return msgspec.structs.replace(request_of(parameters), **{shown: True})


def parse_json(tokenizer: Tokenizer, **fields: Any) -> TextParameters:
    return parse(request_of({}, json.dumps(fields)), tokenizer)


def test_defaults_are_vllms(llama: Tokenizer) -> None:
    assert parse(request_of({}), llama) == TextParameters(
        SamplingParams(max_tokens=16),
        stop=(),
        include_stop=False,
        skip_special_tokens=True,
        priority=0,
        timeout=None,
        cache_salt="",
        n=1,
        best_of=1,
    )


def test_every_parameter(llama: Tokenizer) -> None:
    given = parse_json(
        llama,
        max_tokens=None,
        min_tokens=2,
        temperature=0.5,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        logit_bias={"7": -1.5},
        allowed_token_ids=[4, 5],
        bad_words=["hello"],
        stop=["a", "b"],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        stop_token_ids=[9],
        priority=3,
        timeout=1.5,
        cache_salt="tenant",
        n=3,
        best_of=5,
        prompt_logprobs=2,
    )
    words = given.sampling.bad_words
    assert tuple(llama.encode("hello", add_special_tokens=False)) in words
    assert given.sampling == SamplingParams(
        max_tokens=None,
        min_tokens=2,
        temperature=0.5,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        logit_bias={7: -1.5},
        allowed_token_ids=(4, 5),
        bad_words=words,
        stop_token_ids=(9,),
        logprobs=0,
        prompt_logprobs=2,
    )
    assert (given.n, given.best_of) == (3, 5)
    assert (given.stop, given.include_stop, given.skip_special_tokens) == (("a", "b"), True, False)
    assert (given.priority, given.timeout, given.cache_salt) == (3, 1.5, "tenant")


def test_numbers_and_truths_may_be_strings(llama: Tokenizer) -> None:
    given = parse(request_of({"temperature": "0.5", "min_tokens": "3", "ignore_eos": "true", "stop": "x"}), llama)
    assert (given.sampling.temperature, given.sampling.min_tokens, given.sampling.ignore_eos) == (0.5, 3, True)
    assert not parse(request_of({"ignore_eos": "false"}), llama).sampling.ignore_eos
    assert given.stop == ("x",)


@pytest.mark.parametrize("given", [{"regex": "a+"}, '{"regex": "a+"}'])
def test_a_structure_is_an_object_or_its_json(llama: Tokenizer, given: Any) -> None:
    assert parse_json(llama, structured_outputs=given).sampling.structure == Structure("regex", "a+")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "two"}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"min_tokens": "many"}, "min_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words"),
        ({"cache_salt": "s" * 257}, "cache_salt"),
        ({"stop": [1]}, "stop"),
        ({"structured_outputs": "{"}, "structured_outputs"),
        ({"structured_outputs": "[]"}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"priority": 101}, "priority"),
        ({"timeout": "0"}, "timeout"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_what_cannot_be_served_is_named(llama: Tokenizer, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(llama, **fields)
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (request_of({}), None),
        (request_of({"logprobs": 3}), None),
        (asking("return_logprobs", logprobs=3), 3),
        (asking("return_logprobs"), 0),
        (asking("return_cumulative_logprob"), 0),
        (asking("return_cumulative_logprob", logprobs=3), 0),
        (request_of({"best_of": 2}), 0),
        (request_of({"n": 2, "best_of": 2}), None),
    ],
    ids=lambda value: None,
)
def test_logprobs_are_computed_only_for_who_shows_or_ranks_by_them(
    llama: Tokenizer, request_: TextRequest, expected: int | None
) -> None:
    assert parse(request_, llama).sampling.logprobs == expected


def test_a_choice_among_more_answers_cannot_be_streamed(llama: Tokenizer) -> None:
    streamed = msgspec.structs.replace(request_of({"n": 2, "best_of": 3}), stream=True)
    with pytest.raises(InvalidRequest, match="best_of=3 cannot be streamed"):
        parse(streamed, llama)
    assert parse(msgspec.structs.replace(request_of({"n": 2, "best_of": 2}), stream=True), llama).n == 2
