"""What one HTTP request asks for, resolved: its own fields over the model's defaults, texts turned into tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from pagoda import sampling_params
from pagoda.errors import InvalidRequest
from pagoda.sampling_params import RANGES, SamplingParams, check_range, require
from pagoda.text.bad_words import bad_word_ids
from pagoda.text.parameters import check_stops
from pagoda.text.structured_outputs import structure_of

from pagoda_openai.model import Model
from pagoda_openai.requests import ChatRequest, CompletionRequest, SamplingFields

T = TypeVar("T")

_TOKEN_ID = re.compile(r"-?[0-9]{1,12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The same for every prompt of the request."""

    params: SamplingParams
    n: int
    """Answers shown for each prompt."""
    best_of: int
    """Answers generated for each prompt."""
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    cache_salt: str
    priority: int
    timeout: float | None
    logprobs: int | None
    """Alternatives shown at each output token; None shows no log-probabilities."""
    prompt_logprobs: int | None
    echo: bool


def ask_completion(asked: CompletionRequest, model: Model) -> Ask:
    """Raises InvalidRequest naming the field."""
    check_range("n", asked.n)
    check_range("logprobs", asked.logprobs)
    n = _either(asked.n, 1)
    best_of = _either(asked.best_of, n)
    highest = int(RANGES["n"].high)
    require(n <= best_of <= highest, "best_of", best_of, f"from n ({n}) to {highest}")
    if best_of > n and asked.streams:
        raise InvalidRequest(
            f"best_of={best_of} cannot be streamed: the best answers are known at the end; leave stream out",
            field="best_of",
        )
    return _ask(asked, model, asked.max_tokens, asked.logprobs, best_of=best_of, echo=bool(asked.echo))


def ask_chat(asked: ChatRequest, model: Model) -> Ask:
    """Raises InvalidRequest naming the field."""
    check_range("n", asked.n)
    _check_as("max_completion_tokens", asked.max_completion_tokens, "max_tokens")
    _check_as("top_logprobs", asked.top_logprobs, "logprobs")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidRequest(f"top_logprobs={asked.top_logprobs} needs logprobs: true beside it", field="top_logprobs")
    shown = _either(asked.top_logprobs, 0) if asked.logprobs else None
    return _ask(asked, model, asked.limit, shown, best_of=_either(asked.n, 1), echo=False)


def _check_as(field: str, value: int | None, same_as: str) -> None:
    """A field of this endpoint alone, with the range of the engine's `same_as`."""
    if value is not None:
        require(value in RANGES[same_as], field, value, str(RANGES[same_as]))


def _ask(
    asked: SamplingFields, model: Model, max_tokens: int | None, logprobs: int | None, *, best_of: int, echo: bool
) -> Ask:
    check_range("prompt_logprobs", asked.prompt_logprobs)
    if asked.prompt_logprobs is not None and asked.streams:
        raise InvalidRequest(
            f"prompt_logprobs={asked.prompt_logprobs} cannot be streamed: leave stream out", field="prompt_logprobs"
        )
    n = _either(asked.n, 1)
    ranked = best_of > n
    ask = Ask(
        params=_params(
            asked,
            model,
            max_tokens,
            logprobs=0 if ranked and logprobs is None else logprobs,
            prompt_logprobs=_most(asked.prompt_logprobs, logprobs if echo else None),
        ),
        n=n,
        best_of=best_of,
        stops=check_stops(asked.stop),
        include_stop=bool(asked.include_stop_str_in_output),
        skip_special_tokens=_either(asked.skip_special_tokens, True),
        cache_salt=_either(asked.cache_salt, ""),
        priority=_either(asked.priority, 0),
        timeout=asked.timeout,
        logprobs=logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        echo=echo,
    )
    sampling_params.check_request(n=n, priority=ask.priority, timeout=ask.timeout, cache_salt=ask.cache_salt)
    return ask


def _params(
    asked: SamplingFields, model: Model, max_tokens: int | None, *, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    base = model.facts.default_params
    structure = structure_of(asked.response_format, asked.structured_outputs)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_either(asked.temperature, base.temperature),
        top_p=_either(asked.top_p, base.top_p),
        top_k=_either(asked.top_k, base.top_k),
        min_p=_either(asked.min_p, base.min_p),
        seed=asked.seed,
        stop_token_ids=tuple(asked.stop_token_ids or ()),
        ignore_eos=bool(asked.ignore_eos),
        min_tokens=_either(asked.min_tokens, 0),
        presence_penalty=_either(asked.presence_penalty, base.presence_penalty),
        frequency_penalty=_either(asked.frequency_penalty, base.frequency_penalty),
        repetition_penalty=_either(asked.repetition_penalty, base.repetition_penalty),
        logit_bias=bias_of(asked.logit_bias),
        allowed_token_ids=None if asked.allowed_token_ids is None else tuple(asked.allowed_token_ids),
        bad_words=bad_word_ids(model.tokenizer, asked.bad_words, structure),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structure=structure,
    )


def bias_of(given: dict[str, float] | None) -> dict[int, float]:
    """The bias by token id. Raises InvalidRequest for a key that is not a whole number."""
    for key in given or {}:
        require(_TOKEN_ID.fullmatch(key) is not None, "logit_bias", key, "an object whose keys are token ids")
    return {int(key): value for key, value in (given or {}).items()}


def _either(value: T | None, default: T) -> T:
    return default if value is None else value


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)
