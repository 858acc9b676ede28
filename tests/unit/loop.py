"""Who drives a scheduler and its fake device: the engine's order of events, one at a time, with a ledger of answers."""

from __future__ import annotations

from collections.abc import Hashable

from pagoda.allocation import BlockAllocator
from pagoda.block_pool import BlockPool
from pagoda.plan import Plan
from pagoda.protocol import FinishReason
from pagoda.request import MAX_PREEMPTIONS, Request, Status
from pagoda.scheduler import Scheduler
from unit.fake_runner import FakeRunner
from unit.lone import lone_run, make_request


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


def shape(plan: Plan) -> list[tuple[object, int, int]]:
    return [(c.request.key, c.start, c.count) for c in plan.chunks]


def add(loop: Loop, key: str, prompt: int | list[int], **rest: object) -> Request:
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    request = make_request(key, tokens, **rest)  # type: ignore[arg-type]
    loop.add(request)
    return request
