"""A session seen from its client: requests go out in frames, each request's tokens come back as a stream of its own.

Knows no transport: `send` takes frames, `feed` takes payloads. The frontend's transport is Triton's gRPC stream
(`pagoda.triton_client`), the text worker's is ZeroMQ.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Literal

from pagoda import protocol as wire
from pagoda.errors import EngineUnavailable, PagodaError, from_code
from pagoda.sampling_params import SamplingParams

log = logging.getLogger("pagoda.client")

PING_INTERVAL = 0.5
"""Seconds between two pings."""

State = Literal["opening", "ready", "down", "closed"]


class RequestStream:
    """The outputs of one request. Those not yet taken are merged, so a slow taker holds one output at most."""

    def __init__(self, session: Session, request_id: int) -> None:
        self.id = request_id
        self.has_ended = False
        """Its end was taken, or nobody wants the rest."""
        self._session = session
        self._next: wire.Output | None = None
        self._error: PagodaError | None = None
        self._on_arrival: Callable[[], None] | None = None

    def put(self, output: wire.Output) -> None:
        if self._next is not None:
            self._next = _merged(self._next, output)
            return
        self._next = output
        if self._on_arrival is not None:
            self._on_arrival()

    def fail(self, error: PagodaError) -> None:
        self._error = error
        if self._on_arrival is not None:
            self._on_arrival()

    def watch(self, on_arrival: Callable[[], None]) -> None:
        """Call `on_arrival` whenever there is something to take, now if there is already; one call, one `take`."""
        self._on_arrival = on_arrival
        for arrived in (self._next, self._error):
            if arrived is not None:
                on_arrival()

    def take(self) -> wire.Output | None:
        """What has come since the last one; None for nothing. Raises the error that ended the request."""
        if self.has_ended:
            return None
        output, self._next = self._next, None
        if output is not None:
            self.has_ended = output.finish_reason is not None
        elif self._error is not None:
            self.has_ended = True
            raise self._error
        return output

    async def __aiter__(self) -> AsyncIterator[wire.Output]:
        """Outputs until one with a finish reason. Raises the error that ended the request instead."""
        arrivals = Arrivals([self])
        while not arrivals.are_over:
            await arrivals.wait()
            if (arrived := arrivals.take()) is not None:
                yield arrived[1]

    def abort(self, reason: wire.AbortReason, tokens_kept: int | None = None) -> None:
        """Tell the engine that nobody wants the rest. Does nothing when the request has ended."""
        self.has_ended = True
        self._session.abort(self.id, reason, tokens_kept)


class Arrivals:
    """What comes for several requests, in the order of arrival; for one taker.

    One wake-up brings whatever has come: nothing here costs a task, a timer or a future for each output.
    """

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self._streams = streams
        self._ready: deque[int] = deque()
        self._waiter: asyncio.Future[None] | None = None
        for index, stream in enumerate(streams):
            stream.watch(partial(self._add, index))

    @property
    def are_over(self) -> bool:
        """Every request has ended, and its end was taken."""
        return all(stream.has_ended for stream in self._streams)

    async def wait(self) -> None:
        """Until there is something to take."""
        while not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def take(self) -> tuple[int, wire.Output] | None:
        """An output and the place of its stream; None when there is no other. Raises the error that ended one."""
        while self._ready:
            index = self._ready.popleft()
            output = self._streams[index].take()
            if output is not None:
                return index, output
        return None

    def _add(self, index: int) -> None:
        self._ready.append(index)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _merged(earlier: wire.Output, later: wire.Output) -> wire.Output:
    reported = earlier.logprobs is not None or later.logprobs is not None
    return wire.Output(
        earlier.id,
        earlier.index,
        earlier.token_ids + later.token_ids,
        later.finish_reason,
        later.usage or earlier.usage,
        (earlier.logprobs or []) + (later.logprobs or []) if reported else None,
        earlier.prompt_logprobs or later.prompt_logprobs,
    )


class Session:
    """One open session. `send` must queue a frame without waiting."""

    def __init__(self, client: str, send: Callable[[wire.Frame], None]) -> None:
        self.name = secrets.token_hex(16)
        self.client = client
        self.state: State = "opening"
        self.reason = "the model is starting"
        """Why the session is not ready, in words for a client."""
        self.is_writable = True
        """The other side takes frames. False for good once an unload was asked for: what runs may still finish."""
        self.facts: wire.ModelFacts | None = None
        self.metrics: wire.Metrics | None = None
        self.pong: wire.Pong | None = None
        self._last_heard = time.monotonic()
        self._pings_unheard = 0
        self.num_payloads = 0
        self._epoch = 0
        self._send = send
        self._ids = 0
        self._streams: dict[int, RequestStream] = {}
        self._changed = asyncio.Event()
        self._outgoing: list[wire.ClientMessage] = []

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    @property
    def seconds_silent(self) -> float:
        """Seconds since anything came: the engine answers pings, and its host speaks up while the engine is away."""
        since = time.monotonic() - self._last_heard
        return min(since, (1 + self._pings_unheard) * PING_INTERVAL)

    @property
    def is_moving(self) -> bool:
        """True when the engine answers and its loop does not stand still with work in hand."""
        frozen = self.pong is not None and wire.is_frozen(self.pong)
        return self.state == "ready" and self.is_writable and not frozen

    # ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> None:
        self._send(wire.Frame(self.name, "open", [wire.Open(wire.VERSION, self.client)]))

    def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        n: int = 1,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[RequestStream]:
        """Send a request for `n` answers; a stream for each. `timeout`: seconds from the engine's admission.

        Raises EngineUnavailable when the session is not ready.
        """
        if self.state != "ready" or not self.is_writable:
            raise EngineUnavailable(f"{self.reason}: try again in a moment")
        first = self._ids + 1
        self._ids += n
        streams = [RequestStream(self, first + i) for i in range(n)]
        self._streams.update((stream.id, stream) for stream in streams)
        self._post(wire.Generate(first, prompt_ids, params, cache_salt, n, priority, timeout))
        return streams

    def abort(self, request_id: int, reason: wire.AbortReason, tokens_kept: int | None = None) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._post(wire.Abort(request_id, reason, tokens_kept))

    def ping(self) -> None:
        """To be called every PING_INTERVAL seconds."""
        self._pings_unheard += 1
        if self.state in ("ready", "opening"):
            self._post(wire.Ping(0, self.num_payloads))

    def stop_writing(self, reason: str) -> None:
        """Nothing more is taken by the other side; outputs still come."""
        self.is_writable = False
        self.reason = reason

    def end_requests(self, reason: str) -> None:
        """Whatever is still in flight ends here with `reason`."""
        self._fail_all(EngineUnavailable(reason))

    def close(self, reason: str) -> None:
        """Say goodbye; what is still running here ends with `reason`."""
        self.end_requests(reason)
        self._post(wire.Close())
        self._set_state("closed", reason)

    def _post(self, message: wire.ClientMessage) -> None:
        """Messages of one turn of the event loop travel in one frame."""
        if not self.is_writable:
            return
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(message)

    def _flush(self) -> None:
        messages, self._outgoing = self._outgoing, []
        self._send(wire.Frame(self.name, "data", messages))

    # ── in ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def feed(self, payload: bytes) -> None:
        """Take in one payload of the engine's."""
        self.num_payloads += 1
        self._last_heard, self._pings_unheard = time.monotonic(), 0
        for message in wire.decode_payload(payload):
            self._handle(message)

    def _handle(self, message: wire.EngineMessage) -> None:
        match message:
            case wire.Tokens(_, outputs):
                for output in outputs:
                    self._output(output)
            case wire.Failed(request_id, code, text, field):
                self._fail(request_id, from_code(code, text, field))
            case wire.Pong():
                self.pong = message
            case wire.Metrics():
                self.metrics = message
            case wire.Ready(facts, epoch):
                self.pong = None
                if epoch != self._epoch:  # a new engine counts this session's payloads from its Ready on
                    self._epoch, self.num_payloads = epoch, 1
                self.facts = facts
                self._set_state("ready", "")
            case wire.Down(reason):
                self._fail_all(EngineUnavailable(f"{reason}: try again in a moment"))
                self._set_state("down", reason)
            case wire.Closed(reason):
                self.lost(reason)

    def lost(self, reason: str) -> None:
        """The session has ended from the other side; an unload stays the reason when it was one."""
        reason = reason if self.is_writable else self.reason
        self._fail_all(EngineUnavailable(f"{reason}: try again in a moment"))
        self._set_state("closed", reason)

    def _output(self, output: wire.Output) -> None:
        stream = self._streams.get(output.id)
        if stream is None:
            return
        if output.finish_reason is not None:
            del self._streams[output.id]
        stream.put(output)

    def _fail(self, request_id: int, error: PagodaError) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.fail(error)

    def _fail_all(self, error: PagodaError) -> None:
        for request_id in list(self._streams):
            self._fail(request_id, error)

    def _set_state(self, state: State, reason: str) -> None:
        if self.state == "closed":
            return
        self.state, self.reason = state, reason
        self._changed.set()

    async def wait_ready(self, timeout: float) -> None:
        """Until the engine serves. Raises EngineUnavailable with the reason when it does not within `timeout` s."""
        deadline = time.monotonic() + timeout
        while self.state != "ready":
            left = deadline - time.monotonic()
            if left <= 0 or self.state == "closed":
                raise EngineUnavailable(self.reason)
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
