"""Host time of one schedule() + update() while many requests decode: what a step costs before any device works.

    python -m pagoda.bench.scheduler

The target is under 1 ms at 256 running requests. Tokens are made up; no torch is loaded.
"""

from __future__ import annotations

import statistics
import time

from pagoda.block_pool import BlockPool
from pagoda.plan import Plan
from pagoda.request import Request
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler

BLOCK_SIZE = 16
PROMPT_TOKENS = 128
STEPS = 400


def running(num_requests: int, *, steps_ahead: int, caching: bool) -> tuple[Scheduler, list[Plan]]:
    """A scheduler whose requests have all been prefilled, and the plans that are in flight."""
    scheduler = Scheduler(
        BlockPool(num_requests * (-(-(PROMPT_TOKENS + 2 * STEPS) // BLOCK_SIZE) + 1)),
        block_size=BLOCK_SIZE,
        max_num_seqs=num_requests,
        max_num_batched_tokens=num_requests * PROMPT_TOKENS,
        max_num_queued_requests=num_requests,
        max_num_queued_tokens=num_requests * PROMPT_TOKENS,
        enable_prefix_caching=caching,
    )
    for key in range(num_requests):
        prompt = [key, *range(PROMPT_TOKENS - 1)]
        scheduler.add(Request(key, prompt, SamplingParams(), 2 * STEPS, frozenset({-1}), seed=key))
    plans = [scheduler.schedule()]
    if not steps_ahead:
        finish(scheduler, plans.pop())
    return scheduler, plans


def finish(scheduler: Scheduler, plan: Plan) -> None:
    scheduler.update(plan, [7] * len(plan.chunks))


def measure(num_requests: int, *, steps_ahead: int, caching: bool) -> list[tuple[float, float]]:
    """Seconds of schedule() and of update(), for each of `STEPS` steps of `num_requests` decodes."""
    scheduler, plans = running(num_requests, steps_ahead=steps_ahead, caching=caching)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        plans.append(scheduler.schedule())
        planned = time.perf_counter()
        plan = plans.pop(0)
        sampled = [7] * len(plan.chunks)
        resumed = time.perf_counter()
        scheduler.update(plan, sampled)
        times.append((planned - began, time.perf_counter() - resumed))
        assert len(plan.chunks) == num_requests
    return times


def main() -> None:
    """Print median and 99th percentile of a step's host time, in microseconds."""
    print(f"{'requests':>8} {'ahead':>5} {'caching':>7} {'schedule':>9} {'update':>9} {'both':>9} {'both p99':>9}   µs")
    for num_requests in (1, 32, 256):
        for steps_ahead, caching in ((0, True), (1, True), (1, False)):
            times = measure(num_requests, steps_ahead=steps_ahead, caching=caching)
            both = sorted(schedule + update for schedule, update in times)
            figures = [statistics.median(t) for t in (*zip(*times, strict=True), both)] + [both[len(both) * 99 // 100]]
            row = " ".join(f"{figure * 1e6:9.1f}" for figure in figures)
            print(f"{num_requests:8d} {steps_ahead:5d} {'yes' if caching else 'no':>7} {row}")


if __name__ == "__main__":
    main()
