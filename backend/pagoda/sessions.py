"""The engine's door: a thread that speaks ZeroMQ with the sessions' hosts and never holds up the loop.

It checks and queues what comes in, groups a step's outputs by session, encodes one payload for each, and merges the
payloads of a session whose client has fallen behind. Every session's state lives in this thread alone.

Peers send [reply_to, frame]; they get [session, b"final" or b"", payload] at the socket whose identity is `reply_to`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from pagoda import protocol as wire
from pagoda.admission import admit, group
from pagoda.awake import AwakeClock
from pagoda.engine import Cancel, Command, Event, Pulse, Refusal, StepResult, Submit, key_of
from pagoda.errors import EngineFailure, EngineUnavailable, InvalidRequest, Overloaded, PagodaError
from pagoda.request import Request
from pagoda.sampling_params import Structure
from pagoda.structured import Compiler

log = logging.getLogger("pagoda.sessions")

MAX_UNACKED = 256
"""Payloads a session may be behind; later steps are merged until it catches up."""
PING_TIMEOUT = 5.0
"""Seconds without a ping after which a session's client counts as gone. It is the grace of an unload, too."""
MAX_ANSWERS = 128
"""To one prompt."""
IDLE_PING_TIMEOUT = 2.5
"""The same for a session without requests: closing it costs its client nothing and lets an unload go on."""
COMPILERS = 2
"""Grammars that are compiled at a time."""
MAX_COMPILING = 256
"""Requests of a session that may wait for their grammars."""


@dataclass(slots=True)
class Session:
    reply_to: bytes
    last_ping: float
    live: set[int] = field(default_factory=set)
    sent: int = 0
    acked: int = 0
    compiling: set[int] = field(default_factory=set)
    """Live requests whose grammar is not ready yet: the loop does not know them."""
    backlog: dict[int, wire.Output] = field(default_factory=dict)
    """Outputs that wait for credit, merged by request."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request and its forks have their matchers, or why they never will."""

    request: Request
    error: PagodaError | None = None


class Sessions(threading.Thread):
    """Owns the engine's socket. `pulse` and `commands` come with `serve`, once the model is loaded."""

    def __init__(self, address: str) -> None:
        super().__init__(name="sessions", daemon=True)
        self._clock = AwakeClock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.bind(address)
        self._events: queue.SimpleQueue[Event | Compiled] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sessions: dict[str, Session] = {}
        self._commands: queue.SimpleQueue[Command] | None = None
        self._pulse = Pulse()
        self._last_step = self._moved_at = 0.0
        self._facts: wire.ModelFacts | None = None
        self._compiler: Compiler | None = None
        self._compilers = ThreadPoolExecutor(COMPILERS, "compiler")
        self._epoch = 0
        self._stop_reason: str | None = None
        self._next_sweep = 0.0
        self._num_payloads = 0

    # ── called by other threads ───────────────────────────────────────────────────────────────────────────────────

    def emit(self, event: Event | Compiled) -> None:
        self._events.put(event)
        os.eventfd_write(self._wake, 1)

    def serve(self, commands: queue.SimpleQueue[Command], pulse: Pulse, facts: wire.ModelFacts, epoch: int) -> None:
        """The model is loaded: from now on requests are taken. Tells every open session."""
        self._commands, self._pulse, self._epoch = commands, pulse, epoch
        self._compiler = Compiler(Path(facts.folder), facts.vocab_size, facts.eos_token_ids)
        self._facts = facts
        os.eventfd_write(self._wake, 1)

    def stop(self, reason: str) -> None:
        """Close every session with a reason, then end the thread; returns when all is sent."""
        self._stop_reason = reason
        os.eventfd_write(self._wake, 1)
        self.join(timeout=2.0)

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        announced = False
        while self._stop_reason is None:
            poller.poll(250)
            self._clock.turn()
            self._receive_all()
            if self._facts is not None and not announced:
                announced = True
                self._announce(self._facts)
            self._deliver_all()
            self._sweep()
        for name in list(self._sessions):
            self._close(name, self._stop_reason)
        self._socket.close()
        self._context.term()  # returns when all is sent, or LINGER is over

    def _receive_all(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._receive(parts)

    def _receive(self, parts: list[bytes]) -> None:
        try:
            _sender, reply_to, raw = parts
            frame = wire.decode_frame(raw)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            log.warning("a frame that is not ours was dropped: %s", error)
            return
        for message in frame.messages:
            self._handle(frame.session, reply_to, message)

    def _handle(self, name: str, reply_to: bytes, message: wire.ClientMessage) -> None:
        if isinstance(message, wire.Open):
            self._open(name, reply_to, message)
            return
        session = self._sessions.get(name)
        if session is None:
            self._send_to(reply_to, name, [wire.Closed("this session is not open in the engine: open it again")], True)
            return
        match message:
            case wire.Generate():
                self._generate(name, session, message)
            case wire.Abort():
                self._abort(name, session, message)
            case wire.Ping():
                self._ping(name, session, message)
            case wire.Close():
                self._close(name, "closed by its client")

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, name: str, reply_to: bytes, message: wire.Open) -> None:
        if message.version != wire.VERSION:
            reason = f"this engine speaks version {wire.VERSION} of the session protocol, not {message.version}"
            self._send_to(reply_to, name, [wire.Closed(reason)], True)
            return
        if name not in self._sessions:  # a host opens its sessions again when it is not sure that we know them
            self._sessions[name] = Session(reply_to, self._clock.now)
        if self._facts is not None:
            self._send(name, [wire.Ready(self._facts, self._epoch)])

    def _generate(self, name: str, session: Session, message: wire.Generate) -> None:
        try:
            request = self._admit(name, session, message)
        except PagodaError as error:
            first = message.id
            self._send(name, [_failed(i, error) for i in range(first, first + max(1, min(message.n, MAX_ANSWERS)))])
            return
        ids = range(message.id, message.id + message.n)
        session.live.update(ids)
        if message.params.structure is None:
            self._submit(request)
        else:
            session.compiling.update(ids)
            self._compilers.submit(self._compile, request, message.params.structure)

    def _submit(self, request: Request) -> None:
        assert self._commands is not None
        self._commands.put(Submit(request))

    def _compile(self, request: Request, structure: Structure) -> None:
        """In a thread of its own: a grammar may take a second."""
        assert self._compiler is not None
        try:
            grammar = self._compiler.compile(structure)
            for member in (request, *request.forks):
                member.matcher = grammar.matcher()
            self.emit(Compiled(request))
        except PagodaError as error:
            self.emit(Compiled(request, error))
        except Exception:
            log.exception("a grammar could not be compiled")
            self.emit(Compiled(request, EngineFailure("the grammar could not be compiled; the log has the reason")))

    def _admit(self, name: str, session: Session, message: wire.Generate) -> Request:
        """Raises InvalidRequest, EngineUnavailable or Overloaded."""
        if self._facts is None:
            raise EngineUnavailable("the model is still loading: try again in a moment")
        request = admit(name, message, self._facts)
        for request_id in range(message.id, message.id + message.n):
            if request_id in session.live:
                raise InvalidRequest(f"request id {request_id} is in use in this session", field="id")
        if message.params.structure is not None and len(session.compiling) >= MAX_COMPILING:
            raise Overloaded(f"{len(session.compiling)} requests wait for their grammars: try again later")
        return request

    def _abort(self, name: str, session: Session, message: wire.Abort) -> None:
        if message.id in session.compiling:
            session.compiling.discard(message.id)
            session.live.discard(message.id)
        elif message.id in session.live and self._commands is not None:
            stopped = message.reason == "stop_string"
            kept = message.tokens_kept if stopped else None
            self._commands.put(Cancel((name, message.id), "stop" if stopped else "abort", kept))

    def _ping(self, name: str, session: Session, message: wire.Ping) -> None:
        session.last_ping = self._clock.now
        session.acked = max(session.acked, message.acked)
        pulse = self._pulse
        self._send(name, [wire.Pong(message.nonce, pulse.step, pulse.busy, self._stillness(), pulse.longest_step)])
        if session.backlog and self._has_credit(session):
            outputs = list(session.backlog.values())
            session.backlog.clear()
            self._send(name, [wire.Tokens(pulse.step, outputs)])

    def _stillness(self) -> float:
        """Seconds that the loop has had work and not moved."""
        if not self._pulse.busy or self._pulse.last_step_time != self._last_step:
            self._last_step, self._moved_at = self._pulse.last_step_time, self._clock.now
        return self._clock.now - self._moved_at

    def _close(self, name: str, reason: str) -> None:
        session = self._sessions.pop(name)
        self._send_to(session.reply_to, name, [wire.Closed(reason)], True)
        if self._commands is not None:
            for request_id in session.live:
                self._commands.put(Cancel((name, request_id), "abort"))

    def _sweep(self) -> None:
        """Close the sessions whose pings have stopped."""
        now = self._clock.now
        if now < self._next_sweep:
            return
        self._next_sweep = now + 0.25
        for name, session in list(self._sessions.items()):
            allowed = PING_TIMEOUT if session.live else IDLE_PING_TIMEOUT
            if now - session.last_ping > allowed:
                log.info("a session's pings have stopped: it is closed, its %d requests are aborted", len(session.live))
                self._close(name, f"no ping for {allowed} s")

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _announce(self, facts: wire.ModelFacts) -> None:
        for name in self._sessions:
            self._send(name, [wire.Ready(facts, self._epoch)])

    def _deliver_all(self) -> None:
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            match event:
                case StepResult(step, outputs):
                    self._deliver(step, outputs)
                case Refusal((name, request_id), error):
                    self._refuse(name, request_id, error)
                case wire.Metrics():
                    self._broadcast(event)
                case Compiled(request, error):
                    self._begin(request, error)

    def _begin(self, leader: Request, error: PagodaError | None) -> None:
        """Those of a group that still want their answers go to the loop, or hear why they cannot."""
        name, _ = key_of(leader)
        session = self._sessions.get(name)
        if session is None:
            return
        wanted = [r for r in (leader, *leader.forks) if key_of(r)[1] in session.compiling]
        session.compiling.difference_update(key_of(r)[1] for r in wanted)
        if error is not None:
            for request in wanted:
                self._refuse(name, key_of(request)[1], error)
        elif wanted:
            self._submit(group(wanted))

    def _deliver(self, step: int, outputs: list[tuple[tuple[str, int], wire.Output]]) -> None:
        by_session: dict[str, list[wire.Output]] = {}
        for (name, request_id), output in outputs:
            session = self._sessions.get(name)
            if session is not None:
                by_session.setdefault(name, []).append(output)
                if output.finish_reason is not None:
                    session.live.discard(request_id)
        for name, ready in by_session.items():
            session = self._sessions[name]
            if session.backlog or not self._has_credit(session):
                _merge(session.backlog, ready)
            else:
                self._send(name, [wire.Tokens(step, ready)])

    def _refuse(self, name: str, request_id: int, error: PagodaError) -> None:
        session = self._sessions.get(name)
        if session is not None:
            session.live.discard(request_id)
            self._send(name, [_failed(request_id, error)])

    def _broadcast(self, metrics: wire.Metrics) -> None:
        metrics.counters["session_payloads_total"] = self._num_payloads
        for name, session in self._sessions.items():
            if self._has_credit(session):
                self._send(name, [metrics])

    def _has_credit(self, session: Session) -> bool:
        return session.sent - session.acked < MAX_UNACKED

    def _send(self, name: str, messages: list[wire.EngineMessage]) -> None:
        session = self._sessions[name]
        session.sent += 1
        self._num_payloads += 1
        self._send_to(session.reply_to, name, messages, False)

    def _send_to(self, reply_to: bytes, name: str, messages: list[wire.EngineMessage], final: bool) -> None:
        self._socket.send_multipart([reply_to, name.encode(), b"final" if final else b"", wire.encode(messages)])


def _failed(request_id: int, error: PagodaError) -> wire.Failed:
    return wire.Failed(request_id, error.code, error.message, getattr(error, "field", None))


def _merge(backlog: dict[int, wire.Output], outputs: list[wire.Output]) -> None:
    for output in outputs:
        earlier = backlog.get(output.id)
        tokens = earlier.token_ids + output.token_ids if earlier else output.token_ids
        index = earlier.index if earlier else output.index
        backlog[output.id] = wire.Output(
            output.id,
            index,
            tokens,
            output.finish_reason,
            output.usage or (earlier.usage if earlier else None),
            (earlier.logprobs or []) + (output.logprobs or []) if earlier and earlier.logprobs else output.logprobs,
            earlier.prompt_logprobs if earlier else output.prompt_logprobs,
        )
