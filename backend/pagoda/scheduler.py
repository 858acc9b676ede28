"""Which tokens of which requests run in the next step, and in which blocks.

Pure Python, no torch, deterministic. One token budget a step: decodes first, then chunks of running prefills, then
waiting requests in order of arrival. A request takes the blocks of all its known tokens when it is admitted, so only
decodes ever run out; then the newest request is preempted and recomputed later.

The runner may be one step ahead: `schedule` counts a token that is still being sampled as pending, and `update` drops
what a step computed for a request that has ended or was preempted meanwhile.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field

from pagoda.block_pool import BlockPool
from pagoda.errors import Overloaded
from pagoda.protocol import FinishReason
from pagoda.request import Request, Status


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + count) of a request in one step. Never changed (frozen would cost a third of a step)."""

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
        return self.request.status is not Status.RUNNING or self.request.epoch != self.epoch


@dataclass(slots=True)
class Plan:
    """One step: decodes first, then prefill chunks."""

    step: int
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def num_decodes(self) -> int:
        """Leading chunks of one token that continue a sequence."""
        return next((i for i, c in enumerate(self.chunks) if c.count > 1 or c.start == 0), len(self.chunks))

    def __bool__(self) -> bool:
        return bool(self.chunks)


@dataclass(slots=True)
class Progress:
    """What a step brought a request."""

    request: Request
    new_token_ids: list[int]
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Counters:
    """Cumulative since start."""

    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_queued_requests: int,
        enable_prefix_caching: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_queued_requests = max_num_queued_requests
        self.enable_prefix_caching = enable_prefix_caching
        self.clock = clock
        self.counters = Counters()
        self.running: list[Request] = []
        self._requests: dict[Hashable, Request] = {}
        self._waiting: list[tuple[int, Request]] = []
        self._arrivals = 0
        self._steps = 0

    @property
    def num_waiting(self) -> int:
        return len(self._requests) - len(self.running)

    @property
    def requests(self) -> Mapping[Hashable, Request]:
        """Everything not finished, by key."""
        return self._requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises Overloaded when the queue is full, ValueError for a key in use or no room ever."""
        if self.num_waiting >= self.max_num_queued_requests:
            raise Overloaded(
                f"{self.num_waiting} requests are waiting (max_num_queued_requests {self.max_num_queued_requests}): "
                "try again later"
            )
        if request.key in self._requests:
            raise ValueError(f"request {request.key!r} is live already")
        if self._num_blocks(request.num_prompt_tokens + request.max_tokens) > self.pool.num_blocks:
            raise ValueError(f"request {request.key!r} can grow beyond the pool of {self.pool.num_blocks} blocks")
        request.arrival_time = self.clock()
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.key] = request
        heapq.heappush(self._waiting, (request.arrival, request))
        self._forget_ended()

    def _forget_ended(self) -> None:
        """Aborted requests leave the heap when they come up; a busy engine would keep many of them until then."""
        if len(self._waiting) > 2 * self.num_waiting + 64:
            self._waiting = [entry for entry in self._waiting if entry[1].status is Status.WAITING]
            heapq.heapify(self._waiting)

    def abort(self, key: Hashable, reason: FinishReason = "abort") -> Request | None:
        """End a request in whatever state it is; its blocks are free at once. None when it has ended already."""
        request = self._requests.get(key)
        if request is not None:
            self._finish(request, reason)
        return request

    def schedule(self) -> Plan:
        """The next step; empty when nothing can run."""
        plan = Plan(self._steps)
        budget = self.max_num_batched_tokens
        budget -= self._schedule_decodes(plan, budget)
        budget -= self._schedule_prefills(plan, budget)
        self._admit(plan, budget)
        self._steps += 1
        return plan

    def _schedule_decodes(self, plan: Plan, budget: int) -> int:
        used = 0
        for request in list(self.running):
            if used < budget and request.is_decoding and not self._will_end(request) and self._make_room(request):
                self._grant(plan, request, 1)
                used += 1
        return used

    def _schedule_prefills(self, plan: Plan, budget: int) -> int:
        used = 0
        for request in self.running:
            if used < budget and request.num_uncomputed and not request.is_decoding:
                used += self._grant(plan, request, min(request.num_uncomputed, budget - used))
        return used

    def _admit(self, plan: Plan, budget: int) -> None:
        while budget > 0 and len(self.running) < self.max_num_seqs:
            request = self._next_waiting()
            if request is None or not self._take_blocks(request):
                return
            heapq.heappop(self._waiting)
            request.status = Status.RUNNING
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self.clock()
            self.running.append(request)
            budget -= self._grant(plan, request, min(request.num_uncomputed, budget))

    def _next_waiting(self) -> Request | None:
        while self._waiting and self._waiting[0][1].status is not Status.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _grant(self, plan: Plan, request: Request, count: int) -> int:
        start = request.num_computed
        samples = start + count == request.num_tokens
        plan.chunks.append(Chunk(request, start, count, samples, request.num_pending > 0, request.epoch))
        request.num_computed += count
        request.num_pending += samples
        return count

    def _will_end(self, request: Request) -> bool:
        """True when the pending tokens already fill the request's limit: a further step would be wasted."""
        return request.num_output_tokens + request.num_pending >= request.max_tokens

    # ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take_blocks(self, request: Request) -> bool:
        """Give a waiting request the blocks of all its tokens, shared ones where a prefix is cached."""
        known = self._find_prefix(request)
        wanted = self._num_blocks(request.num_tokens) - len(known)
        margin = len(self.running)
        if wanted + self.pool.num_unreferenced(known) + margin > self.pool.num_free:
            return False
        self.pool.share(known)
        request.block_ids = known + self.pool.take(wanted)
        request.num_computed = len(known) * self.block_size
        request.num_published = len(known)
        self._count_prefix(request)
        return True

    def _find_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the request's beginning. Its last token is always computed: its logits are needed."""
        if not self.enable_prefix_caching:
            return []
        usable = (request.num_tokens - 1) // self.block_size
        return self.pool.find(request.block_hash(i, self.block_size) for i in range(usable))

    def _count_prefix(self, request: Request) -> None:
        if self.enable_prefix_caching and request.first_scheduled_time is None:
            request.num_cached = request.num_computed
            self.counters.prefix_queried_tokens += request.num_prompt_tokens
            self.counters.prefix_hit_tokens += request.num_cached

    def _make_room(self, request: Request) -> bool:
        """A block for the request's next token, by preempting the newest where none is free. False: it was itself."""
        while self._num_blocks(request.num_computed + 1) > len(request.block_ids):
            if self.pool.num_free:
                request.block_ids += self.pool.take(1)
                continue
            victim = max(self.running, key=lambda r: r.arrival)
            self._preempt(victim)
            if victim is request:
                return False
        return request.status is Status.RUNNING

    def _preempt(self, request: Request) -> None:
        """Back to the queue at its old place; what was in flight for it is dropped, its tokens are recomputed."""
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.epoch += 1
        request.num_pending = request.num_computed = request.num_published = 0
        self.counters.preemptions += 1
        heapq.heappush(self._waiting, (request.arrival, request))

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_ids)
        request.block_ids = []

    # ── results ───────────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, plan: Plan, sampled: list[int]) -> list[Progress]:
        """Take in a step's samples, one for each chunk with `samples`, in the plan's order."""
        tokens = iter(sampled)
        return [progress for chunk in plan.chunks for progress in self._advance(chunk, tokens)]

    def _advance(self, chunk: Chunk, tokens: Iterator[int]) -> Iterator[Progress]:
        token = next(tokens) if chunk.samples else None
        request = chunk.request
        if chunk.is_stale:
            return
        if token is not None:
            request.num_pending -= 1
            request.token_ids.append(token)
            self._stamp(request)
        self._publish_blocks(request, chunk.start + chunk.count)
        if token is not None:
            reason = self._finish_reason(request, token)
            if reason is not None:
                self._finish(request, reason)
            yield Progress(request, [token], reason)

    def _stamp(self, request: Request) -> None:
        request.last_token_time = self.clock()
        if request.first_token_time is None:
            request.first_token_time = request.last_token_time

    def _publish_blocks(self, request: Request, num_computed: int) -> None:
        if not self.enable_prefix_caching:
            return
        full = num_computed // self.block_size
        for index in range(request.num_published, full):
            self.pool.publish(request.block_ids[index], request.block_hash(index, self.block_size))
        request.num_published = max(request.num_published, full)

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        if token in request.stop_ids:
            return "stop"
        if request.num_output_tokens >= request.max_tokens:
            return "length"
        return None

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._release(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self._requests[request.key]

    def check(self) -> None:
        """Prove the memory's invariants. Raises AssertionError."""
        self.pool.check(request.block_ids for request in self.running)
        for request in self._requests.values():
            if request.status is Status.WAITING and request.block_ids:
                raise AssertionError(f"waiting request {request.key!r} holds blocks {request.block_ids}")
        for request in self.running:
            if len(request.block_ids) * self.block_size < request.num_computed:
                raise AssertionError(
                    f"request {request.key!r} computed {request.num_computed} tokens beyond its blocks"
                )
            for block in request.block_ids[request.num_computed // self.block_size :]:
                if not self.pool.is_private(block):
                    raise AssertionError(
                        f"block {block}, which request {request.key!r} writes to, is shared or published"
                    )
