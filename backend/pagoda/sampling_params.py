"""What a request may ask of the sampler, and the one place that checks it.

The frontend calls `check` to answer 400 at once; the engine calls it again on what arrives over a session,
so nothing unvalidated reaches the loop.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from pagoda.errors import InvalidRequest

MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
"""Alternatives that may be asked for at each token; OpenAI's own bound."""
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64


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


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidRequest(f"{field} must be {allowed}, not {value!r}", field=field)


def check(params: SamplingParams, *, vocab_size: int) -> None:
    """Raises InvalidRequest naming field, value and allowed range."""
    p = params
    if p.max_tokens is not None:
        _require(1 <= p.max_tokens < 2**31, "max_tokens", p.max_tokens, "at least 1")
    _require(math.isfinite(p.temperature) and 0 <= p.temperature <= 100, "temperature", p.temperature, "in [0, 100]")
    _require(0 < p.top_p <= 1, "top_p", p.top_p, "in (0, 1]")
    _require(-1 <= p.top_k < 2**31, "top_k", p.top_k, "at least 1 (or 0 or -1 to turn it off)")
    _require(0 <= p.min_p <= 1, "min_p", p.min_p, "in [0, 1]")
    if p.seed is not None:
        _require(-(2**63) <= p.seed < 2**63, "seed", p.seed, "a 64-bit integer")
    _require(
        len(p.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
        "stop_token_ids",
        f"{len(p.stop_token_ids)} ids",
        f"at most {MAX_STOP_TOKEN_IDS} ids",
    )
    for token in p.stop_token_ids:
        _require(0 <= token < vocab_size, "stop_token_ids", token, f"token ids below {vocab_size}")


def check_length(num_prompt_tokens: int, params: SamplingParams, *, max_model_len: int) -> int:
    """The request's token limit, `max_tokens` or what is left of the context.

    Raises InvalidRequest that says by how much prompt and output pass the context.
    """
    if num_prompt_tokens < 1:
        raise InvalidRequest("prompt must hold at least one token, not 0", field="prompt")
    left = max_model_len - num_prompt_tokens
    wanted = params.max_tokens if params.max_tokens is not None else max(left, 1)
    if wanted > left:
        raise InvalidRequest(
            f"prompt ({num_prompt_tokens} tokens) and max_tokens ({wanted}) together pass the model's context of "
            f"{max_model_len} tokens by {wanted - left}: shorten the prompt or lower max_tokens",
            field="max_tokens" if left > 0 else "prompt",
        )
    return wanted


def check_prompt(prompt_ids: list[int], *, vocab_size: int) -> None:
    """Raises InvalidRequest naming the first id outside the vocabulary."""
    if prompt_ids and not (min(prompt_ids) >= 0 and max(prompt_ids) < vocab_size):
        bad = next(t for t in prompt_ids if not 0 <= t < vocab_size)
        raise InvalidRequest(f"prompt holds token id {bad}; ids must be in [0, {vocab_size})", field="prompt")
