"""The models a Triton server offers, each with an open session: found, watched, let go.

An open session holds an unload back, so readiness is polled: once a model stops being ready, its requests get
`unload_grace` seconds to finish and what is left is ended with a reason. From the moment an unload is asked for, Triton
takes no more frames for the model, not even a goodbye: the engine closes a session whose pings have stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from pagoda.client import Session
from pagoda.errors import ConfigError, EngineUnavailable, ModelNotFound
from pagoda.triton_client import GrpcSession, ModelState, Triton

log = logging.getLogger("pagoda.registry")

UNLOADING = "the model is being unloaded"
POLL_INTERVAL = 1.0
"""Seconds between two looks at the repository."""
START_INTERVAL = 0.1
"""The same while no model is known."""
HEALTH_SILENCE = 1.5
"""Seconds without a sign of life after which health tells: two pings have gone unanswered."""
SILENCE = 2.5
"""Seconds without a sign of life after which a model is not given new requests."""
LOST_SILENCE = 5.0
"""Seconds without a sign of life after which requests in flight are given up."""


@dataclass(slots=True, eq=False)
class Entry:
    """A model and the session that serves it."""

    link: GrpcSession
    task: asyncio.Task[None] | None
    opened: float = field(default_factory=time.time)

    @property
    def session(self) -> Session:
        return self.link.session

    @property
    def is_healthy(self) -> bool:
        return self.session.is_moving and self.session.seconds_silent < HEALTH_SILENCE

    @property
    def takes_requests(self) -> bool:
        return self.session.is_moving and self.session.seconds_silent < SILENCE

    @property
    def trouble(self) -> str:
        """Why it is not healthy, in words for a client."""
        if self.session.state != "ready":
            return self.session.reason
        if self.session.seconds_silent >= HEALTH_SILENCE:
            return f"the model's server process has not answered for {self.session.seconds_silent:.0f} s"
        return "the engine's loop does not move"


class Registry:
    """Keeps one session to each ready Pagoda model. `run` for life; `close` before the end."""

    def __init__(self, triton: Triton, client: str, *, unload_grace: float = 5.0) -> None:
        self.triton = triton
        self.client = client
        self.unload_grace = unload_grace
        self.is_connected = False
        """Triton answered the last time it was asked."""
        self.failed: dict[str, str] = {}
        """Models that could not be loaded, with Triton's reason."""
        self._entries: dict[str, Entry] = {}
        self._leaving: set[Entry] = set()
        """Sessions of models that are being unloaded; a model may be loaded again meanwhile."""
        self._foreign: set[str] = set()
        self._wake = asyncio.Event()
        self._polling = asyncio.Lock()
        self._looked = 0.0
        self._closing = False

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return iter(sorted(self._entries.items()))

    @property
    def num_requests(self) -> int:
        return sum(entry.session.num_requests for entry in (*self._entries.values(), *self._leaving))

    def names(self) -> list[str]:
        """Models that take requests, or will again by themselves."""
        return sorted(self._entries)

    def session(self, name: str) -> Session:
        """A model's session, ready to take a request. Raises ModelNotFound or EngineUnavailable with the reason."""
        entry = self._entries.get(name)
        if entry is None:
            if not self.is_connected:
                raise EngineUnavailable("Triton does not answer: try again in a moment")
            if any(leaving.link.model == name for leaving in self._leaving):
                raise EngineUnavailable(f"{UNLOADING}: try again later, or choose another")
            known = ", ".join(self.names()) or "none"
            raise ModelNotFound(f"the model {name[:200]!r} does not exist; loaded models: {known}")
        if not entry.takes_requests:
            raise EngineUnavailable(f"{entry.trouble}: try again in a moment")
        return entry.session

    async def find(self, name: str) -> Session:
        """As `session`, after another look at the server for a model that is not known yet or is just opening."""
        if name not in self._entries:
            await self.poll()
        entry = self._entries.get(name)
        if entry is not None and entry.session.state == "opening":
            with contextlib.suppress(EngineUnavailable):
                await entry.session.wait_ready(SILENCE)
        return self.session(name)

    # ── the watch ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Poll for ever."""
        while not self._closing:
            try:
                await self.poll()
            except Exception:
                log.exception("the registry survived an unexpected error")
            self._wake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_INTERVAL if self._entries else START_INTERVAL)

    async def poll(self) -> None:
        """One look at the server: open new sessions, let go of those that leave, give up those that are silent.

        Those who ask while a look is under way share the next one.
        """
        asked = time.monotonic()
        async with self._polling:
            if self._looked < asked:
                self._looked = time.monotonic()
                await self._look()

    async def _look(self) -> None:
        self._give_up_silent()
        try:
            states = await self.triton.models()
        except EngineUnavailable:
            self.is_connected = False
            return
        ready = {state.name for state in states if state.is_ready}
        self.failed = {s.name: s.reason for s in states if _has_failed(s)}
        self._foreign &= ready
        for name, entry in list(self._entries.items()):
            if name not in ready or not entry.session.is_writable:
                self._leave(name, entry)
        for name in ready - set(self._entries) - self._foreign:
            await self._found(name)
        self.is_connected = True

    async def _found(self, name: str) -> None:
        try:
            is_ours = await self.triton.is_pagoda(name)
        except ConfigError:  # it has left since
            return
        if not is_ours:
            self._foreign.add(name)
            return
        link = GrpcSession(self.triton, name, self.client)
        entry = Entry(link, None)
        entry.task = asyncio.create_task(self._serve(name, entry))
        self._entries[name] = entry

    async def _serve(self, name: str, entry: Entry) -> None:
        await entry.link.run()
        self._leaving.discard(entry)
        if self._entries.get(name) is entry:
            del self._entries[name]
        self._wake.set()

    def _leave(self, name: str, entry: Entry) -> None:
        """An unload was asked for: no new requests; those in flight get the grace, then end with a reason."""
        count = entry.session.num_requests  # of this process; the supervisor, whose console shows this, has none
        log.info("model %s is being unloaded%s", name, f"; {count} requests in flight" if count else "")
        del self._entries[name]
        self._leaving.add(entry)
        entry.session.stop_writing(UNLOADING)
        asyncio.get_running_loop().call_later(self.unload_grace, entry.session.end_requests, UNLOADING)

    def _give_up_silent(self) -> None:
        for name, entry in list(self._entries.items()):
            if entry.session.seconds_silent > LOST_SILENCE:
                entry.session.lost(entry.trouble)
                # Its task stays until Triton ends the stream: a gRPC call is never cancelled.
                del self._entries[name]

    def forget(self, reason: str) -> None:
        """The server is gone: whatever it served ends with `reason`."""
        for entry in (*self._entries.values(), *self._leaving):
            entry.session.lost(reason)
        self._entries.clear()
        self._leaving.clear()
        self.is_connected = False

    async def close(self, reason: str) -> None:
        """Close every session; requests still running end with `reason`. Returns when all are drained, or in 1 s."""
        self._closing = True
        self._wake.set()
        entries = [*self._entries.values(), *self._leaving]
        for entry in entries:
            await entry.link.close(reason)
        tasks = [entry.task for entry in entries if entry.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)


def _has_failed(state: ModelState) -> bool:
    return not state.is_ready and bool(state.reason) and state.reason != "unloaded"
