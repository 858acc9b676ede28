"""POST /v1/completions."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from pagoda.errors import InvalidRequest
from pagoda.text.generation import Delta
from starlette.requests import Request
from starlette.responses import Response

from pagoda_openai.answer import answer
from pagoda_openai.generation import MAX_PROMPTS, Generation, Model, model_of
from pagoda_openai.parsing import parse, read_body
from pagoda_openai.schemas import Completion, CompletionChoice, CompletionRequest, UsageBody
from pagoda_openai.state import frontend_of

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one prompt or several, given as text or as token ids."""
    frontend = frontend_of(request)
    asked = parse(await read_body(request, frontend.settings.max_body_bytes), CompletionRequest)
    include_usage = asked.include_usage
    model = await model_of(frontend, asked.model)
    params, stops = asked.sampling(model.facts, asked.max_tokens), asked.stops
    prompts = await prompts_of(asked.prompt, model)
    generation = Generation(model, prompts, params, stops, asked.cache_salt)
    return await answer(
        request, frontend.settings, generation, CompletionShape(generation), asked.stream, include_usage
    )


async def prompts_of(prompt: str | list[str | int | list[int]], model: Model) -> list[list[int]]:
    """Token ids of each prompt. Raises InvalidRequest for an empty one, a mixture, or too many."""
    if isinstance(prompt, str):
        return [await model.encode(prompt)]
    texts = [p for p in prompt if isinstance(p, str)]
    ids = [p for p in prompt if isinstance(p, int)]
    lists = [p for p in prompt if isinstance(p, list)]
    if len(prompt) not in (len(texts), len(ids), len(lists)):
        raise InvalidRequest("prompt mixes texts, token ids and lists of them: use one kind", field="prompt")
    if ids:
        return [ids]
    if not 1 <= len(prompt) <= MAX_PROMPTS:
        raise InvalidRequest(f"prompt must hold 1 to {MAX_PROMPTS} prompts, not {len(prompt)}", field="prompt")
    return lists or [await model.encode(text) for text in texts]


class CompletionShape:
    """How a generation looks on this endpoint."""

    def __init__(self, generation: Generation) -> None:
        self._head = {
            "id": f"cmpl-{generation.id}",
            "object": "text_completion",
            "created": generation.created,
            "model": generation.model,
        }

    def whole(self, choices: list[tuple[str, str]], usage: UsageBody) -> msgspec.Struct:
        done = [CompletionChoice(i, text, finish_reason=reason) for i, (text, reason) in enumerate(choices)]
        return Completion(**self._head, choices=done, usage=usage)  # type: ignore[arg-type]

    def chunks(self, index: int, delta: Delta, *, is_first: bool) -> list[msgspec.Struct]:
        choice = CompletionChoice(index, delta.text, finish_reason=delta.finish_reason)
        return [Completion(**self._head, choices=[choice])]  # type: ignore[arg-type]

    def usage_chunk(self, usage: UsageBody) -> msgspec.Struct:
        return Completion(**self._head, choices=[], usage=usage)  # type: ignore[arg-type]
