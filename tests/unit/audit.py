"""An auditor of the memory under a fake runner: who owns each block, and whether it holds what its hash says."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter

from pagoda.request import MAX_PREEMPTIONS, Request, Status
from pagoda.scheduler import Scheduler
from unit.fake_runner import FakeRunner, is_held
from unit.lone import root_trace


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
