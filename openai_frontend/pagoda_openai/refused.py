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
}
"""The fields, with the values that ask for nothing; null does so for each. What an endpoint serves is not refused."""

IGNORED = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key"})
"""Fields that change nothing about the answer."""


def check_refused(name: str, value: Any) -> None:
    """Raises InvalidRequest for a field of `NEUTRAL` that asks for something."""
    if value is not None and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
        if name in GUIDED:
            raise guided_refusal(name)
        given = excerpt(msgspec.json.encode(value))
        raise InvalidRequest(f"{name} is not available here, and was given as {given}: leave it out", field=name)


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON has it: 1 is 1.0, and true is not 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def excerpt(value: bytes) -> str:
    """A value's JSON for an error message, not too much of it."""
    text = value[:100].decode(errors="replace")
    return text if len(value) <= 100 else f"{text}…"
