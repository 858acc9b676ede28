"""An HTTP/1.1 client for many streams at once: httptools over asyncio's protocols, which is all that a token costs.

A read is stamped when the event loop hands it over, before it is parsed. General clients spend several times as much on
a chunk, and would be measured instead of the server.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import cast
from urllib.parse import urlsplit

import httptools

from pagoda.bench.serve_stream import Answer

IDLE_SECONDS = 2.0
"""A connection that lay idle for longer is not used again: uvicorn closes one after five, and might just then."""
ANSWER_SECONDS = 3600.0


class Connection(asyncio.Protocol):
    """One connection, with one request on its way at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._answer: Answer | None = None
        self._ended: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0
        self._idle_since = 0.0
        self._is_kept = False

    @property
    def is_reusable(self) -> bool:
        return self._is_kept and time.perf_counter() - self._idle_since < IDLE_SECONDS

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send a request and fill its answer, until it ends, breaks off, or took `ANSWER_SECONDS`."""
        self._is_kept = False
        self._answer, self._ended = answer, asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        try:
            await asyncio.wait_for(self._ended, ANSWER_SECONDS)
        except asyncio.TimeoutError:
            answer.fail(f"no end of the answer after {ANSWER_SECONDS:.0f} s")
        self._answer = None
        if not self._is_kept:
            self.close()

    def close(self) -> None:
        self._is_kept = False
        self._transport.close()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class is no subclass

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._answer is not None:
                self._answer.fail(f"the answer is no HTTP: {error}")
            self._end(keep=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(keep=False)

    # What httptools calls.

    def on_headers_complete(self) -> None:
        assert self._answer is not None
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        assert self._answer is not None
        self._answer.feed(body, self._now)

    def on_message_complete(self) -> None:
        self._end(keep=self._parser.should_keep_alive())

    def _end(self, *, keep: bool) -> None:
        self._is_kept, self._idle_since = keep, self._now
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


class Client:
    """Posts completions to one server, over as many connections as requests are on their way."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """`url` as `root` gives it."""
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname or "", parts.port or (443 if self._tls else 80))
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"POST {parts.path}/v1/completions HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n{key}"
            "accept: text/event-stream\r\ncontent-type: application/json\r\ncontent-length: "
        ).encode()
        self._idle: list[Connection] = []

    def request(self, body: bytes) -> bytes:
        """A body's request as it goes over the wire."""
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    async def ask(self, request: bytes) -> Answer:
        """The answer to a `request()`; what goes wrong is in it, and nothing is raised."""
        answer = Answer(time.perf_counter())
        try:
            connection = await self._connection()
        except OSError as error:
            answer.fail(f"no connection: {error}")
            return answer
        await connection.exchange(request, answer)
        if connection.is_reusable:
            self._idle.append(connection)
        return answer

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, *self._address, ssl=self._tls)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
