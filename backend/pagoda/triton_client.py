"""Triton over gRPC, as a session's client needs it: the stream that carries a session, and the model repository.

A gRPC call is never cancelled (that can end a Triton server): a session is closed by a message and its stream drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pagoda import protocol as wire
from pagoda.client import PING_INTERVAL, Session
from pagoda.errors import ConfigError, EngineUnavailable

log = logging.getLogger("pagoda.triton_client")

RESTRICTED = ("shared-memory", "model-repository", "model-config", "trace", "logging", "statistics")
"""Protocols of Triton that ask for the secret; `pagoda serve` makes one at each start."""
SECRET_NAME = "pagoda"
SECRET_HEADER = f"triton-grpc-protocol-{SECRET_NAME}"
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),  # on loopback; gRPC's own 120 s would leave a started server unnoticed
]
CALL_TIMEOUT = 5.0
"""Seconds for a call about the repository."""
DRAIN_TIMEOUT = 0.5
"""Seconds that a session which has ended waits for the stream of its frames to end."""


@dataclass(frozen=True, slots=True)
class ModelState:
    name: str
    is_ready: bool
    reason: str


class Triton:
    """One gRPC channel to one server."""

    def __init__(self, address: str, secret: str | None = None) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._draining: set[asyncio.Task[None]] = set()
        self._metadata = ((SECRET_HEADER, secret),) if secret else ()

    async def close(self) -> None:
        await self._channel.close()

    def stream(self) -> Any:
        """A bidirectional ModelStreamInfer call."""
        return self._stub.ModelStreamInfer(metadata=self._metadata)

    async def drain(self, writer: asyncio.Task[None]) -> None:
        """Wait for a session's frames to be answered, which is normally at once.

        A dead stub answers none until Triton is started again: nobody waits for that, and nobody cancels it.
        """
        self._draining.add(writer)
        writer.add_done_callback(self._draining.discard)
        await asyncio.wait([writer], timeout=DRAIN_TIMEOUT)

    async def models(self) -> list[ModelState]:
        """Every model in the repository. As every call here: raises EngineUnavailable when the server does not answer,
        ConfigError with its reason when it refuses.
        """
        index = await self._call(self._stub.RepositoryIndex, service_pb2.RepositoryIndexRequest())
        return [ModelState(m.name, m.state == "READY", _own_words(m.reason)) for m in index.models]

    async def is_pagoda(self, model: str) -> bool:
        request = service_pb2.ModelConfigRequest(name=model)
        return bool((await self._call(self._stub.ModelConfig, request)).config.backend == "pagoda")

    async def load(self, model: str) -> None:
        await self._call(self._stub.RepositoryModelLoad, service_pb2.RepositoryModelLoadRequest(model_name=model), None)

    async def unload(self, model: str) -> None:
        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        await self._call(self._stub.RepositoryModelUnload, request, None)

    async def _call(self, method: Any, request: Any, timeout: float | None = CALL_TIMEOUT) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise EngineUnavailable(f"Triton does not answer: {error.details()}") from None
            raise ConfigError(_own_words(error.details() or str(error.code()))) from None


def _own_words(reason: str) -> str:
    """What our backend raised, when that is the reason, without the class, file and line that Triton puts around it."""
    raised = re.search(r"TritonModelException: (.*?)\s+At:\s", reason, re.DOTALL)
    if reason.endswith("failed to poll from model repository"):
        return f"{reason}: its config.pbtxt is missing or cannot be used; tritonserver.log says why"
    return raised[1] if raised else reason


def _ended_by_triton() -> contextlib.AbstractContextManager[None]:
    """What may be done to a stream that has ended, without knowing."""
    return contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError)


class GrpcSession:
    """A session over two streams of Triton's, with its pings. `run` lasts as long as the session.

    One opens it and brings what the engine sends, the other takes all further frames. Once an unload is wanted, Triton
    answers a frame by an error, and on a stream that brings a decoupled request's responses it may write both at once,
    which ends the whole server (`proto_buffer_writer.h: ASSERTION FAILED: !byte_buffer->Valid()`, 24.10).
    """

    def __init__(self, triton: Triton, model: str, client: str) -> None:
        self.model = model
        self.session = Session(client, self._queue_frame)
        self._triton = triton
        self._frames: asyncio.Queue[wire.Frame | None] = asyncio.Queue()
        self._is_open = asyncio.Event()
        """The engine has answered, or never will: frames that follow the first find the session known."""

    def _queue_frame(self, frame: wire.Frame) -> None:
        self._frames.put_nowait(frame)

    async def run(self) -> None:
        """Open the session and serve it to its end, which `session.state` shows; raises nothing."""
        call = self._triton.stream()
        self.session.open()
        writer = asyncio.create_task(self._write(call))
        pinger = asyncio.create_task(self._ping())
        try:
            async for payload in self._payloads(call):
                self._is_open.set()
                self.session.feed(payload)
        except grpc.aio.AioRpcError as error:
            self.session.lost(f"the connection to Triton ended: {error.details()}")
        except Exception:
            log.exception("a session ended by an unexpected error")
        finally:
            self.session.lost("the connection to Triton ended")
            pinger.cancel()
            self._is_open.set()
            self._frames.put_nowait(None)
            await self._triton.drain(writer)

    async def _payloads(self, call: Any) -> AsyncIterator[bytes]:
        async for response in call:
            if response.error_message:
                self._refused(response.error_message)
                continue
            for raw in response.infer_response.raw_output_contents:
                yield raw

    def _refused(self, message: str) -> None:
        """Triton takes no more frames of this session: an unload was asked for. What runs may still finish."""
        if self.session.is_writable and self.session.state != "closed":
            log.info("session of model %s takes no more frames: %s", self.model, message)
            self.session.stop_writing("the model is being unloaded")

    async def _write(self, opening: Any) -> None:
        if (first := await self._frames.get()) is not None:
            with _ended_by_triton():
                await opening.write(self._request(first))
                await opening.done_writing()
        await self._is_open.wait()
        further = self._triton.stream()
        reader = asyncio.create_task(self._read_refusals(further))
        with _ended_by_triton():
            while (frame := await self._frames.get()) is not None:
                await further.write(self._request(frame))
            await further.done_writing()
        await reader  # a stream that nobody reads any more would be cancelled

    async def _read_refusals(self, call: Any) -> None:
        with _ended_by_triton():
            async for response in call:
                if response.error_message:
                    self._refused(response.error_message)

    def _request(self, frame: wire.Frame) -> Any:
        payload = wire.encode(frame)
        tensor = service_pb2.ModelInferRequest.InferInputTensor(name="session", datatype="UINT8", shape=[len(payload)])
        return service_pb2.ModelInferRequest(model_name=self.model, inputs=[tensor], raw_input_contents=[payload])

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_INTERVAL)
            self.session.ping()

    async def close(self, reason: str) -> None:
        """End the session from this side; `run` returns once the stream is drained."""
        if self.session.state != "closed":
            self.session.close(reason)
            await asyncio.sleep(0)
            self._frames.put_nowait(None)
