"""A generation as an HTTP answer: one JSON body, or a stream of events; the same for both endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec
from pagoda.errors import PagodaError
from pagoda.text.generation import Delta
from starlette.requests import Request
from starlette.responses import Response

from pagoda_openai.errors import envelope
from pagoda_openai.generation import Choice, ClientGone, Generation, while_connected
from pagoda_openai.responses import UsageBody
from pagoda_openai.settings import Settings
from pagoda_openai.sse import DONE, EventStream, event


class Shape(Protocol):
    """How an endpoint words its answers."""

    def whole(self, choices: list[Choice], usage: UsageBody) -> msgspec.Struct: ...

    def chunks(self, index: int, delta: Delta, *, is_first: bool) -> list[msgspec.Struct]: ...

    def usage_chunk(self, usage: UsageBody) -> msgspec.Struct: ...


async def answer(
    request: Request, settings: Settings, generation: Generation, shape: Shape, stream: bool, include_usage: bool
) -> Response:
    """Errors before the first token become a status; later ones an event of the stream."""
    try:
        if not stream:
            choices = await while_connected(request, generation.whole())
            body = shape.whole(choices, generation.usage())
            return Response(msgspec.json.encode(body), media_type="application/json")
        items = generation.deltas()
        first = await while_connected(request, anext(items))
    except ClientGone:
        generation.abort("client_gone")
        return Response(status_code=499)
    events = _events(first, items, generation, shape, include_usage)
    return EventStream(events, generation.abort, settings.slow_client_timeout)


async def _events(
    first: tuple[int, Delta],
    rest: AsyncIterator[tuple[int, Delta]],
    generation: Generation,
    shape: Shape,
    include_usage: bool,
) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    try:
        async for index, delta in _chain(first, rest):
            yield b"".join(map(event, shape.chunks(index, delta, is_first=index not in begun)))
            begun.add(index)
        if include_usage:
            yield event(shape.usage_chunk(generation.usage()))
    except PagodaError as error:
        yield event(envelope(error))
    yield DONE


async def _chain(first: tuple[int, Delta], rest: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    yield first
    async for item in rest:
        yield item
