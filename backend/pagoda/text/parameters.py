"""The parameters of a text request, as Triton's vLLM backend takes them: JSON, or the request's own parameters.

Numbers may come as strings. An unknown or unavailable parameter is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pagoda.errors import InvalidRequest
from pagoda.sampling_params import RANGES, SamplingParams, check_range, check_request, require
from pagoda.text.bad_words import bad_word_ids
from pagoda.text.structured_outputs import structure_of
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.wire import TextRequest

DEFAULT_MAX_TOKENS = 16
"""As vLLM's SamplingParams."""
MAX_STOPS = 16
MAX_STOP_CHARS = 1024


class TextParameters(msgspec.Struct, frozen=True):
    sampling: SamplingParams
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    priority: int
    timeout: float | None
    cache_salt: str
    n: int
    best_of: int
    """Answers to generate, of which the `n` likeliest are shown."""


class _Given(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's names and defaults; `timeout` and `cache_salt` are Pagoda's own."""

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: str | dict[str, Any] | None = None
    """An object, or its JSON in a string."""
    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""


def parse(request: TextRequest, tokenizer: Tokenizer) -> TextParameters:
    """Raises InvalidRequest naming the parameter. Numbers are not checked against their ranges yet."""
    if request.stream and request.exclude_input is False:
        raise InvalidRequest(
            "When streaming, exclude_input_in_output = False is not allowed.", field="exclude_input_in_output"
        )
    values = _object(request.parameters_json, "sampling_parameters") if request.parameters_json else request.parameters
    given = _convert(values)
    check_request(n=given.n, priority=given.priority, timeout=given.timeout, cache_salt=given.cache_salt)
    best_of = _best_of(given, stream=request.stream)
    return TextParameters(
        sampling=_sampling(given, tokenizer, _logprobs(given, request, ranked=best_of > given.n)),
        stop=check_stops(given.stop),
        include_stop=given.include_stop_str_in_output,
        skip_special_tokens=given.skip_special_tokens,
        priority=given.priority,
        timeout=given.timeout,
        cache_salt=given.cache_salt,
        n=given.n,
        best_of=best_of,
    )


def _best_of(given: _Given, *, stream: bool) -> int:
    if given.best_of is None:
        return given.n
    highest = int(RANGES["n"].high)
    require(given.n <= given.best_of <= highest, "best_of", given.best_of, f"from n ({given.n}) to {highest}")
    if given.best_of > given.n and stream:
        raise InvalidRequest(
            f"best_of={given.best_of} cannot be streamed: the best answers are known at the end; leave stream out",
            field="best_of",
        )
    return given.best_of


def _logprobs(given: _Given, request: TextRequest, *, ranked: bool) -> int | None:
    """What the engine must report of each token: without return_logprobs only what a sum or a rank needs."""
    check_range("logprobs", given.logprobs)
    if request.return_logprobs:
        return given.logprobs or 0
    return 0 if request.return_cumulative_logprob or ranked else None


def _sampling(given: _Given, tokenizer: Tokenizer, logprobs: int | None) -> SamplingParams:
    outputs = given.structured_outputs
    structure = structure_of(None, _object(outputs, "structured_outputs") if isinstance(outputs, str) else outputs)
    return SamplingParams(
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        seed=given.seed,
        stop_token_ids=tuple(given.stop_token_ids or ()),
        ignore_eos=given.ignore_eos,
        min_tokens=given.min_tokens,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        repetition_penalty=given.repetition_penalty,
        logit_bias=given.logit_bias or {},
        allowed_token_ids=None if given.allowed_token_ids is None else tuple(given.allowed_token_ids),
        bad_words=bad_word_ids(tokenizer, given.bad_words, structure),
        logprobs=logprobs,
        prompt_logprobs=given.prompt_logprobs,
        structure=structure,
    )


def check_stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings of a request. Raises InvalidRequest for empty ones, too many, or too long."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop holds {len(stops)} strings, the most allowed is {MAX_STOPS}", field="stop")
    for text in stops:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop strings must hold 1 to {MAX_STOP_CHARS} characters, not {len(text)}", field="stop"
            )
    return stops


def _object(raw: str, field: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"{field} is not valid JSON: {error}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{field} must be a JSON object, not {raw[:100]}", field=field)
    return value


def _convert(values: Mapping[str, Any]) -> _Given:
    unknown = sorted(set(values) - set(_Given.__struct_fields__))
    if unknown:
        known = ", ".join(_Given.__struct_fields__)
        raise InvalidRequest(
            f"parameter {unknown[0][:100]!r} is not available; available: {known}", field=unknown[0][:100]
        )
    try:
        return msgspec.convert(values, _Given, strict=False, str_keys=True)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].strip("`").partition("[")[0]
        given = repr(values.get(name))[:100]
        raise InvalidRequest(f"parameter {name}={given}: {error}", field=name) from None
