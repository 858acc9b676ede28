"""A response that streams events and notices both a client that leaves and one that stops reading."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger("pagoda.openai")

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def event(body: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(body) + b"\n\n"


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Patience:
    """Ends a task when one write of it takes longer than `seconds`; `since` is when it began, None between writes.

    One timer for the whole task: one for each write would cost more than the write.
    """

    def __init__(self, seconds: float, task: asyncio.Task[None]) -> None:
        self.since: float | None = None
        self.is_over = False
        self._seconds = seconds
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        left = self._seconds if self.since is None else self.since + self._seconds - now
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self.is_over = True
            self._task.cancel()

    def end(self) -> None:
        self._timer.cancel()


class EventStream(Response):
    """An ASGI response. `on_gone` is called when the client leaves, or stays behind by `timeout` seconds."""

    def __init__(self, events: AsyncGenerator[bytes, None], on_gone: Callable[[str], None], timeout: float) -> None:
        super().__init__()
        self._events = events
        self._on_gone = on_gone
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(disconnected(receive))
        stream = asyncio.create_task(self._stream(send))
        self._patience = Patience(self._timeout, stream)
        await asyncio.wait((watch, stream), return_when=asyncio.FIRST_COMPLETED)
        self._patience.end()
        if self._patience.is_over:
            log.warning("a client stopped reading for %.0f s: its request is ended", self._timeout)
            self._on_gone("slow_client")
        elif not stream.done():
            self._on_gone("client_gone")
            stream.cancel()
        watch.cancel()
        await asyncio.gather(watch, stream, return_exceptions=True)
        if not stream.cancelled() and (error := stream.exception()):
            raise error

    async def _stream(self, send: Send) -> None:
        patience, now = self._patience, asyncio.get_running_loop().time
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        patience.since = now()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        patience.since = None
        async with contextlib.aclosing(self._events) as events:
            async for chunk in events:
                patience.since = now()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                patience.since = None
        patience.since = now()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
