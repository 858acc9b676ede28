"""POST /v1/chat/completions."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from pagoda.errors import InvalidRequest
from pagoda.text.generation import Delta
from starlette.requests import Request
from starlette.responses import Response

from pagoda_openai.answer import answer
from pagoda_openai.ask import ask_chat
from pagoda_openai.generation import Choice, Generation
from pagoda_openai.logprobs import Placed, TokenNames
from pagoda_openai.model import model_of
from pagoda_openai.parsing import parse, read_body
from pagoda_openai.requests import MAX_MESSAGES, ChatRequest
from pagoda_openai.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    UsageBody,
)
from pagoda_openai.state import frontend_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, laid out by the model's own chat template."""
    frontend = frontend_of(request)
    asked = parse(await read_body(request, frontend.settings.max_body_bytes), ChatRequest)
    include_usage = asked.include_usage
    model = await model_of(frontend, asked.model)
    ask = ask_chat(asked, model)
    prompt = await model.encode_chat(messages_of(asked), asked.truncate_prompt_tokens)
    generation = Generation(model, [prompt], ask)
    return await answer(request, frontend.settings, generation, ChatShape(generation), asked.streams, include_usage)


def messages_of(asked: ChatRequest) -> list[dict[str, str]]:
    """The conversation as the chat template takes it. Raises InvalidRequest naming what is wrong."""
    if not 1 <= len(asked.messages) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must hold 1 to {MAX_MESSAGES} messages, not {len(asked.messages)}", field="messages"
        )
    return [
        {"role": m.role, "content": m.text(f"messages[{i}]"), **({"name": m.name} if m.name else {})}
        for i, m in enumerate(asked.messages)
    ]


class ChatShape:
    """How a generation looks on this endpoint."""

    def __init__(self, generation: Generation) -> None:
        self._id = f"chatcmpl-{generation.id}"
        self._created = generation.created
        self._model = generation.model.facts.name
        self._answers = generation.answers
        self._ask = generation.ask
        self._reports = generation.ask.logprobs is not None
        self._names = TokenNames(generation.model.tokenizer)

    @property
    def is_text_only(self) -> bool:
        return not self._reports

    def whole(self, choices: list[Choice], usage: UsageBody) -> msgspec.Struct:
        done = [
            ChatChoice(i, ChatAnswer("assistant", c.text), self._logprobs(c.shown), c.finish_reason)
            for i, c in enumerate(choices)
        ]
        top = self._ask.prompt_logprobs
        prompt = None if top is None else self._names.prompt(self._answers[0].prompt_logprobs, top=top)
        return ChatCompletion(self._id, "chat.completion", self._created, self._model, done, usage, prompt)

    def chunks(self, index: int, delta: Delta, *, is_first: bool) -> list[msgspec.Struct]:
        """A choice begins with a chunk that says who speaks and ends with one that says why it ends."""
        shown = self._answers[index].report(delta) if self._reports else []
        logprobs = self._logprobs(shown) if shown else None
        choices = [ChatChunkChoice(index, ChatDelta(role="assistant", content=""))] if is_first else []
        if delta.text or delta.finish_reason is None or shown:
            choices.append(ChatChunkChoice(index, ChatDelta(content=delta.text), logprobs))
        if delta.finish_reason is not None:
            choices.append(ChatChunkChoice(index, ChatDelta(), finish_reason=delta.finish_reason))
        return [self._chunk([choice]) for choice in choices]

    def usage_chunk(self, usage: UsageBody) -> msgspec.Struct:
        return self._chunk([], usage)

    def _logprobs(self, shown: list[Placed]) -> ChatLogprobs | None:
        return None if self._ask.logprobs is None else self._names.chat(shown, top=self._ask.logprobs)

    def _chunk(self, choices: list[ChatChunkChoice], usage: UsageBody | None = None) -> ChatChunk:
        return ChatChunk(self._id, "chat.completion.chunk", self._created, self._model, choices, usage)
