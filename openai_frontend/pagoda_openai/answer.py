"""A generation as an HTTP answer: one JSON body, or a stream of events; the same for both endpoints."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from typing import ParamSpec, Protocol, TypeVar

import msgspec
from pagoda.errors import EngineFailure, PagodaError
from pagoda.text.generation import Delta
from starlette.requests import Request
from starlette.responses import Response

from pagoda_openai.errors import envelope
from pagoda_openai.generation import Choice, ClientGone, Generation, while_connected
from pagoda_openai.responses import UsageBody
from pagoda_openai.settings import Settings
from pagoda_openai.sse import DONE, EventStream, encode_json, event

log = logging.getLogger("pagoda.openai")

P = ParamSpec("P")
T = TypeVar("T")

MANY_REPORTS = 4096
"""Log-probabilities of prompt tokens from which on an answer is worded beside the event loop; they take 4 ms."""
PLACEHOLDER = secrets.token_hex(16)
"""Stands for the text where a chunk is encoded to be cut there: nothing else in it can be the same."""


class Shape(Protocol):
    """How an endpoint words its answers."""

    @property
    def is_text_only(self) -> bool:
        """Between a choice's first and last delta, only the text differs from one chunk to the next."""

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
            body = await _beside(generation, _encoded, shape, choices, generation.usage())
            return Response(body, media_type="application/json")
        await while_connected(request, generation.arrival())
        events = _events(generation.take(), generation, shape, include_usage)
    except ClientGone:
        generation.abort("client_gone")
        return Response(status_code=499)
    return EventStream(events, generation.abort, settings.slow_client_timeout)


def _encoded(shape: Shape, choices: list[Choice], usage: UsageBody) -> bytes:
    return encode_json(shape.whole(choices, usage))


async def _beside(generation: Generation, work: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """The work's result; in a thread if the generation makes it long."""
    if generation.num_prompt_reports < MANY_REPORTS:
        return work(*arguments, **named)
    return await asyncio.to_thread(work, *arguments, **named)


async def _events(
    first: list[tuple[int, Delta]], generation: Generation, shape: Shape, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """What comes at the same moment is one chunk."""
    encode = EventEncoder(shape).encode
    news = first
    try:
        while True:
            yield await _beside(generation, encode, news)
            if generation.is_over:
                break
            await generation.arrival()
            news = generation.take()
        if include_usage:
            yield event(shape.usage_chunk(generation.usage()))
    except PagodaError as error:
        yield event(envelope(error))
    except Exception:
        log.exception("a stream failed by an unexpected error")
        yield event(envelope(EngineFailure("the request failed; the server's log has the reason")))
    finally:
        generation.abort("client_gone")  # does nothing for those that have ended
    yield DONE


class EventEncoder:
    """Deltas of a generation to events. What all chunks of a choice have in common is encoded once."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._frames: dict[int, tuple[bytes, bytes] | None] = {}
        """For each choice that has begun: its event before and after the text, if only the text differs."""

    def encode(self, news: list[tuple[int, Delta]]) -> bytes:
        """The events of some choices' next deltas."""
        return b"".join([self._one(index, delta) for index, delta in news])

    def _one(self, index: int, delta: Delta) -> bytes:
        frame = self._frames.get(index)
        if frame is not None and delta.finish_reason is None:
            return frame[0] + encode_json(delta.text) + frame[1]
        is_first = index not in self._frames
        if is_first:
            self._frames[index] = self._frame(index) if self._shape.is_text_only else None
        return b"".join(map(event, self._shape.chunks(index, delta, is_first=is_first)))

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        [chunk] = self._shape.chunks(index, Delta(PLACEHOLDER, 1, None, None), is_first=False)
        before, _, after = event(chunk).partition(encode_json(PLACEHOLDER))
        return before, after
