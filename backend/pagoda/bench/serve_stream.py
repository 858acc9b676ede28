"""What comes back for one streamed completion, with the time at which each of its pieces arrived."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

DONE = b"[DONE]"
SHOWN = 300
"""Most characters of a server's words that a message repeats."""


class _Choice(msgspec.Struct, gc=False):
    pass


class _Usage(msgspec.Struct, gc=False):
    completion_tokens: int


class _Event(msgspec.Struct, gc=False):
    """The fields that are counted; the decoder skips the others unread."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Answer:
    """One request's answer, as far as it came. Times are seconds of `time.perf_counter()`."""

    began: float
    """When the request was sent; connecting, if it needed a connection of its own, comes after it."""
    status: int | None = None
    times: list[float] = field(default_factory=list)
    """Arrival of every chunk that holds a choice, as `vllm bench serve` counts them; several tokens that the server
    merged are one chunk, and chunks that one read brings have one time."""
    num_tokens: int | None = None
    """`completion_tokens` of the usage."""
    is_done: bool = False
    problem: str | None = None
    """Why the request failed; set by `close` at the latest."""
    _rest: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take a piece of the body, cut anywhere, that arrived at `now`."""
        if self.status != 200:
            self._rest += data
            return
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def _take(self, data: bytes, now: float) -> None:
        if data == DONE:
            self.is_done = True
            return
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.fail(f"the stream holds an event that cannot be read: {error}: {data[:SHOWN]!r}")
            return
        if event.choices:
            self.times.append(now)
        if event.usage is not None:
            self.num_tokens = event.usage.completion_tokens
        if event.error is not None:
            self.fail(f"the stream ended with an error: {_words(event.error)}")

    def fail(self, problem: str) -> None:
        """The first problem is the one that is told."""
        self.problem = self.problem or problem

    def close(self, asked: int) -> None:
        """No more comes: say what is wrong with an answer that should hold `asked` tokens, if anything is."""
        found = self._wrong(asked)
        if found is not None:
            self.fail(found)

    def _wrong(self, asked: int) -> str | None:
        if self.status is None:
            return "the server closed the connection without an answer"
        if self.status != 200:
            return f"{self.status}: {_refusal(self._rest)}"
        if not self.is_done:
            return "the stream broke off before its [DONE]"
        if self.num_tokens is None:
            return "the stream has no usage: the server does not know stream_options.include_usage"
        if self.num_tokens != asked:
            return f"the answer has {self.num_tokens} tokens, not the {asked} asked for with ignore_eos"
        return None if self.times else "the stream has a usage, and no choice before it"


def _refusal(body: bytes) -> str:
    """The message of an OpenAI error body, or the body as it is."""
    try:
        return _words(msgspec.json.decode(body)["error"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return body[:SHOWN].decode("utf-8", "replace")


def _words(error: Any) -> str:
    return str(error["message"] if isinstance(error, dict) and "message" in error else error)[:SHOWN]
