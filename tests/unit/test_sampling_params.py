"""Every bound of every field, from both sides; each refusal names field, value and range."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pagoda.errors import InvalidRequest
from pagoda.sampling_params import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_PROMPT_REPORTS,
    MAX_STOP_TOKEN_IDS,
    RANGES,
    SamplingParams,
    Structure,
    check,
    check_length,
    check_request,
)

VOCABULARY = 1000
REGEX = Structure("regex", "a+")

GOOD: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 100},
    {"top_p": 1e-9},
    {"top_k": -1},
    {"top_k": 0},
    {"min_p": 0},
    {"min_p": 1},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"repetition_penalty": 1e-9},
    {"repetition_penalty": 10},
    {"min_tokens": 4, "max_tokens": 4},
    {"min_tokens": 4},
    {"logprobs": 0, "prompt_logprobs": 20},
    {"logit_bias": {0: -100, 999: 100}},
    {"logit_bias": dict.fromkeys(range(1000), 1.0)},
    {"allowed_token_ids": (0, 999)},
    {"allowed_token_ids": (5, 6), "bad_words": ((5,),), "stop_token_ids": (6,)},
    {"bad_words": ((1,) * MAX_BAD_WORD_TOKENS,) * MAX_BAD_WORDS},
    {"stop_token_ids": (999,) * MAX_STOP_TOKEN_IDS},
    {"structure": REGEX, "logit_bias": {5: 1}, "presence_penalty": 1, "stop_token_ids": (5,)},
]

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "not 0"),
    ({"max_tokens": 2**31}, "max_tokens", "in [1, 2147483647]"),
    ({"temperature": -0.1}, "temperature", "in [0, 100], not -0.1"),
    ({"temperature": math.nan}, "temperature", "not nan"),
    ({"temperature": math.inf}, "temperature", "not inf"),
    ({"top_p": 0}, "top_p", "in (0, 1], not 0"),
    ({"top_p": 1.1}, "top_p", "not 1.1"),
    ({"top_k": -2}, "top_k", "not -2"),
    ({"min_p": 2}, "min_p", "in [0, 1]"),
    ({"min_p": math.nan}, "min_p", "not nan"),
    ({"seed": 2**63}, "seed", "in [-2^63, 2^63 - 1]"),
    ({"presence_penalty": 2.1}, "presence_penalty", "in [-2, 2], not 2.1"),
    ({"frequency_penalty": -math.inf}, "frequency_penalty", "not -inf"),
    ({"frequency_penalty": math.nan}, "frequency_penalty", "not nan"),
    ({"repetition_penalty": 0}, "repetition_penalty", "in (0, 10], not 0"),
    ({"repetition_penalty": 11}, "repetition_penalty", "not 11"),
    ({"min_tokens": -1}, "min_tokens", "not -1"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens (4), not 5"),
    ({"logprobs": 21}, "logprobs", "in [0, 20], not 21"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "not -1"),
    ({"logit_bias": {1000: 1}}, "logit_bias", "token ids in [0, 1000), not 1000"),
    ({"logit_bias": {-1: 1}}, "logit_bias", "not -1"),
    ({"logit_bias": {7: 100.5}}, "logit_bias", "in [-100, 100] for token 7, not 100.5"),
    ({"logit_bias": {7: math.nan}}, "logit_bias", "not nan"),
    ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1)}, "logit_bias", f"holds {MAX_LOGIT_BIAS + 1} entries"),
    ({"allowed_token_ids": ()}, "allowed_token_ids", "at least one"),
    ({"allowed_token_ids": (1000,)}, "allowed_token_ids", "not 1000"),
    ({"allowed_token_ids": (1,) * 1001}, "allowed_token_ids", "holds 1001 ids"),
    ({"allowed_token_ids": (5,), "bad_words": ((5,),)}, "allowed_token_ids", "leaves no token"),
    (
        {"allowed_token_ids": (5, 6), "bad_words": ((5,),), "stop_token_ids": (6,), "min_tokens": 1},
        "allowed_token_ids",
        "leaves no token",
    ),
    ({"bad_words": ((),)}, "bad_words", "one of 0 tokens"),
    ({"bad_words": ((1,) * (MAX_BAD_WORD_TOKENS + 1),)}, "bad_words", f"1 to {MAX_BAD_WORD_TOKENS} tokens"),
    ({"bad_words": ((1,),) * (MAX_BAD_WORDS + 1)}, "bad_words", f"holds {MAX_BAD_WORDS + 1} token sequences"),
    ({"bad_words": ((1, 1000),)}, "bad_words", "not 1000"),
    ({"stop_token_ids": (-1,)}, "stop_token_ids", "not -1"),
    ({"stop_token_ids": (1,) * (MAX_STOP_TOKEN_IDS + 1)}, "stop_token_ids", f"holds {MAX_STOP_TOKEN_IDS + 1} ids"),
    ({"structure": REGEX, "allowed_token_ids": (5,)}, "allowed_token_ids", "structured output"),
    ({"structure": REGEX, "bad_words": ((5,),)}, "bad_words", "structured output"),
    ({"structure": REGEX, "min_tokens": 1}, "min_tokens", "structured output"),
    ({"structure": REGEX, "ignore_eos": True}, "ignore_eos", "structured output"),
]


@pytest.mark.parametrize("fields", GOOD)
def test_what_is_allowed_passes(fields: dict[str, Any]) -> None:
    check(SamplingParams(**fields), vocab_size=MAX_LOGIT_BIAS if len(fields.get("logit_bias", {})) > 9 else VOCABULARY)


@pytest.mark.parametrize(("fields", "field", "words"), BAD)
def test_what_is_not_allowed_is_named(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(SamplingParams(**fields), vocab_size=VOCABULARY)
    assert caught.value.field == field
    assert field in caught.value.message
    assert words in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"priority": -101}, "priority"),
        ({"priority": 101}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": math.nan}, "timeout"),
        ({"timeout": 86401}, "timeout"),
        ({"cache_salt": "s" * 257}, "cache_salt"),
    ],
)
def test_what_stands_beside_the_parameters(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(**fields)
    assert caught.value.field == field


def test_the_bounds_themselves_pass() -> None:
    for n, priority, timeout in ((1, -100, 1e-3), (128, 100, 86400)):
        check_request(n=n, priority=priority, timeout=timeout, cache_salt="s" * 256)


def test_min_tokens_must_fit_the_context_too() -> None:
    assert check_length(10, SamplingParams(min_tokens=90), max_model_len=100) == 90
    with pytest.raises(InvalidRequest, match=r"min_tokens must be at most max_tokens \(90\), not 91"):
        check_length(10, SamplingParams(min_tokens=91), max_model_len=100)


def test_an_answer_holds_so_many_log_probabilities_of_its_prompt_and_no_more() -> None:
    params = SamplingParams(prompt_logprobs=3, max_tokens=1)
    assert check_length(MAX_PROMPT_REPORTS // 4, params, max_model_len=2**20) == 1
    check_length(MAX_PROMPT_REPORTS // 4 + 1, SamplingParams(max_tokens=1), max_model_len=2**20)
    with pytest.raises(
        InvalidRequest, match=r"prompt_logprobs=3 makes 1048580 .* the most allowed is 1048576"
    ) as caught:
        check_length(MAX_PROMPT_REPORTS // 4 + 1, params, max_model_len=2**20)
    assert caught.value.field == "prompt_logprobs"


def test_every_number_has_a_range() -> None:
    for name in ("max_tokens", "logprobs", "prompt_logprobs", "seed"):
        assert name in RANGES
    for name, default in zip(SamplingParams.__struct_fields__, SamplingParams.__struct_defaults__, strict=True):
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert default in RANGES[name], name
