"""Requests that wait for blocks and a place in a step, by rank, within the bounds of the queue.

A request's rank is the time of its arrival plus `PRIORITY_SECONDS` for each level of its priority. So one level is
worth that many seconds of waiting, the order of two requests never changes, and nobody starves: whoever comes long
enough after a request ranks behind it, at any priority.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from pagoda.errors import Overloaded
from pagoda.request import Request

PRIORITY_SECONDS = 10.0

K = TypeVar("K")


def rank(request: Request, arrival: int) -> tuple[float, int]:
    """Lower runs first and is preempted last."""
    return (request.arrival_time + PRIORITY_SECONDS * request.priority, arrival)


class LazyHeap(Generic[K]):
    """Requests by key, smallest first; one that is discarded stays in the heap until it comes up or is one of many."""

    def __init__(self) -> None:
        self._heap: list[tuple[K, int, Request]] = []
        self._live: dict[Request, int] = {}
        self._entries = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._live)

    def push(self, request: Request, key: K) -> None:
        self._entries += 1
        self._live[request] = self._entries
        heapq.heappush(self._heap, (key, self._entries, request))
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def discard(self, request: Request) -> None:
        self._live.pop(request, None)

    def first(self) -> tuple[K, Request] | None:
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def _is_live(self, entry: tuple[K, int, Request]) -> bool:
        return self._live.get(entry[2]) == entry[1]


class WaitingQueue:
    """Counts everything that waits; hands out, in order of rank, what is `ready`.

    Not ready are the forks of a request whose prompt is still being computed.
    """

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        """Tokens that have to be computed before those who wait can go on; a fork's prompt is its leader's."""
        self._costs: dict[Request, int] = {}
        self._ready: LazyHeap[tuple[float, int]] = LazyHeap()

    def __len__(self) -> int:
        return len(self._costs)

    def check_room(self, requests: Sequence[Request]) -> None:
        """Raises Overloaded when these, one request and its forks, do not fit; an empty queue refuses nobody."""
        if len(self) and len(self) + len(requests) > self.max_requests:
            raise Overloaded(
                f"{len(self)} requests are waiting (max_num_queued_requests {self.max_requests}): try again later"
            )
        tokens = sum(map(_cost, requests))
        if self.num_tokens and self.num_tokens + tokens > self.max_tokens:
            raise Overloaded(
                f"{self.num_tokens} tokens are waiting and this request has {tokens} "
                f"(max_num_queued_tokens {self.max_tokens}): try again later"
            )

    def add(self, request: Request) -> None:
        self._costs[request] = _cost(request)
        self.num_tokens += self._costs[request]

    def ready(self, request: Request) -> None:
        """From now on the request can be `first`."""
        self._ready.push(request, request.rank)

    def first(self) -> Request | None:
        entry = self._ready.first()
        return entry[1] if entry else None

    def remove(self, request: Request) -> None:
        self.num_tokens -= self._costs.pop(request)
        self._ready.discard(request)


def _cost(request: Request) -> int:
    return 1 if request.fork_of is not None else request.num_tokens
