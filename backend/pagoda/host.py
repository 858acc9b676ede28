"""The stub's side of the engine: starts it, watches it, restarts it, and carries bytes between it and Triton's senders.

Knows nothing of Triton: `backend/model.py` hands it senders. One thread (`Host.run`) makes every call of every sender
and of the metrics, because Triton's are not safe from several.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from pagoda import protocol as wire
from pagoda.awake import AwakeClock
from pagoda.child import Child
from pagoda.config import EngineConfig, EngineStart
from pagoda.errors import ConfigError, EngineUnavailable, InvalidRequest
from pagoda.senders import MetricsSink, SessionSender, TextSender
from pagoda.text import wire as text_wire
from pagoda.text.wire import TextAbort, TextReply, TextRequest, TextStart

log = logging.getLogger("pagoda.host")

PING_INTERVAL = 0.5
CANCEL_CHECK_INTERVAL = 0.25
"""Seconds between two looks at whether a sender's client has gone away (45–75 µs each)."""
PONG_TIMEOUT = 3.0
"""Seconds without an answer after which the engine process counts as frozen: sooner than others give the stub up."""
MAX_BACKOFF = 30.0
TEXT_START_INTERVAL = 2.0
"""Seconds between two starts of the text worker, at least."""
OWN_SESSION = "host"


@dataclass(slots=True)
class OpenSession:
    sender: SessionSender
    open_frame: bytes


class Host(threading.Thread):
    """Everything between Triton's `execute`, which calls `forward` and `submit_text`, and the engine."""

    def __init__(
        self, config: EngineConfig, folder: Path, directory: Path, metrics: MetricsSink, gpu: int | None = None
    ) -> None:
        super().__init__(name="host", daemon=True)
        self.config = config
        self.gpu = gpu
        """The only one that the engine sees; None for all."""
        self.folder = folder
        self.directory = directory
        self.metrics = metrics
        self.engine: Child | None = None
        self.text: Child | None = None
        self.is_up = False
        """The engine is loaded and answers."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in config.served_model_name)
        unique = f"{name[:24]}-{os.getpid()}"
        self._address = f"ipc://{directory}/{unique}.engine"
        self._text_in = f"ipc://{directory}/{unique}.text-in"
        self._text_out = f"ipc://{directory}/{unique}.text-out"
        self._lock = str(directory / f"engine-{name}.lock")
        self._epoch = 0
        self._failures = 0
        self._restart_at: float | None = None
        self._sessions: dict[str, OpenSession] = {}
        self._texts: dict[int, TextSender] = {}
        self._down_reason = "the engine is starting"
        self._killed_because: str | None = None
        self._text_reason = ""
        """Why the text worker is down."""
        self._text_started = 0.0
        self._clock = AwakeClock()
        self._last_pong = 0.0
        self._next_ping = self._next_cancel_check = 0.0
        self._stopping = threading.Event()
        self._parent = os.pidfd_open(os.getppid())
        self._context = zmq.Context()
        self._up = self._dealer(f"{unique}-up", self._address)
        self._down = self._dealer(f"{unique}-down", self._address)
        self._identity = f"{unique}-down".encode()
        self._text_up = self._push(self._text_in)
        self._text_control = self._push(self._text_in)
        self._text_down = self._context.socket(zmq.PULL)
        self._text_down.bind(self._text_out)

    def _dealer(self, identity: str, address: str) -> zmq.Socket[bytes]:
        return self._connect(zmq.DEALER, address, identity.encode())

    def _push(self, address: str) -> zmq.Socket[bytes]:
        return self._connect(zmq.PUSH, address)

    def _connect(self, kind: int, address: str, identity: bytes = b"") -> zmq.Socket[bytes]:
        """A socket that sends only to a living peer: nothing is kept for the next one."""
        socket = self._context.socket(kind)
        if identity:
            socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(address)
        return socket

    # ── called by initialize, execute and finalize ────────────────────────────────────────────────────────────────

    def launch(self) -> None:
        """Start both children and wait until they serve. Raises ConfigError with the reason of one that cannot."""
        self._start_engine()
        self._start_text()
        deadline = time.monotonic() + self.config.load_timeout
        while not (self.is_up and self._text_serves()):
            self._turn(timeout_ms=100)
            if self.engine is None:
                raise ConfigError(self._down_reason)
            if self.text is None:
                raise ConfigError(self._text_reason)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the model was not ready after load_timeout ({self.config.load_timeout:.0f} s): raise it, "
                    "or see the log for what takes long"
                )

    def forward(self, raw: bytes, make_sender: Callable[[], SessionSender]) -> None:
        """Pass a frame on to the engine. Raises InvalidRequest for what is not a frame of a known session.

        A frame that opens a session calls `make_sender`: from then on the session's payloads go there.
        """
        head = _frame_head(raw)
        if head.kind == "open":
            if head.session in self._sessions or head.session == OWN_SESSION:
                raise InvalidRequest("this session is open already", field="session")
            self._sessions[head.session] = OpenSession(make_sender(), raw)
        elif head.session not in self._sessions:
            raise InvalidRequest("no such session is open here: open it first", field="session")
        self._send_up(raw)

    def submit_text(self, request: TextRequest, sender: TextSender) -> None:
        """Hand a text request to the text worker. Raises EngineUnavailable when the engine is down."""
        if not self.is_up:
            raise EngineUnavailable(f"{self._down_reason}: try again in a moment")
        self._texts[request.id] = sender
        try:
            self._text_up.send(msgspec.msgpack.encode(request), zmq.NOBLOCK)
        except zmq.Again:
            self._texts.pop(request.id, None)
            raise EngineUnavailable("the text worker is starting: try again in a moment") from None

    def stop(self) -> None:
        """End the thread, then both children."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=5)
        for child in (self.text, self.engine):
            if child is not None:
                child.end(grace=3.0)
        self._context.destroy(linger=0)
        for name in (self._address, self._text_in, self._text_out):
            Path(name.removeprefix("ipc://")).unlink(missing_ok=True)

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn(timeout_ms=100)
            except Exception:
                log.exception("the host's thread survived an unexpected error")

    def _turn(self, timeout_ms: int) -> None:
        poller = zmq.Poller()
        poller.register(self._down, zmq.POLLIN)
        poller.register(self._text_down, zmq.POLLIN)
        poller.register(self._parent, zmq.POLLIN)
        for child in (self.engine, self.text):
            if child is not None:
                poller.register(child.pidfd, zmq.POLLIN)
        if self._parent in dict(poller.poll(timeout_ms)):
            self._die()
        self._clock.turn()
        self._receive_payloads()
        self._receive_text()
        self._watch_children()
        self._ping()
        self._check_cancelled()

    def _die(self) -> None:
        """tritonserver is gone. A stub with work in hand would linger; its children follow it by their own watch."""
        for child in (self.engine, self.text):
            if child is not None:
                child.kill()
        os._exit(1)

    def _receive_payloads(self) -> None:
        for name, final, payload in _drain(self._down):
            if name == OWN_SESSION.encode():
                self._own_payload(payload)
                continue
            self._deliver(name.decode(), payload, final=bool(final))

    def _deliver(self, name: str, payload: bytes, *, final: bool) -> None:
        """Hand a payload to its session; a sender that fails loses its own session only."""
        session = self._sessions.get(name)
        if session is None:
            return
        try:
            session.sender.send(payload, final=final)
        except Exception:
            log.exception("a session's sender failed: the session is dropped")
            final = True
            self._send_down_socket(wire.encode(wire.Frame(name, "data", [wire.Close()])))
        if final:
            self._sessions.pop(name, None)

    def _own_payload(self, payload: bytes) -> None:
        for message in wire.decode_payload(payload):
            match message:
                case wire.Ready():
                    self._came_up()
                case wire.Pong():
                    self._last_pong = self._clock.now
                    if wire.is_frozen(message):
                        self._kill_engine(f"its loop made no step for {message.seconds_since_step:.0f} s")
                case wire.Metrics():
                    self.metrics(message)

    def _receive_text(self) -> None:
        for (raw,) in _drain(self._text_down):
            self._reply(msgspec.msgpack.decode(raw, type=TextReply))

    def _reply(self, reply: TextReply) -> None:
        """Hand a reply to its request's sender; the last one ends the request."""
        sender = self._texts.get(reply.id)
        if sender is None:
            return
        if reply.final:
            del self._texts[reply.id]
        try:
            sender.send(reply)
        except Exception:
            log.exception("a text request's sender failed: the request is dropped")
            self._abort_text(reply.id)

    def _abort_text(self, request_id: int) -> None:
        self._texts.pop(request_id, None)
        with contextlib.suppress(zmq.Again):
            self._text_control.send(msgspec.msgpack.encode(TextAbort(request_id)), zmq.NOBLOCK)

    # ── the engine's life ─────────────────────────────────────────────────────────────────────────────────────────

    def _start_engine(self) -> None:
        self._epoch += 1
        self._restart_at = None
        start = EngineStart(self.config, str(self.folder), self._address, self._lock, self._epoch)
        self.engine = Child("pagoda.process", start, self.directory, self.gpu)
        self._last_pong = self._clock.now

    def _start_text(self) -> None:
        start = TextStart(self.config.served_model_name, str(self.folder), self._address, self._text_in, self._text_out)
        self.text = Child("pagoda.text.worker", start, self.directory)
        self._text_started = time.monotonic()

    def _text_serves(self) -> bool:
        """It binds its address once its tokenizer is loaded."""
        return bool(self._text_control.poll(0, zmq.POLLOUT))

    def _came_up(self) -> None:
        if not self.is_up:
            self.is_up = True
            self._failures = 0
            log.info("engine %d is up, process %d", self._epoch, self.engine.pid if self.engine else -1)
            for session in list(self._sessions.values()):
                self._send_down_socket(session.open_frame)

    def _watch_children(self) -> None:
        if self.engine is not None and self.engine.has_ended:
            self._engine_died(self.engine)
        if self.engine is None and self._restart_at is not None and time.monotonic() >= self._restart_at:
            self._start_engine()
        if self.text is None and time.monotonic() >= self._text_started + TEXT_START_INTERVAL:
            self._start_text()
        if self.text is not None and self.text.has_ended:
            self._text_died(self.text)
        if self.is_up and self._clock.now - self._last_pong > PONG_TIMEOUT:
            self._kill_engine(f"it gave no answer for {PONG_TIMEOUT:.0f} s")

    def _text_died(self, text: Child) -> None:
        self._text_reason = text.last_words() or f"the text worker ended {text.ending}"
        log.error("no text worker: %s", self._text_reason)
        text.end(grace=0)
        self.text = None
        self._fail_texts(self._text_reason)

    def _engine_died(self, engine: Child) -> None:
        unexplained = f"the engine process ended {engine.ending}"
        self._down_reason = engine.last_words() or self._killed_because or unexplained
        self._killed_because = None
        engine.end(grace=0)
        self.engine = None
        was_up, self.is_up = self.is_up, False
        self._failures += 1
        wait = 0.0 if was_up and self._failures == 1 else min(2.0 ** (self._failures - 2), MAX_BACKOFF)
        self._restart_at = time.monotonic() + wait
        log.error("%s; next start in %.1f s", self._down_reason, wait)
        self._tell_down()

    def _kill_engine(self, why: str) -> None:
        if self.engine is not None:
            self._killed_because = f"the engine was frozen ({why})"
            self.engine.kill()

    def _tell_down(self) -> None:
        self.metrics.engine_down()
        self._tell_sessions_down()
        self._fail_texts(self._down_reason)

    def _tell_sessions_down(self) -> None:
        """Said again at each ping while the engine is away: it is the stub's own sign of life."""
        payload = wire.encode([wire.Down(self._down_reason)])
        for name in list(self._sessions):
            self._deliver(name, payload, final=False)

    def _fail_texts(self, reason: str) -> None:
        error = EngineUnavailable(f"{reason}: try again in a moment")
        for request_id in list(self._texts):
            self._reply(text_wire.failed(request_id, error))

    # ── pulses ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ping(self) -> None:
        now = time.monotonic()
        if now < self._next_ping:
            return
        self._next_ping = now + PING_INTERVAL
        if not self.is_up:
            self._tell_sessions_down()
        # Opening again is harmless, and needed after the engine has restarted or has lost patience with us.
        self._send_down_socket(
            wire.encode(wire.Frame(OWN_SESSION, "open", [wire.Open(wire.VERSION, "host"), wire.Ping(0, 2**62)]))
        )

    def _check_cancelled(self) -> None:
        """Abort what belongs to clients that have gone away."""
        now = time.monotonic()
        if now < self._next_cancel_check:
            return
        self._next_cancel_check = now + CANCEL_CHECK_INTERVAL
        for name, session in list(self._sessions.items()):
            if session.sender.is_cancelled():
                self._drop(name, "the client's connection ended")
        for request_id, sender in list(self._texts.items()):
            if sender.is_cancelled():
                self._reply(text_wire.cancelled(request_id))
                self._abort_text(request_id)

    def _drop(self, name: str, reason: str) -> None:
        """End a session on our side and in the engine."""
        self._send_down_socket(wire.encode(wire.Frame(name, "data", [wire.Close()])))
        self._deliver(name, wire.encode([wire.Closed(reason)]), final=True)

    # ── sockets ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _send_up(self, raw: bytes) -> None:
        """By `execute`'s thread. With the engine down the frame is dropped: every session has been told."""
        with contextlib.suppress(zmq.Again):
            self._up.send_multipart([self._identity, raw], zmq.NOBLOCK)

    def _send_down_socket(self, raw: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._down.send_multipart([self._identity, raw], zmq.NOBLOCK)


def _frame_head(raw: bytes) -> wire.FrameHead:
    if len(raw) > wire.MAX_FRAME_BYTES:
        raise InvalidRequest(
            f"the frame has {len(raw)} bytes, the most allowed is {wire.MAX_FRAME_BYTES}", field="session"
        )
    try:
        return wire.decode_frame_head(raw)
    except (msgspec.MsgspecError, RecursionError):
        raise InvalidRequest("the session tensor holds no frame of the session protocol", field="session") from None


def _drain(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    found = []
    while True:
        try:
            found.append(socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return found
