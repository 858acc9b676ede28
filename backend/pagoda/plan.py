"""What the scheduler tells a runner, and what comes back: a step's chunks, its samples, and what they brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from pagoda.errors import PagodaError
from pagoda.protocol import FinishReason, TokenLogprob
from pagoda.request import Request, Status

_RUNNING = Status.RUNNING
"""Here, since finding an enum's member takes longer than all the rest of `is_stale`."""


class Chunk(msgspec.Struct, gc=False, eq=False):
    """Tokens [start, start + count) of a request in one step. Never changed.

    A step makes hundreds: a Struct takes a third of a dataclass's time, and the garbage collector need not follow it,
    for nothing that it holds leads back to it.
    """

    request: Request
    start: int
    count: int
    samples: bool
    """True when the chunk reaches the request's end, so that its last row of logits is sampled."""
    reads_pending: bool
    """True when the chunk's token is still on the device."""
    epoch: int

    @property
    def is_stale(self) -> bool:
        return self.request.status is not _RUNNING or self.request.epoch != self.epoch


@dataclass(slots=True)
class Plan:
    """One step: decodes first, then prefill chunks."""

    step: int
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Blocks (from, to) whose content is copied before the step writes anything."""

    @property
    def num_tokens(self) -> int:
        return sum([chunk.count for chunk in self.chunks])

    @property
    def num_decodes(self) -> int:
        """Leading chunks of one token that continue a sequence."""
        return next((i for i, c in enumerate(self.chunks) if c.count > 1 or c.start == 0), len(self.chunks))

    def __bool__(self) -> bool:
        return bool(self.chunks)


class Collected(NamedTuple):
    """A step's results, read back from the device."""

    token_ids: list[int]
    """One for each chunk that samples, in the plan's order."""
    logprobs: list[TokenLogprob | None] | None = None
    """Beside `token_ids`; None when no request of the step asked for any."""
    prompt_logprobs: Sequence[tuple[Chunk, list[TokenLogprob]]] = ()
    """Of the prompt tokens that follow a chunk's own, where asked for."""
    failures: Sequence[tuple[Chunk, PagodaError]] = ()
    """Requests that cannot go on, each with its own error; the others are not touched."""


class Progress(msgspec.Struct, gc=False, eq=False):
    """What a step brought a request."""

    request: Request
    new_token_ids: list[int]
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None = None
