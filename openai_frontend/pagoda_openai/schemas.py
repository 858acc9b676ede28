"""OpenAI's requests and responses, typed. Requests are checked strictly: no number in a string, no true for 1.

Fields that OpenAI or vLLM define and Pagoda does not implement yet are listed in `NOT_YET`: they are refused by name
unless they hold their neutral value. A field nobody knows is ignored with a warning in the log.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pagoda.errors import InvalidRequest
from pagoda.protocol import ModelFacts, Usage
from pagoda.sampling_params import SamplingParams
from pagoda.text.parameters import check_stops

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "priority": (0,),
    "timeout": (),
    "truncate_prompt_tokens": (),
    "service_tier": ("auto", "default"),
}
"""Known fields that are not available yet, with the values that ask for nothing."""

IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key"}
"""Fields that change nothing about the answer."""


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class SamplingFields(msgspec.Struct, kw_only=True):
    """What both endpoints share. None means: the model's own default."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    cache_salt: str | None = None

    def sampling(self, facts: ModelFacts, max_tokens: int | None) -> SamplingParams:
        """The engine's parameters: the request's fields over the model's defaults."""
        base = facts.default_params
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_either(self.temperature, base.temperature),
            top_p=_either(self.top_p, base.top_p),
            top_k=_either(self.top_k, base.top_k),
            min_p=_either(self.min_p, base.min_p),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """Raises InvalidRequest for stop strings out of bounds."""
        return check_stops(self.stop)

    @property
    def include_usage(self) -> bool:
        """Raises InvalidRequest for stream options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is allowed only when stream is true", field="stream_options")
        return self.stream_options is not None and self.stream_options.include_usage


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    """A text, token ids, or a list of either."""
    max_tokens: int | None = 16
    """OpenAI's default for this endpoint."""


class TextPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def text(self) -> str:
        """The message's text. Raises InvalidRequest for parts that are not text."""
        if self.content is None:
            raise InvalidRequest(f"messages: the {self.role} message has no content", field="messages")
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"messages: content parts of type {part.type[:40]!r} are not available, only 'text'",
                    field="messages",
                )
        return "".join(part.text or "" for part in self.content)


class ChatRequest(SamplingFields, kw_only=True):
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """OpenAI's newer name of max_tokens; it wins."""

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


# ── responses ─────────────────────────────────────────────────────────────────────────────────────────────────────


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class UsageBody(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_body(usages: list[Usage]) -> UsageBody:
    """Summed over the choices of one response."""
    prompt = sum(u.prompt_tokens for u in usages)
    completion = sum(u.completion_tokens for u in usages)
    return UsageBody(prompt, completion, prompt + completion, PromptTokensDetails(sum(u.cached_tokens for u in usages)))


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


class ChatAnswer(msgspec.Struct):
    role: str
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatAnswer
    logprobs: None = None
    finish_reason: str | None = None


class ChatCompletion(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None
