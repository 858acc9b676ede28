"""The text worker: `python -m pagoda.text.worker`, a child of the Triton stub.

Serves the standard text contract: tokenizes, sends the request to the engine in a session of its own, detokenizes and
replies. A process apart, so that a prompt of two megabytes stalls neither the stub nor the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from pagoda import logs, sampling_params
from pagoda import protocol as protocol_wire
from pagoda.child import die_with_parent, leave
from pagoda.client import PING_INTERVAL, Session
from pagoda.errors import EngineFailure, PagodaError
from pagoda.text import wire
from pagoda.text.answers import Replies, gathered, rounds
from pagoda.text.parameters import TextParameters
from pagoda.text.parameters import parse as parse_parameters
from pagoda.text.stream import TextStream
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.wire import TextAbort, TextMessage, TextReply, TextRequest, TextStart

log = logging.getLogger("pagoda.text.worker")

T = TypeVar("T")

decode = msgspec.msgpack.Decoder(TextMessage).decode
encode = msgspec.msgpack.Encoder().encode


class TextWorker:
    def __init__(self, start: TextStart) -> None:
        self.start = start
        self.tokenizer = Tokenizer.from_folder(start.folder)
        self._identity = f"text-{secrets.token_hex(8)}"
        self._context = zmq.asyncio.Context()
        self._engine = self._context.socket(zmq.DEALER)
        self._engine.setsockopt(zmq.IDENTITY, self._identity.encode())
        self._engine.setsockopt(zmq.LINGER, 0)
        self._to_engine: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._to_engine.setsockopt(zmq.IMMEDIATE, 1)  # a frame for a dead engine is dropped, not kept for the next
        self._to_engine.setsockopt(zmq.LINGER, 0)
        self._requests = self._context.socket(zmq.PULL)
        self._replies = self._context.socket(zmq.PUSH)
        self._replies.setsockopt(zmq.LINGER, 0)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.session = Session("text", self._send_frame)

    async def run(self) -> None:
        self._engine.connect(self.start.engine_address)
        self._to_engine.connect(self.start.engine_address)
        self._requests.bind(self.start.requests_address)
        self._replies.connect(self.start.replies_address)
        await asyncio.gather(self._payloads(), self._take_requests(), self._keep_session())

    def _send_frame(self, frame: protocol_wire.Frame) -> None:
        with contextlib.suppress(zmq.Again):
            self._to_engine.send_multipart([self._identity.encode(), protocol_wire.encode(frame)], zmq.NOBLOCK)

    async def _payloads(self) -> None:
        while True:
            name, _, payload = await self._engine.recv_multipart()
            if name.decode() == self.session.name:
                self.session.feed(payload)

    async def _keep_session(self) -> None:
        """Ping; after a restart of the engine, which knows no session, begin a new one."""
        self.session.open()
        while True:
            await asyncio.sleep(PING_INTERVAL)
            if self.session.state == "closed":
                self.session = Session("text", self._send_frame)
            if self.session.state == "opening":
                self.session.open()
            self.session.ping()

    async def _take_requests(self) -> None:
        while True:
            message = decode(await self._requests.recv())
            if isinstance(message, TextAbort):
                task = self._tasks.get(message.id)
                if task is not None:
                    task.cancel()
            else:
                task = asyncio.create_task(self._serve(message))
                self._tasks[message.id] = task
                task.add_done_callback(partial(self._forget, message.id))

    def _forget(self, request_id: int, _: asyncio.Task[None]) -> None:
        self._tasks.pop(request_id, None)

    async def _serve(self, request: TextRequest) -> None:
        try:
            await self._answer(request)
        except PagodaError as error:
            await self._reply(wire.failed(request.id, error))
        except Exception:
            log.exception("a text request failed")
            await self._reply(
                wire.failed(request.id, EngineFailure("the request failed; the server's log has the reason"))
            )

    async def _answer(self, request: TextRequest) -> None:
        parameters = parse_parameters(request, self.tokenizer)
        prompt_ids = await self._encode(request.text)
        self._check(prompt_ids, parameters)
        replies = Replies(request, parameters, self.tokenizer, len(prompt_ids))
        streams = self.session.generate(
            prompt_ids,
            parameters.sampling,
            cache_salt=parameters.cache_salt,
            n=parameters.best_of,
            priority=parameters.priority,
            timeout=parameters.timeout,
        )
        news = rounds(streams, [self._text_of(prompt_ids, parameters) for _ in streams])
        try:
            if request.stream:
                async for new in news:
                    await self._reply(await self._beside(parameters, replies.part, new))
            else:
                answers = await gathered(news, len(streams))
                await self._reply(await self._beside(parameters, replies.whole, answers))
        finally:
            for stream in streams:
                stream.abort("client_gone")

    async def _encode(self, text: str) -> list[int]:
        """Raises InvalidRequest, for a text far too long before it is tokenized: that takes 100 times its memory."""
        if (facts := self.session.facts) is not None:
            at_least = await asyncio.to_thread(self.tokenizer.min_tokens, text)
            sampling_params.check_least_length(at_least, max_model_len=facts.max_model_len)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def _beside(self, parameters: TextParameters, word: Callable[[T], TextReply], news: T) -> TextReply:
        """A prompt's log-probabilities may be many, and others' requests must not wait until they are worded."""
        if parameters.sampling.prompt_logprobs is None:
            return word(news)
        return await asyncio.to_thread(word, news)

    def _text_of(self, prompt_ids: list[int], parameters: TextParameters) -> TextStream:
        facts = self.session.facts
        return TextStream(
            self.tokenizer,
            stops=parameters.stop,
            include_stop=parameters.include_stop,
            skip_special_tokens=parameters.skip_special_tokens,
            prompt_ids=prompt_ids,
            min_tokens=parameters.sampling.min_tokens,
            ends=parameters.sampling.stop_ids(facts.eos_token_ids if facts is not None else ()),
        )

    def _check(self, prompt_ids: list[int], parameters: TextParameters) -> None:
        facts = self.session.facts
        if facts is not None:
            sampling_params.check(parameters.sampling, vocab_size=facts.vocab_size)
            sampling_params.check_length(len(prompt_ids), parameters.sampling, max_model_len=facts.max_model_len)

    async def _reply(self, reply: TextReply) -> None:
        await self._replies.send(encode(reply))


def main() -> None:
    logs.configure()
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=TextStart)
    die_with_parent()
    try:
        asyncio.run(TextWorker(start).run())
    except PagodaError as error:
        leave(error.message, 2)
    except Exception:
        log.exception("the text worker ends by an unexpected error")
        leave("the text worker failed unexpectedly; its log has the details", 1)


if __name__ == "__main__":
    main()
