"""A day of an engine in milliseconds: drawn requests, arrivals and aborts over a fake device, all from one seed."""

from __future__ import annotations

import queue
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from pagoda.allocation import BlockAllocator
from pagoda.block_pool import BlockPool
from pagoda.engine import Cancel, Command, Engine, Event, Refusal, StepResult, Stop, Submit
from pagoda.errors import DeadlineExceeded, Overloaded
from pagoda.request import Request
from pagoda.scheduler import Scheduler
from unit.audit import audit
from unit.lone import VOCAB, Lone, make_group
from unit.loop import Loop, make_loop
from unit.planted_faults import Fault

SESSION = "s"


@dataclass(frozen=True)
class Shape:
    """What a seed draws for the engine itself."""

    block_size: int
    max_model_len: int
    num_blocks: int
    max_num_seqs: int
    budget: int
    mixed_budget: int | None
    max_queued: int
    max_queued_tokens: int
    caching: bool
    steps_ahead: int


def draw_shape(rng: random.Random, num_requests: int) -> Shape:
    block_size = rng.choice([2, 4, 4, 8])
    max_model_len = rng.randint(12, 60)
    least = -(-max_model_len // block_size)
    return Shape(
        block_size=block_size,
        max_model_len=max_model_len,
        num_blocks=least + rng.choice([0, 1, 2, least // 2, least, 3 * least]),
        max_num_seqs=(max_num_seqs := rng.choice([1, 4, 8, 32])),
        budget=(budget := max(max_num_seqs, rng.choice([3, 8, 16, 64, 256]))),
        mixed_budget=rng.choice([None, rng.randint(max_num_seqs, budget)]),
        max_queued=rng.choice([2, 8, num_requests, num_requests]),
        max_queued_tokens=rng.choice([100, 10_000_000, 10_000_000]),
        caching=rng.random() < 0.8,
        steps_ahead=rng.randrange(2),
    )


class Script:
    """Who asks for what, and when; the same for whoever drives the scheduler."""

    def __init__(self, rng: random.Random, shape: Shape, num_requests: int) -> None:
        self.rng = rng
        self.shape = shape
        self.num_left = num_requests
        self.burst = rng.choice([1, 2, 8, 30])
        self.pause = rng.choice([0.0, 0.3, 0.8])
        self.abort_rate = rng.choice([0.0, 0.02, 0.15])
        self.priorities = rng.choice([[0], [0, 0, 0, 1], [-2, 0, 0, 1, 5]])
        self.timeouts = rng.choice([[None], [None], [None, None, None, 3.0, 30.0], [1.0, 10.0]])
        self.wait_rate = rng.choice([0.0, 0.0, 0.3, 1.0])
        self.group_rate = rng.choice([0.0, 0.0, 0.2])
        self.longest_prompt = 3 if rng.random() < 0.25 else shape.max_model_len
        """Short prompts are admitted together and outgrow the pool together, again and again."""
        self.asked: list[Request] = []
        self.num_keys = 0
        self.openings = [self._tokens(shape.max_model_len) for _ in range(3)]

    def again(self) -> None:
        """A request was refused: somebody asks for another one later."""
        self.num_left += 1

    def _keys(self, count: int) -> list[Hashable]:
        first, self.num_keys = self.num_keys, self.num_keys + count
        return [(SESSION, key) for key in range(first, first + count)]

    def _tokens(self, count: int) -> list[int]:
        return self.rng.choices(range(VOCAB), k=count)

    def turn(self, *, idle: bool, live: list[Hashable]) -> list[Request | Hashable]:
        """Requests to add and keys to abort before the next step; an idle engine gets a request while any is left."""
        actions: list[Request | Hashable] = []
        if idle or self.rng.random() >= self.pause:
            count = min(self.num_left, self.rng.randint(1, self.burst))
            self.num_left -= count
            actions += [self._request() for _ in range(count)]
        if self.rng.random() < self.abort_rate:
            actions.append(self.rng.choice(live or [(SESSION, 0)]))
        if self.asked and self.rng.random() < self.abort_rate / 4:
            actions.append(self.rng.choice(self.asked).key)
        return actions

    def _request(self) -> Request:
        longest, rng = self.shape.max_model_len, self.rng
        before = rng.choice(self.asked[-8:]) if self.asked and rng.random() < 0.3 else None
        salt = before.cache_salt if before else rng.choice(["", "", "a"])
        prompt = self._prompt(before)[: rng.randint(1, min(longest - 1, self.longest_prompt))]
        size = rng.randint(2, 5) if rng.random() < self.group_rate else 1
        request = make_group(
            self._keys(size),
            prompt,
            max_tokens=rng.randint(1, min(longest - len(prompt), 40)),
            stop_ids=rng.sample(range(VOCAB), rng.choice([0, 0, 2, 6])),
            seed=rng.choice([0, 1]),
            salt=salt,
            priority=rng.choice(self.priorities),
            timeout=rng.choice(self.timeouts),
            waits=rng.random() < self.wait_rate,
        )
        self.asked += [request, *request.forks]
        return request

    def _prompt(self, before: Request | None) -> list[int]:
        """The head of a common opening, or what an earlier request has said or will say; and something of its own."""
        if before is not None:
            lone = Lone(before.prompt_ids, before.seed, before.cache_salt)
            said = lone.extend_to(before.num_prompt_tokens + self.rng.randint(0, 12)).tokens
            return said + self._tokens(self.rng.randint(1, 4))
        opening = self.rng.choice(self.openings)
        return opening[: self.rng.randint(0, len(opening))] + self._tokens(self.rng.randint(1, 12))


def simulate(
    seed: int,
    *,
    num_requests: int = 0,
    fault: Fault | None = None,
    audit_every: int = 4,
    check_only: bool = False,
) -> Loop:
    """Run one seed to its end. Raises AssertionError at the first broken promise.

    `check_only` leaves everything to the scheduler's own `check`, asked after each step.
    """
    rng = random.Random(seed)
    num_requests = num_requests or rng.randint(20, 60)
    shape = draw_shape(rng, num_requests)
    loop = make_loop(
        num_blocks=shape.num_blocks,
        block_size=shape.block_size,
        max_num_seqs=shape.max_num_seqs,
        max_num_batched_tokens=shape.budget,
        max_num_mixed_tokens=shape.mixed_budget,
        max_num_queued_requests=shape.max_queued,
        max_num_queued_tokens=shape.max_queued_tokens,
        enable_prefix_caching=shape.caching,
        steps_ahead=shape.steps_ahead,
        verify=not check_only,
        pool_class=fault.pool if fault else BlockPool,
        allocator_class=fault.allocator if fault else BlockAllocator,
        scheduler_class=fault.scheduler if fault else Scheduler,
    )
    script = Script(rng, shape, num_requests)
    if check_only:
        _drive_loop(loop, script, audit_every=0)
        return loop
    drive = _drive_engine if seed % 4 == 0 else _drive_loop
    drive(loop, script, audit_every)
    loop.ledger.check_complete()
    loop.scheduler.pool.check([])
    assert loop.scheduler.pool.num_owned == 0
    assert loop.runner.num_launches <= loop.most_steps(), "more steps than any order of them could need"
    for request in loop.ledger.requests.values():
        _check_times(request)
    return loop


def _check_times(request: Request) -> None:
    times = [request.arrival_time, request.first_scheduled_time, request.first_token_time, request.last_token_time]
    happened = [t for t in times if t]
    assert happened == sorted(happened), f"request {request.key!r} has times out of order"


def _drive_loop(loop: Loop, script: Script, audit_every: int) -> None:
    """The scheduler alone, in the engine's order."""
    scheduler, turns = loop.scheduler, 0
    while script.num_left or scheduler.requests or loop.runner.in_flight:
        if turns % 64 == 0:  # it counts all requests
            assert loop.runner.num_launches <= loop.most_steps(), "more steps than any order of them could need"
        idle = not scheduler.requests and not loop.runner.in_flight
        for action in script.turn(idle=idle, live=list(scheduler.requests)):
            if isinstance(action, Request):
                try:
                    loop.add(action)
                except Overloaded:
                    _check_refusal(scheduler, action)
                    script.again()
            else:
                loop.abort(action)
        loop.step()
        turns += 1
        _look(loop, turns, audit_every)


def _check_refusal(scheduler: Scheduler, request: Request) -> None:
    waiting, group = scheduler.waiting, [request, *request.forks]
    tokens = request.num_prompt_tokens + len(request.forks)
    assert len(waiting) + len(group) > waiting.max_requests or waiting.num_tokens + tokens > waiting.max_tokens
    assert len(waiting) > 0, "an empty queue refuses nobody"
    assert not any(member.key in scheduler.requests for member in group), "a group was taken in part"


def _look(loop: Loop, turns: int, audit_every: int) -> None:
    if not audit_every:
        loop.scheduler.check()
    elif turns % audit_every == 0:
        loop.scheduler.check()
        audit(loop.runner)


class ScriptedInbox:
    """Stands where the engine's queue is: a turn's commands, then nothing; a Stop after the last request."""

    def __init__(self, loop: Loop, script: Script, audit_every: int) -> None:
        self.loop = loop
        self.script = script
        self.audit_every = audit_every
        self.turns = 0
        self.commands = self._commands()

    def _commands(self) -> Iterator[Command | None]:
        scheduler, in_flight = self.loop.scheduler, self.loop.runner.in_flight
        while self.script.num_left or scheduler.requests or in_flight:
            idle = not scheduler.requests and not in_flight
            for action in self.script.turn(idle=idle, live=list(scheduler.requests)):
                if isinstance(action, Request):
                    yield Submit(action)
                else:
                    yield Cancel(action, "abort")  # type: ignore[arg-type]
            yield None
            self.turns += 1
            _look(self.loop, self.turns, self.audit_every)
        yield Stop()
        yield None

    def get_nowait(self) -> Command:
        command = next(self.commands)
        if command is None:
            raise queue.Empty
        if isinstance(command, Submit):
            self.loop.ledger.accept(command.request)
        return command

    def get(self, timeout: float) -> Command:
        return self.get_nowait()


def _drive_engine(loop: Loop, script: Script, audit_every: int) -> None:
    """The engine's own loop, to its end, in this thread."""
    ledger = loop.ledger

    def emit(event: Event) -> None:
        if isinstance(event, Refusal) and isinstance(event.error, DeadlineExceeded):
            ledger.record(event.key, len(ledger.given[event.key]), [], "abort")
            loop.num_expired += 1
        elif isinstance(event, Refusal):
            assert isinstance(event.error, Overloaded)
            request = ledger.requests[event.key]
            del ledger.requests[event.key], ledger.given[event.key]
            if request.fork_of is None:
                script.again()
        elif isinstance(event, StepResult):
            for key, output in event.outputs:
                assert key == (SESSION, output.id)
                ledger.record(key, output.index, output.token_ids, output.finish_reason)
                assert (output.usage is not None) == (output.index == 0 or output.finish_reason is not None)

    engine = Engine(loop.scheduler, loop.runner, emit)  # type: ignore[arg-type]
    engine.inbox = ScriptedInbox(loop, script, audit_every)  # type: ignore[assignment]
    engine.run()
    ended = sum(engine.stats.finished.values())
    assert ended == len(ledger.requests), "the metrics count other ends than happened"
    assert engine.stats.generation_tokens == sum(len(given) for given in ledger.given.values())
    assert not engine.stats._last_token_time, "the statistics remember a request that has ended"
