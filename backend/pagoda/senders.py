"""What the host asks of its surroundings: the ways out of the stub, which are Triton's in production."""

from __future__ import annotations

from typing import Protocol

from pagoda import protocol as wire
from pagoda.text.wire import TextReply


class SessionSender(Protocol):
    """One open session's way back to its client; called from the host's thread only."""

    def send(self, payload: bytes, *, final: bool) -> None: ...

    def is_cancelled(self) -> bool: ...


class MetricsSink(Protocol):
    """Where the engine's snapshots go; called from the host's thread only."""

    def __call__(self, metrics: wire.Metrics) -> None: ...

    def engine_down(self) -> None: ...


class TextSender(Protocol):
    """One text request's way back."""

    def send(self, reply: TextReply) -> None: ...

    def is_cancelled(self) -> bool: ...
