"""What prefix caching is worth to requests with the same system prompt: the engine alone, with and without it."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

import msgspec

from pagoda.bench.alone import Alone, requests
from pagoda.bench.loads import Load, shared
from pagoda.request import Request
from pagoda.scheduler import Scheduler


class PrefixResult(msgspec.Struct, frozen=True):
    caching: bool
    first_token_seconds: float
    """Median over single requests that come one after another, the first of them left out."""
    output_rate: float
    """Output tokens a second, `at_once` requests at any time."""
    hit_tokens: int
    """Prompt tokens that were not computed."""


class Case(msgspec.Struct, frozen=True):
    """Lengths in tokens."""

    prefix: int = 512
    own: int = 32
    output: int = 64
    single: int = 8
    """Requests whose first tokens are timed."""
    count: int = 64
    at_once: int = 16


def measure(engine: Alone, case: Case, done: Callable[[PrefixResult], None]) -> list[PrefixResult]:
    """Without prefix caching and with it; `done` hears of each."""
    results = []
    for caching in (False, True):
        engine.config = msgspec.structs.replace(engine.config, enable_prefix_caching=caching)
        results.append(_measure(engine, case))
        done(results[-1])
    return results


def _measure(engine: Alone, case: Case) -> PrefixResult:
    draw = {"prefix": case.prefix, "own": case.own, "vocab_size": engine.model.vocab_size}
    singles = shared(case.single + 1, output=1, **draw)
    loads = shared(case.count, output=case.output, **draw, seed=1)
    _first_tokens(engine, singles[:2])  # the first steps of a process are slow
    latencies = _first_tokens(engine, singles)[1:]
    scheduler = engine.scheduler(loads)
    seconds = _at_once(engine, scheduler, loads, case.at_once)
    return PrefixResult(
        engine.config.enable_prefix_caching,
        statistics.median(latencies),
        case.count * case.output / seconds,
        scheduler.counters.prefix_hit_tokens,
    )


def _first_tokens(engine: Alone, loads: list[Load]) -> list[float]:
    """Seconds from each request's arrival to its first token, one request after another."""
    scheduler, seconds = engine.scheduler(loads), []
    for request in requests(loads):
        began = time.monotonic()
        scheduler.add(request)
        while scheduler.requests:
            _step(engine, scheduler)
        seconds.append(time.monotonic() - began)
    return seconds


def _at_once(engine: Alone, scheduler: Scheduler, loads: list[Load], most: int) -> float:
    """Seconds for all requests; a new one comes when one ends."""
    waiting: deque[Request] = deque(requests(loads))
    began = time.monotonic()
    while waiting or scheduler.requests:
        while waiting and len(scheduler.requests) < most:
            scheduler.add(waiting.popleft())
        _step(engine, scheduler)
    return time.monotonic() - began


def _step(engine: Alone, scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    scheduler.update(plan, engine.runner.collect(engine.runner.launch(plan)).token_ids)
