"""Block pool and scheduler under every order of events that hypothesis thinks of; audited after each."""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pagoda.allocation import BlockAllocator
from pagoda.block_pool import BlockPool
from pagoda.request import MAX_PREEMPTIONS, Request
from pagoda.scheduler import Scheduler
from unit.audit import audit
from unit.lone import make_group
from unit.loop import Loop, make_loop

PROMPTS = [[1] * 24, [1] * 8 + [2] * 16, [1] * 5 + [3] * 19, [4, 5] * 12]
"""Prompts are heads of these, so that many share blocks and some part within one."""


class MemoryMachine(RuleBasedStateMachine):
    """Requests of all ages over a tiny pool, launched and read back in every order that the engine's loop can take."""

    pool_class: type[BlockPool] = BlockPool
    allocator_class: type[BlockAllocator] = BlockAllocator
    scheduler_class: type[Scheduler] = Scheduler

    loop: Loop

    @initialize(
        block_size=st.sampled_from([2, 4]),
        num_blocks=st.integers(4, 16),
        max_num_seqs=st.integers(1, 6),
        budget=st.sampled_from([2, 5, 16, 64]),
        steps_ahead=st.integers(0, 1),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(
        self, block_size: int, num_blocks: int, max_num_seqs: int, budget: int, steps_ahead: int, caching: bool
    ) -> None:
        self.loop = make_loop(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
            steps_ahead=steps_ahead,
            pool_class=self.pool_class,
            allocator_class=self.allocator_class,
            scheduler_class=self.scheduler_class,
        )

    def _add(self, prompt: list[int], max_tokens: int, salt: str, stops: bool, *, size: int = 1, **rest: Any) -> None:
        room = self.loop.scheduler.pool.num_blocks * self.loop.scheduler.block_size
        prompt = prompt[: room - 1]
        max_tokens = min(max_tokens, room - len(prompt))
        first = len(self.loop.ledger.requests)
        stop_ids = range(0, 50, 5) if stops else ()
        keys = range(first, first + size)
        self.loop.add(make_group(keys, prompt, max_tokens=max_tokens, stop_ids=stop_ids, salt=salt, **rest))

    @rule(
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(1, 24),
        max_tokens=st.integers(1, 16),
        salt=st.sampled_from(["", "", "a"]),
        stops=st.booleans(),
    )
    def add(self, prompt: list[int], length: int, max_tokens: int, salt: str, stops: bool) -> None:
        self._add(prompt[:length], max_tokens, salt, stops)

    @rule(
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(1, 20),
        max_tokens=st.integers(1, 12),
        size=st.integers(2, 4),
        priority=st.integers(-1, 1),
        waits=st.booleans(),
    )
    def fork(self, prompt: list[int], length: int, max_tokens: int, size: int, priority: int, waits: bool) -> None:
        self._add(prompt[:length], max_tokens, "", False, size=size, priority=priority, waits=waits)

    @rule(prompt=st.sampled_from(PROMPTS), length=st.integers(1, 20), timeout=st.sampled_from([0.2, 1.0, 5.0]))
    def add_with_a_deadline(self, prompt: list[int], length: int, timeout: float) -> None:
        self._add(prompt[:length], 16, "", False, timeout=timeout)

    @rule()
    def expire(self) -> None:
        self.loop.expire()

    @precondition(lambda self: self.loop.ledger.requests)
    @rule(data=st.data(), extra=st.integers(0, 3), max_tokens=st.integers(1, 8))
    def continue_one(self, data: st.DataObject, extra: int, max_tokens: int) -> None:
        """The next turn of a conversation: what a request has said so far, and more."""
        before: Request = data.draw(st.sampled_from(list(self.loop.ledger.requests.values())))
        self._add(before.token_ids + [9] * extra, max_tokens, before.cache_salt, False)

    @precondition(lambda self: len(self.loop.runner.in_flight) <= self.loop.runner.steps_ahead)
    @rule()
    def launch(self) -> None:
        self.loop.launch()

    @precondition(lambda self: self.loop.runner.in_flight)
    @rule()
    def read_back(self) -> None:
        self.loop.read_back()

    @precondition(lambda self: not self.loop.runner.in_flight or self.loop.runner.steps_ahead)
    @rule(count=st.integers(2, 6))
    def run(self, count: int) -> None:
        for _ in range(count):
            self.loop.step()
            audit(self.loop.runner)

    @precondition(lambda self: self.loop.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.loop.abort(data.draw(st.sampled_from(list(self.loop.scheduler.requests))))

    @precondition(lambda self: self.loop.scheduler.running)
    @rule(times=st.integers(1, MAX_PREEMPTIONS + 1))
    def preempt(self, times: int) -> None:
        """As if the pool were smaller, and whatever is in flight; up to where a request is settled."""
        for _ in range(times):
            self.loop.scheduler.preempt()
            if not self.loop.runner.in_flight or self.loop.runner.steps_ahead:
                self.loop.step()

    @rule(key=st.integers(-1, 3))
    def abort_whoever_it_is(self, key: int) -> None:
        """An abort may name a request that has ended, or never was."""
        self.loop.abort(key)

    @invariant()
    def the_memory_is_whole(self) -> None:
        self.loop.scheduler.check()
        audit(self.loop.runner)

    def teardown(self) -> None:
        if not hasattr(self, "loop") or sys.exc_info()[0] is not None:
            return  # what has failed already is not to be masked
        self.loop.drain()
        self.loop.ledger.check_complete()
        self.loop.scheduler.pool.check([])
        assert self.loop.scheduler.pool.num_owned == 0
