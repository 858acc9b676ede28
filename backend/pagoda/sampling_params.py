"""What a request may ask of the sampler, and the one place that checks it.

The frontend calls `check` to answer 400 at once; the engine calls it again on what arrives over a session,
so nothing unvalidated reaches the loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from pagoda.errors import InvalidRequest

MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
"""Alternatives that may be asked for at each token; OpenAI's own bound."""
MAX_PROMPT_REPORTS = 2**20
"""Log-probabilities of prompt tokens in one answer, alternatives included: some 60 MB of JSON."""
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
MAX_SALT_CHARS = 256


class Structure(msgspec.Struct, frozen=True):
    """A constraint on the whole output: its kind and its text (a JSON schema, a regex, a JSON list of choices, …)."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    text: str = ""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Defaults are the neutral values; `max_tokens` None means what is left of the context."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    """Output tokens before which no stop token may come."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of prompt and output less likely (https://arxiv.org/abs/1909.05858)."""
    logit_bias: dict[int, float] = {}
    """Token id to what is added to its logit."""
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not come."""
    logprobs: int | None = None
    """Most likely alternatives reported at each output token; 0 reports the token alone."""
    prompt_logprobs: int | None = None
    structure: Structure | None = None

    def stop_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The tokens that end the output, once `min_tokens` have come."""
        return frozenset((*(() if self.ignore_eos else eos_token_ids), *self.stop_token_ids))

    @property
    def edits_logits(self) -> bool:
        """True when the logits are changed before anything is drawn from them."""
        return self.depends_on_output or bool(self.logit_bias) or self.allowed_token_ids is not None

    @property
    def depends_on_output(self) -> bool:
        """True when what may come next depends on the output so far: its tokens must be known on the host."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
            or self.min_tokens > 0
            or bool(self.bad_words)
            or self.structure is not None
        )


class Range(msgspec.Struct, frozen=True):
    """The numbers that a field may hold; `above` leaves the lower bound itself out."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        """False for NaN too."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"in {'(' if self.above else '['}{_plain(self.low)}, {_plain(self.high)}]"


def _plain(number: float) -> str:
    return "2^63 - 1" if number == 2**63 - 1 else "-2^63" if number == -(2**63) else f"{number:.12g}"


RANGES = {
    "max_tokens": Range(1, 2**31 - 1),
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, above=True),
    "top_k": Range(-1, 2**31 - 1),
    "min_p": Range(0, 1),
    "seed": Range(-(2**63), 2**63 - 1),
    "min_tokens": Range(0, 2**31 - 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 10, above=True),
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
    "n": Range(1, 128),
    "priority": Range(-100, 100),
    "timeout": Range(0, 86400, above=True),
}
"""What each field that is a number may hold, for the checks below and for docs/api.md."""


BIAS_RANGE = Range(-100, 100)


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raises InvalidRequest naming field, value and what is allowed unless `ok`."""
    if not ok:
        raise InvalidRequest(f"{field} must be {allowed}, not {_short(value)}", field=field)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def check_range(field: str, value: float | None) -> None:
    """Raises InvalidRequest when the number is outside the field's range; None is a field left out."""
    if value is not None:
        require(value in RANGES[field], field, value, str(RANGES[field]))


def check(params: SamplingParams, *, vocab_size: int) -> None:
    """Raises InvalidRequest naming field, value and allowed range."""
    for field in _NUMBERS:
        check_range(field, getattr(params, field))
    _check_order(params.min_tokens, params.max_tokens)
    _check_size("stop_token_ids", len(params.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_bias(params.logit_bias, vocab_size)
    _check_allowed(params, vocab_size)
    _check_bad_words(params.bad_words, vocab_size)
    _check_structure(params)


_NUMBERS = tuple(field for field in SamplingParams.__struct_fields__ if field in RANGES)


def _check_order(min_tokens: int, max_tokens: int | None) -> None:
    allowed = f"at most max_tokens ({max_tokens})"
    require(max_tokens is None or min_tokens <= max_tokens, "min_tokens", min_tokens, allowed)


def _check_size(field: str, size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise InvalidRequest(f"{field} holds {size} {unit}; the most allowed is {limit}", field=field)


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        require(0 <= token < vocab_size, field, token, f"made of token ids in [0, {vocab_size})")


def _check_bias(bias: dict[int, float], vocab_size: int) -> None:
    _check_size("logit_bias", len(bias), MAX_LOGIT_BIAS, "entries")
    _check_ids("logit_bias", bias, vocab_size)
    for token, value in bias.items():
        allowed = f"{BIAS_RANGE} for token {token}"
        require(value in BIAS_RANGE, "logit_bias", value, allowed)


def _check_allowed(params: SamplingParams, vocab_size: int) -> None:
    """An output needs a token that may come at any place: neither one that ends it nor one that is a bad word."""
    allowed = params.allowed_token_ids
    if allowed is None:
        return
    require(len(allowed) > 0, "allowed_token_ids", [], "a list of at least one token id")
    _check_size("allowed_token_ids", len(allowed), vocab_size, "ids")
    _check_ids("allowed_token_ids", allowed, vocab_size)
    barred = {word[0] for word in params.bad_words if len(word) == 1}
    if params.min_tokens > 0:
        barred.update(params.stop_token_ids)
    if barred.issuperset(allowed):
        raise InvalidRequest(
            "allowed_token_ids leaves no token that may come: bad_words, or stop_token_ids before min_tokens, bar "
            "all of them; allow another id",
            field="allowed_token_ids",
        )


def _check_bad_words(words: tuple[tuple[int, ...], ...], vocab_size: int) -> None:
    _check_size("bad_words", len(words), MAX_BAD_WORDS, "token sequences")
    for word in words:
        limits = f"made of sequences of 1 to {MAX_BAD_WORD_TOKENS} tokens"
        require(1 <= len(word) <= MAX_BAD_WORD_TOKENS, "bad_words", f"one of {len(word)} tokens", limits)
        _check_ids("bad_words", word, vocab_size)


def _check_structure(params: SamplingParams) -> None:
    if params.structure is not None:
        for field in ("allowed_token_ids", "bad_words", "min_tokens", "ignore_eos"):
            check_beside_structure(field, getattr(params, field))


def check_beside_structure(field: str, value: object) -> None:
    """The structure alone decides what may come and when the output ends. Raises InvalidRequest for a field that asks
    for something of the kind."""
    if value is not None and value:
        raise InvalidRequest(
            f"{field} cannot be combined with structured output, which decides what may come and where it ends: "
            f"leave one of them out, not {field}={_short(value)}",
            field=field,
        )


def check_request(*, n: int = 1, priority: int = 0, timeout: float | None = None, cache_salt: str = "") -> None:
    """What a request holds beside its sampling parameters. Raises InvalidRequest as `check`."""
    check_range("n", n)
    check_range("priority", priority)
    check_range("timeout", timeout)
    _check_size("cache_salt", len(cache_salt), MAX_SALT_CHARS, "characters")


def check_length(num_prompt_tokens: int, params: SamplingParams, *, max_model_len: int, field: str = "prompt") -> int:
    """The request's token limit, `max_tokens` or what is left of the context. `field` is the one of the prompt.

    Raises InvalidRequest that says by how much prompt and output pass the context, or what makes the answer too large.
    """
    if num_prompt_tokens < 1:
        raise InvalidRequest(f"{field} must hold at least one token, not 0", field=field)
    left = max_model_len - num_prompt_tokens
    wanted = params.max_tokens if params.max_tokens is not None else max(left, 1)
    if wanted > left:
        raise InvalidRequest(
            f"{field} ({num_prompt_tokens} tokens) and max_tokens ({wanted}) together pass the model's context of "
            f"{max_model_len} tokens by {wanted - left}: shorten the prompt or lower max_tokens",
            field="max_tokens" if left > 0 else field,
        )
    _check_order(params.min_tokens, wanted)
    check_prompt_reports(num_prompt_tokens, params)
    return wanted


def check_least_length(at_least: int, *, max_model_len: int, field: str = "prompt") -> None:
    """Of a text that has not been tokenized, whose tokens are known to be `at_least` so many. Raises InvalidRequest."""
    if at_least >= max_model_len:
        raise InvalidRequest(
            f"{field} (at least {at_least} tokens) alone would pass the model's context of {max_model_len} tokens by "
            f"{at_least - max_model_len} or more: send less",
            field=field,
        )


def num_prompt_reports(num_prompt_tokens: int, params: SamplingParams) -> int:
    """Log-probabilities that a request reports of its prompt's tokens."""
    return 0 if params.prompt_logprobs is None else num_prompt_tokens * (1 + params.prompt_logprobs)


def check_prompt_reports(
    num_prompt_tokens: int, params: SamplingParams, *, n: int = 1, field: str = "prompt_logprobs"
) -> None:
    """`num_prompt_tokens`: of all prompts, each reported in `n` answers. Raises InvalidRequest for too many reports."""
    count = n * num_prompt_reports(num_prompt_tokens, params)
    if count > MAX_PROMPT_REPORTS:
        raise InvalidRequest(
            f"{field}={params.prompt_logprobs} makes {count} log-probabilities of {num_prompt_tokens} prompt tokens "
            f"with n={n}; the most allowed is {MAX_PROMPT_REPORTS}: lower {field} or n",
            field=field,
        )


def check_prompt(prompt_ids: list[int], *, vocab_size: int) -> None:
    """Raises InvalidRequest naming the first id outside the vocabulary."""
    if prompt_ids and not (min(prompt_ids) >= 0 and max(prompt_ids) < vocab_size):
        bad = next(t for t in prompt_ids if not 0 <= t < vocab_size)
        raise InvalidRequest(f"prompt holds token id {bad}; ids must be in [0, {vocab_size})", field="prompt")
