"""Preemption: who goes, how often, and what comes back, which is all as if nothing had been."""

from __future__ import annotations

import pytest
from pagoda.request import MAX_PREEMPTIONS, Status
from unit.audit import audit
from unit.lone import make_group
from unit.loop import add, make_loop


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_the_newest_is_preempted_and_continues_as_if_nothing_had_been(steps_ahead: int) -> None:
    loop = make_loop(num_blocks=5, block_size=4, steps_ahead=steps_ahead)
    old = add(loop, "old", 4, max_tokens=12)
    new = add(loop, "new", [9, 9, 9, 9], max_tokens=12)
    while loop.scheduler.requests:
        loop.step()
        audit(loop.runner)
    loop.drain()
    assert loop.scheduler.counters.preemptions >= 1
    assert (old.epoch, new.epoch >= 1) == (0, True)
    assert list(loop.ledger.reasons) == ["old", "new"]


def test_the_lowest_priority_is_preempted_first_then_the_newest() -> None:
    loop = make_loop(num_blocks=8, block_size=4)
    for key, priority in [("a", 0), ("low", 5), ("b", 0)]:
        add(loop, key, [len(key)] * 6, max_tokens=20, priority=priority)
    preempted: list[object] = []
    while loop.scheduler.requests:
        before = {r.key: r.epoch for r in loop.scheduler.requests.values()}
        loop.step()
        preempted += [r.key for r in loop.scheduler.requests.values() if r.epoch > before.get(r.key, 0)]
    assert preempted[:2] == ["low", "b"]


def test_a_request_is_preempted_a_bounded_number_of_times() -> None:
    """Then it keeps all the blocks it may ever need."""
    loop = make_loop(num_blocks=10, block_size=2, max_num_seqs=4)
    victim = add(loop, "victim", [1, 1], max_tokens=18, priority=100)
    for turn in range(6):
        while victim.status is Status.WAITING:
            loop.step()
        for key in "xyz":
            add(loop, f"{key}{turn}", [2, 2, 3], max_tokens=6)
        for _ in range(6):
            loop.step()
    loop.drain()
    loop.ledger.check_complete()
    assert victim.epoch == MAX_PREEMPTIONS


def test_a_preempted_request_keeps_its_place() -> None:
    loop = make_loop(num_blocks=4, block_size=4)
    for key, token in [("a", 1), ("b", 2)]:
        add(loop, key, [token] * 4, max_tokens=12)
    while not loop.scheduler.counters.preemptions:
        loop.step()
    add(loop, "c", [3])
    loop.drain()
    assert list(loop.ledger.reasons) == ["a", "b", "c"]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    """Recomputation costs what was lost to others, not all."""
    loop = make_loop(num_blocks=8, block_size=4)
    add(loop, "a", 4, max_tokens=20)
    victim = add(loop, "b", [9] * 12, max_tokens=12)
    while not victim.epoch:
        loop.step()
    start = None
    while start is None:
        start = next((c.start for c in loop.step().chunks if c.request is victim), None)
    assert start > 0
    assert victim.num_cached == 0, "the first admission alone counts as a hit"
    loop.drain()


def test_a_fork_never_copies_what_its_own_step_computes() -> None:
    """A leader that comes back after a preemption may share blocks which another request fills in the same step."""
    loop = make_loop(num_blocks=6, block_size=2)
    loop.add(make_group(["leader", "fork"], [1, 2], max_tokens=4))
    loop.step()
    loop.scheduler.preempt()
    add(loop, "evicts all", [9] * 11, max_tokens=1, priority=-9)
    loop.step()
    add(loop, "other", [1, 2, 3], priority=-9)
    plan = loop.step()
    assert {c.request.key for c in plan.chunks} == {"leader", "fork", "other"}
    loop.drain()


def test_times_follow_one_another_and_first_ones_survive_preemption() -> None:
    loop = make_loop(num_blocks=5, block_size=4)
    for key, token in [("a", 1), ("b", 2)]:
        add(loop, key, [token] * 4, max_tokens=12)
    loop.drain()
    assert loop.scheduler.counters.preemptions
    for request in loop.ledger.requests.values():
        scheduled, first = request.first_scheduled_time, request.first_token_time
        assert scheduled is not None
        assert first is not None
        assert 0 < request.arrival_time < scheduled < first < request.last_token_time
