"""A runner without a model, and an auditor of the memory, for tests of the scheduler and of the engine's loop.

The fake device keeps what a KV cache would hold as one number for each slot: the *trace* of the token there, a mix of
its salt, every token before it and itself. So a slot proves what was written to it, in which order and for whom. A step
fails as soon as one position of one request reads another trace than its lone run would have left, and a sampled token
is made of the trace under its block table, so that corruption also shows in the answer.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from pagoda.allocation import BlockAllocator
from pagoda.block_pool import BlockPool
from pagoda.plan import Chunk, Collected, Plan
from pagoda.protocol import FinishReason
from pagoda.request import MAX_PREEMPTIONS, Request, Status
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler

VOCAB = 50
MASK = (1 << 64) - 1


def make_request(
    key: Hashable,
    prompt_ids: Iterable[int],
    *,
    max_tokens: int = 8,
    stop_ids: Iterable[int] = (),
    seed: int = 0,
    salt: str = "",
    priority: int = 0,
    timeout: float | None = None,
    waits: bool = False,
) -> Request:
    """`waits`: the request's next token may depend on all tokens before it, so that it is never a step ahead."""
    params = SamplingParams(presence_penalty=1.0) if waits else SamplingParams()
    return Request(
        key,
        list(prompt_ids),
        params,
        max_tokens,
        frozenset(stop_ids),
        seed,
        cache_salt=salt,
        priority=priority,
        timeout=timeout,
    )


def make_group(keys: Iterable[Hashable], prompt_ids: Iterable[int], **rest: Any) -> Request:
    """A request whose forks answer the same prompt, each drawing with a seed of its own; the first key leads."""
    prompt, seed = list(prompt_ids), rest.pop("seed", 0)
    leader, *forks = [make_request(key, prompt, seed=seed + i, **rest) for i, key in enumerate(keys)]
    leader.forks = forks
    for fork in forks:
        fork.fork_of = leader
    return leader


def root_trace(salt: str) -> int:
    return zlib.crc32(salt.encode()) + 1


def mix(trace: int, token: int) -> int:
    trace = (trace * 6364136223846793005 + token * 1442695040888963407 + 1013904223) & MASK
    return trace ^ (trace >> 29)


def sample(trace: int, seed: int) -> int:
    return int(mix(trace ^ (seed & MASK), VOCAB) >> 33) % VOCAB


def rank_of(request: Request) -> tuple[float, int]:
    """Ten seconds of waiting outweigh one level of priority; among equals the first comer is the first served."""
    return (request.arrival_time + 10.0 * request.priority, abs(request.rank[1]))


def is_held(request: Request) -> bool:
    """True for a fork that waits until its leader's prompt has been computed."""
    return request.fork_of is not None and request in request.fork_of.forks


class Lone:
    """The tokens and traces of a request that runs alone, as far as anyone asked."""

    def __init__(self, prompt_ids: Iterable[int], seed: int, salt: str) -> None:
        self.seed = seed
        self.tokens: list[int] = []
        self.traces: list[int] = []
        self._last = root_trace(salt)
        for token in prompt_ids:
            self._append(token)

    def _append(self, token: int) -> None:
        self._last = mix(self._last, token)
        self.tokens.append(token)
        self.traces.append(self._last)

    def extend_to(self, length: int) -> Lone:
        while len(self.tokens) < length:
            self._append(sample(self._last, self.seed))
        return self


def lone_run(request: Request) -> tuple[list[int], FinishReason]:
    """The output of a request that shares the engine with nobody."""
    start = request.num_prompt_tokens
    lone = Lone(request.prompt_ids, request.seed, request.cache_salt)
    for count in range(1, request.max_tokens + 1):
        token = lone.extend_to(start + count).tokens[-1]
        if token in request.stop_ids:
            return lone.tokens[start:], "stop"
    return lone.tokens[start:], "length"


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


# ── the auditor ───────────────────────────────────────────────────────────────────────────────────────────────────────


def audit(runner: FakeRunner) -> None:
    """Prove the memory's invariants from what was written, without the code under test. Raises AssertionError."""
    scheduler = runner.scheduler
    running = [r for r in scheduler.requests.values() if r.status is Status.RUNNING]
    assert sorted(running, key=lambda r: r.rank) == scheduler.running, "the running requests are not listed by rank"
    waiting = {r for r in scheduler.requests.values() if r.status is Status.WAITING}
    assert waiting == set(scheduler.waiting._costs), "the queue counts others than those who wait"
    assert scheduler.waiting.num_tokens == sum(scheduler.waiting._costs.values())
    assert {r for r in waiting if not is_held(r)} == set(scheduler.waiting._ready), "a request waits for nothing"
    assert set(scheduler.requests.values()) >= set(scheduler._deadlines), "an ended request keeps its deadline"
    assert not any(r.block_ids for r in scheduler.requests.values() if r.status is not Status.RUNNING)
    owners = Counter(block for request in running for block in request.block_ids)
    _audit_ownership(scheduler, owners)
    _audit_names(runner)
    for request in running:
        _audit_request(runner, request, owners)


def _audit_ownership(scheduler: Scheduler, owners: Counter[int]) -> None:
    pool = scheduler.pool
    free = list(pool._free)
    assert [owners[b] for b in range(pool.num_blocks)] == pool._references, "references differ from owners"
    assert not owners.keys() & set(free), "an owned block is free"
    assert len(free) == len(set(free)) == pool.num_free
    assert len(free) + len(owners) == pool.num_blocks, "a block is neither owned nor free"
    cached = [pool._hash_of[block] is not None for block in free]
    assert cached == sorted(cached), "a cached block would be taken before an empty one"


def _audit_names(runner: FakeRunner) -> None:
    pool = runner.scheduler.pool
    assert {b: h for h, b in pool._block_of.items()} == {b: h for b, h in enumerate(pool._hash_of) if h is not None}
    assert runner.scheduler.blocks.enable_prefix_caching or not pool._block_of
    for name, block in pool._block_of.items():
        assert name == content_name(runner, block), f"block {block} does not hold what its hash says"


def content_name(runner: FakeRunner, block: int) -> bytes | None:
    """The hash that a block deserves by what was written; None unless every slot follows the one before."""
    key = tuple(runner.slots[block])
    if key not in runner.names:
        runner.names[key] = _name(runner, key)
    return runner.names[key]


def _name(runner: FakeRunner, slots: tuple[int | None, ...]) -> bytes | None:
    roots = {root_trace(salt): hashlib.sha256(b"pagoda\0" + salt.encode()).digest() for salt in SALTS}
    chain: list[tuple[int, int]] = []
    trace = slots[-1]
    while trace in runner.origin:
        before, token = runner.origin[trace]
        chain.insert(0, (trace, token))
        trace = before
    size = runner.block_size
    if trace not in roots or len(chain) % size or tuple(t for t, _ in chain[-size:]) != slots:
        return None
    name = roots[trace]
    for start in range(0, len(chain), size):
        tokens = [token for _, token in chain[start : start + size]]
        name = hashlib.sha256(name + struct.pack(f"={size}q", *tokens)).digest()
    return name


SALTS = ("", "a", "b")
"""The salts that tests use."""


def _audit_request(runner: FakeRunner, request: Request, owners: Counter[int]) -> None:
    size, blocks = runner.block_size, request.block_ids
    assert len(set(blocks)) == len(blocks), f"request {request.key!r} holds a block twice"
    assert len(blocks) * size >= request.num_computed, f"request {request.key!r} computed beyond its blocks"
    settled = request.epoch >= MAX_PREEMPTIONS
    most = request.num_prompt_tokens + request.max_tokens if settled else request.num_tokens
    waste = len(blocks) - -(-most // size)
    assert waste <= 0, f"request {request.key!r} holds {waste} blocks that it has no token for"
    assert request.epoch <= MAX_PREEMPTIONS, f"request {request.key!r} was preempted {request.epoch} times"
    for block in blocks[request.num_computed // size :]:
        assert owners[block] == 1, f"block {block}, which request {request.key!r} writes to, is shared"
        assert runner.scheduler.pool._hash_of[block] is None, f"block {block} has a hash before it is full"
    known = len(request.token_ids)
    lone = runner.lone(request).extend_to(max(known, request.num_computed))
    assert request.token_ids == lone.tokens[:known], f"request {request.key!r} has other tokens than its lone run"
    found = [trace for block in blocks for trace in runner.slots[block]][: request.num_computed]
    assert found == lone.traces[: request.num_computed], f"request {request.key!r} lost content"


# ── who drives them ───────────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    """Time that passes with every look at it."""

    def __init__(self, tick: float = 0.02) -> None:
        self.now = 0.0
        self.tick = tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class Ledger:
    """What each request was given, held against its lone run."""

    def __init__(self) -> None:
        self.requests: dict[Hashable, Request] = {}
        self.given: dict[Hashable, list[int]] = {}
        self.reasons: dict[Hashable, FinishReason] = {}

    def accept(self, request: Request) -> None:
        for member in (request, *request.forks):
            assert member.key not in self.requests
            self.requests[member.key] = member
            self.given[member.key] = []

    def forget(self, request: Request) -> None:
        """It was refused, and its forks with it."""
        for member in (request, *request.forks):
            del self.requests[member.key], self.given[member.key]

    def record(self, key: Hashable, index: int, tokens: list[int], reason: FinishReason | None) -> None:
        assert key not in self.reasons, f"request {key!r} gets something after its end"
        assert index == len(self.given[key]), f"request {key!r} gets tokens at {index} after {len(self.given[key])}"
        self.given[key] += tokens
        if reason is not None:
            self.reasons[key] = reason
            self._check_end(self.requests[key])

    def _check_end(self, request: Request) -> None:
        tokens, reason = lone_run(request)
        given = self.given[request.key]
        assert request.status is Status.FINISHED
        assert request.block_ids == []
        if self.reasons[request.key] == "abort":
            assert given == tokens[: len(given)], f"request {request.key!r} differs from its lone run before its abort"
            assert len(given) < len(tokens), f"request {request.key!r} was aborted after its end"
        else:
            assert given == tokens, f"request {request.key!r} differs from its lone run"
            assert self.reasons[request.key] == reason

    def check_complete(self) -> None:
        assert self.reasons.keys() == self.requests.keys(), "a request never ended"


class Loop:
    """The engine's order of events around a scheduler and its fake device, one at a time."""

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.scheduler = runner.scheduler
        self.ledger = Ledger()
        self.num_expired = 0

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.ledger.accept(request)

    def abort(self, key: Hashable) -> None:
        request = self.scheduler.abort(key)
        if request is not None:
            self.ledger.record(key, request.num_output_tokens, [], "abort")

    def expire(self) -> None:
        for request in self.scheduler.expire():
            self.ledger.record(request.key, request.num_output_tokens, [], "abort")
            self.num_expired += 1

    def launch(self) -> Plan:
        plan = self.scheduler.schedule()
        if plan:
            self.runner.launch(plan)
        return plan

    def read_back(self) -> None:
        launched = self.runner.in_flight[0]
        for progress in self.scheduler.update(launched.plan, self.runner.collect(launched).token_ids):
            index = progress.request.num_output_tokens - len(progress.new_token_ids)
            self.ledger.record(progress.request.key, index, progress.new_token_ids, progress.finish_reason)

    def step(self) -> Plan:
        self.expire()
        plan = self.launch()
        in_flight = self.runner.in_flight
        assert plan or in_flight or not self.scheduler.requests, "requests are left and nothing runs"
        if in_flight and (not plan or len(in_flight) > self.runner.steps_ahead):
            self.read_back()
        return plan

    def drain(self) -> None:
        most = self.runner.num_launches + self.most_steps()
        while self.scheduler.requests or self.runner.in_flight:
            self.step()
            assert self.runner.num_launches <= most, "requests are left after all the steps that they could need"

    def most_steps(self) -> int:
        """Steps for all even if one at a time moves, by a token, and all are preempted as often as can be."""
        ahead = self.runner.steps_ahead
        tokens = sum(r.num_prompt_tokens + r.max_tokens + ahead for r in self.ledger.requests.values())
        return (1 + MAX_PREEMPTIONS) * tokens + ahead


def make_loop(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_num_mixed_tokens: int | None = None,
    max_num_queued_requests: int = 10_000,
    max_num_queued_tokens: int = 1_000_000,
    enable_prefix_caching: bool = True,
    steps_ahead: int = 0,
    verify: bool = True,
    pool_class: type[BlockPool] = BlockPool,
    allocator_class: type[BlockAllocator] = BlockAllocator,
    scheduler_class: type[Scheduler] = Scheduler,
) -> Loop:
    scheduler = scheduler_class(
        allocator_class(pool_class(num_blocks), block_size=block_size, enable_prefix_caching=enable_prefix_caching),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_mixed_tokens=max_num_mixed_tokens,
        max_num_queued_requests=max_num_queued_requests,
        max_num_queued_tokens=max_num_queued_tokens,
        clock=Clock(),
    )
    return Loop(FakeRunner(scheduler, steps_ahead=steps_ahead, verify=verify))
