"""A runner without a model, for tests of the scheduler and of the engine's loop.

The fake device keeps what a KV cache would hold as one number for each slot: the *trace* of the token there, a mix of
its salt, every token before it and itself. So a slot proves what was written to it, in which order and for whom. A step
fails as soon as one position of one request reads another trace than its lone run would have left, and a sampled token
is made of the trace under its block table, so that corruption also shows in the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.plan import Chunk, Collected, Plan
from pagoda.request import Request, Status
from pagoda.scheduler import Scheduler
from unit.lone import Lone, mix, root_trace, sample


def rank_of(request: Request) -> tuple[float, int]:
    """Ten seconds of waiting outweigh one level of priority; among equals the first comer is the first served."""
    return (request.arrival_time + 10.0 * request.priority, abs(request.rank[1]))


def is_held(request: Request) -> bool:
    """True for a fork that waits until its leader's prompt has been computed."""
    return request.fork_of is not None and request in request.fork_of.forks


@dataclass(frozen=True)
class FakeLaunched:
    plan: Plan
    sampled: list[int]


class FakeRunner:
    """The device of a `Scheduler`. `launch` checks the plan against the scheduler's promises, writes, then reads back.

    Set `verify` to False to leave corruption to whoever looks at the answers.
    """

    def __init__(self, scheduler: Scheduler, *, steps_ahead: int = 0, verify: bool = True) -> None:
        self.scheduler = scheduler
        self.steps_ahead = steps_ahead
        self.verify = verify
        self.block_size = scheduler.block_size
        self.slots: list[list[int | None]] = [[None] * self.block_size for _ in range(scheduler.pool.num_blocks)]
        self.origin: dict[int, tuple[int, int]] = {}
        """Of each trace ever written: the trace before it, and its token."""
        self.names: dict[tuple[int | None, ...], bytes | None] = {}
        """The hash that each content seen in a block deserves."""
        self.num_launches = 0
        self.num_tokens = 0
        self.num_copies = 0
        self.in_flight: list[FakeLaunched] = []
        self._lone: dict[Request, Lone] = {}
        self._device_sample: dict[Request, int] = {}
        self._entered: dict[Request, int] = {}

    def launch(self, plan: Plan) -> FakeLaunched:
        self._check_plan(plan)
        for source, target in plan.copies:
            self.slots[target] = list(self.slots[source])
            self.num_copies += 1
        for chunk in plan.chunks:
            self._write(chunk)
        if self.verify:
            for chunk in plan.chunks:
                self._read(chunk)
        launched = FakeLaunched(plan, [self._sample(chunk) for chunk in plan.chunks if chunk.samples])
        self.in_flight.append(launched)
        self.num_launches += 1
        self.num_tokens += plan.num_tokens
        return launched

    def use_idle_moment(self) -> bool:
        return False

    def collect(self, launched: FakeLaunched) -> Collected:
        assert self.in_flight.pop(0) is launched, "steps are read back in the order in which they were launched"
        return Collected(launched.sampled)

    def lone(self, request: Request) -> Lone:
        if request not in self._lone:
            self._lone[request] = Lone(request.prompt_ids, request.seed, request.cache_salt)
        return self._lone[request]

    # ── the device ────────────────────────────────────────────────────────────────────────────────────────────────

    def _trace(self, request: Request, position: int) -> int:
        if position < 0:
            return root_trace(request.cache_salt)
        trace = self.slots[request.block_ids[position // self.block_size]][position % self.block_size]
        return 0 if trace is None else trace

    def _write(self, chunk: Chunk) -> None:
        request = chunk.request
        trace = self._trace(request, chunk.start - 1)
        for position in range(chunk.start, chunk.start + chunk.count):
            token = self._input(chunk, position)
            before, trace = trace, mix(trace, token)
            self.origin[trace] = (before, token)
            self.slots[request.block_ids[position // self.block_size]][position % self.block_size] = trace

    def _input(self, chunk: Chunk, position: int) -> int:
        if not chunk.reads_pending:
            return chunk.request.token_ids[position]
        assert chunk.count == 1, "only a decode reads a token that is still on the device"
        assert not chunk.request.params.depends_on_output, "this request's tokens must be known before its next one"
        return self._device_sample[chunk.request]

    def _read(self, chunk: Chunk) -> None:
        request, end = chunk.request, chunk.start + chunk.count
        found: list[int | None] = []
        for block in request.block_ids[: -(-end // self.block_size)]:
            found += self.slots[block]
        expected = self.lone(request).extend_to(end).traces
        if found[:end] != expected[:end]:
            wrong = next(p for p in range(end) if found[p] != expected[p])
            raise AssertionError(
                f"request {request.key!r} reads other content at position {wrong} (block "
                f"{request.block_ids[wrong // self.block_size]}) in its chunk [{chunk.start}, {end})"
            )

    def _sample(self, chunk: Chunk) -> int:
        token = sample(self._trace(chunk.request, chunk.start + chunk.count - 1), chunk.request.seed)
        self._device_sample[chunk.request] = token
        return token

    # ── the scheduler's promises ──────────────────────────────────────────────────────────────────────────────────

    def _check_plan(self, plan: Plan) -> None:
        scheduler, chunks = self.scheduler, plan.chunks
        decodes = [self._is_decode(chunk) for chunk in chunks]
        budget = scheduler.max_num_mixed_tokens if any(decodes) else scheduler.max_num_batched_tokens
        assert 0 < plan.num_tokens <= budget, "the token budget is exceeded"
        assert len(scheduler.running) <= scheduler.max_num_seqs, "more requests run than allowed"
        assert len({c.request for c in chunks}) == len(chunks), "a request is twice in one step"
        for chunk in chunks:
            self._check_chunk(chunk)
        self._check_order(plan)
        assert decodes == sorted(decodes, reverse=True), "a decode comes after a prefill"
        assert sum(decodes) <= plan.num_decodes, "a decode is not counted as one"
        self._entered.update((chunk.request, chunk.epoch) for chunk in chunks)
        first = scheduler.running[0]
        assert first.num_pending or any(c.request is first for c in chunks), "the first in rank makes no progress"

    def _check_order(self, plan: Plan) -> None:
        """Whoever enters ranks before all who could have entered instead."""
        entering = [c.request for c in plan.chunks if self._entered.get(c.request) != c.epoch]
        if entering:
            ready = [r for r in self.scheduler.requests.values() if r.status is Status.WAITING and not is_held(r)]
            first = min(map(rank_of, ready), default=None)
            for request in entering:
                assert first is None or rank_of(request) < first, f"request {request.key!r} overtakes another"

    def _check_chunk(self, chunk: Chunk) -> None:
        request, end = chunk.request, chunk.start + chunk.count
        assert not chunk.is_stale, f"request {request.key!r} was taken from the running ones after it got its chunk"
        assert chunk.count > 0
        assert end <= len(request.block_ids) * self.block_size, f"request {request.key!r} writes beyond its blocks"
        assert end == request.num_computed, "a chunk does not follow the one before it"
        assert chunk.samples == (end + chunk.samples == request.num_tokens), "only the last known row is sampled"

    def _is_decode(self, chunk: Chunk) -> bool:
        return chunk.count == 1 and chunk.samples and self._entered.get(chunk.request) == chunk.epoch
