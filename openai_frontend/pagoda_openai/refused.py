"""Fields that OpenAI or vLLM define and Pagoda does not serve: refused by name unless they ask for nothing.

A field nobody knows is ignored with a warning in the log.
"""

from __future__ import annotations

from typing import Any

import msgspec
from pagoda.errors import InvalidRequest
from pagoda.text.structured_outputs import GUIDED, guided_refusal

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (),
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    **dict.fromkeys(GUIDED, ()),
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
    "service_tier": ("auto", "default"),
    "max_completion_tokens": (),
    "add_special_tokens": (),
    "truncation_side": ("left",),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "prompt_embeds": ("", []),
    "logits_processors": ([],),
    "guided_decoding_backend": ("",),
    "guided_whitespace_pattern": (),
    "structural_tag": ("",),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "request_id": ("",),
}
"""The fields, with the values that ask for nothing; null does so for each. What an endpoint serves is not refused."""

INSTEAD = {
    "max_completion_tokens": "send max_tokens instead",
    "request_id": "send it as the header X-Request-Id instead",
}
"""What to do where leaving the field out is not all there is to say."""

IGNORED = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key"})
"""Fields that change nothing about the answer."""


def check_refused(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    """Raises InvalidRequest for a field that asks for something: for a value that is neither null nor `neutral`."""
    if value is not None and not any(_same(value, nothing) for nothing in neutral):
        if name in GUIDED:
            raise guided_refusal(name)
        given = excerpt(msgspec.json.encode(value))
        remedy = INSTEAD.get(name, "leave it out")
        raise InvalidRequest(f"{name} is not available here, and was given as {given}: {remedy}", field=name)


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON has it: 1 is 1.0, and true is not 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def excerpt(value: bytes) -> str:
    """A value's JSON for an error message, not too much of it."""
    text = value[:100].decode(errors="replace")
    return text if len(value) <= 100 else f"{text}…"
