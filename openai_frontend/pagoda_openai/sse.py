"""A response that streams events and notices both a client that leaves and one that stops reading."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

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


class EventStream(Response):
    """An ASGI response. `on_gone` is called when the client leaves, or stays behind by `timeout` seconds."""

    def __init__(self, events: AsyncIterator[bytes], on_gone: Callable[[str], None], timeout: float) -> None:
        super().__init__()
        self._events = events
        self._on_gone = on_gone
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(disconnected(receive))
        stream = asyncio.create_task(self._stream(send))
        await asyncio.wait((watch, stream), return_when=asyncio.FIRST_COMPLETED)
        if not stream.done():
            self._on_gone("client_gone")
            stream.cancel()
        watch.cancel()
        await asyncio.gather(watch, stream, return_exceptions=True)
        if not stream.cancelled() and (error := stream.exception()):
            raise error

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        async for chunk in self._events:
            if not await self._send(send, {"type": "http.response.body", "body": chunk, "more_body": True}):
                return
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: dict[str, Any]) -> bool:
        """False when the client did not take it in time; only its own request ends."""
        try:
            await asyncio.wait_for(send(message), self._timeout)
        except asyncio.TimeoutError:
            log.warning("a client stopped reading for %.0f s: its request is ended", self._timeout)
            self._on_gone("slow_client")
            return False
        return True
