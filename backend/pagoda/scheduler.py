"""Which tokens of which requests run in the next step; `pagoda.allocation` says in which blocks.

Pure Python, no torch, deterministic. One token budget a step, a smaller one where streams go on: decodes first, then
chunks of running prefills, then waiting requests, each in the order of rank (`pagoda.waiting`). A request takes the
blocks of all its known tokens when it is admitted, so only decodes ever run out; then the last in rank is preempted and
recomputed later. After `MAX_PREEMPTIONS` a request is *settled*: it waits until all the blocks it may ever need are
free, and keeps them.

The runner may be one step ahead: `schedule` counts a token that is still being sampled as pending, and `update` drops
what a step computed for a request that has ended or was preempted meanwhile.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import repeat

from pagoda import waiting
from pagoda.allocation import BlockAllocator
from pagoda.plan import Chunk, Plan, Progress
from pagoda.protocol import FinishReason, TokenLogprob
from pagoda.request import Request, Status
from pagoda.waiting import LazyHeap, WaitingQueue


@dataclass(slots=True)
class Counters:
    """Cumulative since start."""

    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0


class Scheduler:
    def __init__(
        self,
        blocks: BlockAllocator,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_mixed_tokens: int | None = None,
        max_num_queued_requests: int,
        max_num_queued_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocks = blocks
        self.pool = blocks.pool
        self.block_size = blocks.block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_mixed_tokens = max_num_mixed_tokens or max_num_batched_tokens
        """The budget of a step with decodes."""
        self.clock = clock
        self.counters = Counters()
        self.running: list[Request] = []
        """In the order of rank."""
        self.waiting = WaitingQueue(max_requests=max_num_queued_requests, max_tokens=max_num_queued_tokens)
        self._requests: dict[Hashable, Request] = {}
        self._deadlines: LazyHeap[float] = LazyHeap()
        self._arrivals = 0
        self._steps = 0

    @property
    def requests(self) -> Mapping[Hashable, Request]:
        """Everything not finished, by key."""
        return self._requests

    # ── comings and goings ────────────────────────────────────────────────────────────────────────────────────────

    def add(self, request: Request) -> None:
        """Queue a request and its forks.

        Raises InvalidRequest for what can never run, Overloaded when the queue is full, ValueError for a live key.
        """
        group = [request, *request.forks]
        self.blocks.check_fits(request)
        self.waiting.check_room(group)
        for member in group:
            if member.key in self._requests:
                raise ValueError(f"request {member.key!r} is live already")
        now = self.clock()
        for member in group:
            self._enter(member, now)
        self.waiting.ready(request)

    def _enter(self, request: Request, now: float) -> None:
        request.arrival_time = now
        request.rank = waiting.rank(request, self._arrivals)
        self._arrivals += 1
        self._requests[request.key] = request
        self.waiting.add(request)
        if request.timeout is not None:
            self._deadlines.push(request, now + request.timeout)

    def abort(self, key: Hashable, reason: FinishReason = "abort") -> Request | None:
        """End a request in whatever state it is; its blocks are free at once. None when it has ended already."""
        request = self._requests.get(key)
        if request is not None:
            self._finish(request, reason)
        return request

    def expire(self) -> list[Request]:
        """End the requests whose time is up, and name them."""
        expired = []
        while (entry := self._deadlines.first()) and entry[0] <= self.clock():
            self._finish(entry[1], "abort")
            expired.append(entry[1])
        return expired

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self.blocks.release(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self._requests[request.key]
        self._deadlines.discard(request)
        self._bequeath(request)

    # ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> Plan:
        """The next step; empty when nothing can run."""
        plan = Plan(self._steps)
        decodes = self._schedule_decodes(plan, self.max_num_batched_tokens)
        budget = (self.max_num_mixed_tokens if decodes else self.max_num_batched_tokens) - decodes
        if len(plan.chunks) < len(self.running):
            budget -= self._schedule_prefills(plan, budget)
        self._admit(plan, budget)
        self._steps += 1
        return plan

    def _schedule_decodes(self, plan: Plan, budget: int) -> int:
        used = 0
        for request in list(self.running):
            if used < budget and request.is_decoding and self._can_decode(request) and self._make_room(request):
                self._grant(plan, request, 1, samples=True)
                used += 1
        return used

    def _can_decode(self, request: Request) -> bool:
        """False when a pending token fills the request's limit, or must be known before the next one is drawn."""
        if not request.num_pending:
            return True
        return request.num_computed + 1 < request.length_limit and not request.depends_on_output

    def _schedule_prefills(self, plan: Plan, budget: int) -> int:
        used = 0
        for request in self.running:
            if used < budget and not request.is_decoding:
                used += self._grant_prefill(plan, request, budget - used)
        return used

    def _admit(self, plan: Plan, budget: int) -> None:
        while budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting.first()
            if request is None or not self.blocks.admit(request, plan, margin=len(self.running)):
                return
            self.waiting.remove(request)
            request.status = Status.RUNNING
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self.clock()
                self._count_prefix(request)
            insort(self.running, request, key=_rank)
            budget -= self._grant_prefill(plan, request, budget)

    def _count_prefix(self, request: Request) -> None:
        if self.blocks.reads_cache(request) and request.fork_of is None:
            request.num_cached = request.num_computed
            self.counters.prefix_queried_tokens += request.num_prompt_tokens
            self.counters.prefix_hit_tokens += request.num_cached

    def _grant_prefill(self, plan: Plan, request: Request, budget: int) -> int:
        count = min(request.num_uncomputed, budget)
        self._grant(plan, request, count, samples=count == request.num_uncomputed)
        return count

    def _grant(self, plan: Plan, request: Request, count: int, samples: bool) -> None:
        start = request.num_computed
        plan.chunks.append(Chunk(request, start, count, samples, request.num_pending > 0, request.epoch))
        request.num_computed = start + count
        request.num_pending += samples
        # What is known is published before it is computed: a step that reads it comes later, and within one step every
        # layer writes all keys before it attends. So requests that arrive together compute a common prompt once.
        self.blocks.publish(request, min(start + count, len(request.token_ids)))

    # ── when blocks run out ───────────────────────────────────────────────────────────────────────────────────────

    def _make_room(self, request: Request) -> bool:
        """A block for the request's next token, by preempting the last in rank. False when that was itself."""
        while self.blocks.lacks_room(request):
            if self.pool.num_free:
                self.blocks.grow(request)
            elif self.preempt() is request:
                return False
        return True

    def preempt(self) -> Request | None:
        """Free the blocks of the last in rank, as when the pool runs out. None when all are settled and keep theirs."""
        victim = next((r for r in reversed(self.running) if not r.is_settled), None)
        if victim is not None:
            self._preempt(victim)
        return victim

    def _preempt(self, request: Request) -> None:
        """Back to the queue at its old place; what was in flight for it is dropped, its tokens are recomputed."""
        self.running.remove(request)
        self.blocks.release(request)
        request.status = Status.WAITING
        request.epoch += 1
        request.num_pending = request.num_computed = request.num_published = 0
        self.counters.preemptions += 1
        self.waiting.add(request)
        self.waiting.ready(request)

    # ── forks ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _release_forks(self, leader: Request) -> None:
        """The prompt has been computed: whoever wants another answer to it may share its blocks."""
        for fork in leader.forks:
            if fork.status is Status.WAITING:
                self.waiting.ready(fork)
        leader.forks = []

    def _bequeath(self, leader: Request) -> None:
        """A request that ends before its prompt was computed leaves that to the first of its forks."""
        heirs = [fork for fork in leader.forks if fork.status is Status.WAITING]
        leader.forks = []
        if heirs:
            first = heirs[0]
            self.waiting.remove(first)
            first.fork_of, first.forks = None, heirs[1:]
            for fork in first.forks:
                fork.fork_of = first
            self.waiting.add(first)
            self.waiting.ready(first)

    # ── results ───────────────────────────────────────────────────────────────────────────────────────────────────

    def update(
        self, plan: Plan, sampled: list[int], logprobs: list[TokenLogprob | None] | None = None
    ) -> list[Progress]:
        """Take in a step's samples, one for each chunk with `samples`, in the plan's order."""
        samples = zip(sampled, logprobs or repeat(None), strict=False)
        progress: list[Progress] = []
        now = self.clock()
        for chunk in plan.chunks:
            if chunk.samples:
                token, logprob = next(samples)
                if not chunk.is_stale:
                    reason = self._advance(chunk, token, now)
                    progress.append(Progress(chunk.request, [token], reason, logprob))
        return progress

    def _advance(self, chunk: Chunk, token: int, now: float) -> FinishReason | None:
        request = chunk.request
        request.num_pending -= 1
        request.token_ids.append(token)
        request.last_token_time = now
        if request.first_token_time is None:
            request.first_token_time = now
        self.blocks.publish(request, chunk.start + chunk.count)
        if request.forks:
            self._release_forks(request)
        reason = self._finish_reason(request, token)
        if reason is not None:
            self._finish(request, reason)
        return reason

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        if token in request.stop_ids or (request.matcher is not None and request.matcher.is_finished):
            return "stop"
        if len(request.token_ids) >= request.length_limit:
            return "length"
        return None

    # ── what it holds ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def num_wasted_slots(self) -> int:
        """Slots of the cache, in tokens, that requests have reserved and have no token for."""
        return self.blocks.num_wasted_slots(self.running)

    def check(self) -> None:
        """Prove the invariants of memory and queues. Raises AssertionError."""
        self.blocks.check(self.running)
        if len(self.waiting) + len(self.running) != len(self._requests):
            raise AssertionError(
                f"{len(self.waiting)} requests wait and {len(self.running)} run of {len(self._requests)}"
            )
        for request in self._requests.values():
            if request.status is Status.WAITING and request.block_ids:
                raise AssertionError(f"waiting request {request.key!r} holds blocks {request.block_ids}")


def _rank(request: Request) -> tuple[float, int]:
    return request.rank
