"""A server on a socket that says exactly what it is told, the events of its streams, and the requests it is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pagoda.bench.loads import Load, mixed
from pagoda.bench.serve import Pace, Run, Target, drive

VOCAB = 300
NOW = Pace(None, None, 0)


def event(body: object) -> bytes:
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


def token(text: str = "a") -> bytes:
    return event({"id": "1", "choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None})


def usage(count: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}})


DONE = event(b"[DONE]")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
STREAM = [token(), token(), usage(2) + DONE]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


WIRE = HEAD + b"".join(map(chunk, STREAM)) + END


class Scripted:
    """Answers every request with the same reads, and then closes or waits for the next one."""

    def __init__(self, reads: list[bytes], *, keep: bool) -> None:
        self.reads, self.keep = reads, keep
        self.num_connections = 0
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[bytes] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._request(reader):
                for data in self.reads:
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if not self.keep:
                    break
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        self.heads.append(head)
        self.bodies.append(json.loads(await reader.readexactly(length)))
        return True


@asynccontextmanager
async def scripted(*reads: bytes, keep: bool = False, path: str = "") -> AsyncIterator[tuple[Scripted, Target]]:
    script = Scripted(list(reads), keep=keep)
    server = await asyncio.start_server(script.answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield script, Target(f"http://127.0.0.1:{port}{path}", "m", VOCAB, "secret")
    finally:
        server.close()


def requests(count: int) -> list[Load]:
    return mixed(count, inputs=(3, 3), outputs=(2, 2), vocab_size=VOCAB)


async def driven(target: Target, count: int = 1, pace: Pace = NOW) -> Run:
    return await drive(target, requests(count), pace, done=lambda _: None)
