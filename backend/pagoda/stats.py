"""The engine's own counts and histograms, cumulative; a snapshot of them is what every metric is made of.

Names are those dashboards know from vLLM, without the `vllm:` prefix. Observing costs well under a microsecond: what is
published, and where, is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from pagoda.plan import Plan, Progress
from pagoda.protocol import Histogram, Metrics
from pagoda.request import Request
from pagoda.scheduler import Scheduler

SECONDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
REQUEST_SECONDS = [
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
]
TOKEN_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0]
TOKENS = [float(m * 10**e) for e in range(6) for m in (1, 2, 5)]
STEP_TOKENS = [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0]

HISTOGRAMS = {
    "time_to_first_token_seconds": SECONDS,
    "inter_token_latency_seconds": TOKEN_SECONDS,
    "time_per_output_token_seconds": TOKEN_SECONDS,
    "e2e_request_latency_seconds": REQUEST_SECONDS,
    "request_queue_time_seconds": REQUEST_SECONDS,
    "request_prefill_time_seconds": REQUEST_SECONDS,
    "request_decode_time_seconds": REQUEST_SECONDS,
    "request_inference_time_seconds": REQUEST_SECONDS,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "iteration_tokens_total": STEP_TOKENS,
}
"""Bucket bounds of each histogram, as vLLM's."""


class Stats:
    def __init__(self) -> None:
        self.histograms = {name: Histogram(bounds, [0] * (len(bounds) + 1)) for name, bounds in HISTOGRAMS.items()}
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self._last_token_time: dict[Request, float] = {}

    def observe(self, name: str, value: float, times: int = 1) -> None:
        histogram = self.histograms[name]
        histogram.counts[bisect_left(histogram.bounds, value)] += times
        histogram.sum += times * value

    def step(self, plan: Plan, progress: list[Progress]) -> None:
        """Count a step that has been read back. Most of its requests had their last tokens at the same time, too."""
        self.observe("iteration_tokens_total", plan.num_tokens)
        self.generation_tokens += len(progress)
        gaps: list[float] = []
        for item in progress:
            request = item.request
            before = self._last_token_time.get(request)
            if before is None:
                self._first_token(request)
            else:
                gaps.append(request.last_token_time - before)
            self._last_token_time[request] = request.last_token_time
            if item.finish_reason is not None:
                self.finish(request)
        for gap, times in Counter(gaps).items():
            self.observe("inter_token_latency_seconds", gap, times)

    def _first_token(self, request: Request) -> None:
        self.prompt_tokens += request.num_prompt_tokens
        self.observe("time_to_first_token_seconds", request.last_token_time - request.arrival_time)

    def finish(self, request: Request) -> None:
        """Count a request's end, by whatever reason."""
        assert request.finish_reason is not None
        self.finished[request.finish_reason] += 1
        self._last_token_time.pop(request, None)
        if request.first_token_time is None or request.first_scheduled_time is None:
            return
        end, first, began = request.last_token_time, request.first_token_time, request.first_scheduled_time
        self.observe("e2e_request_latency_seconds", end - request.arrival_time)
        self.observe("request_queue_time_seconds", began - request.arrival_time)
        self.observe("request_prefill_time_seconds", first - began)
        self.observe("request_decode_time_seconds", end - first)
        self.observe("request_inference_time_seconds", end - began)
        self.observe("request_prompt_tokens", request.num_prompt_tokens)
        self.observe("request_generation_tokens", request.num_output_tokens)
        if request.num_output_tokens > 1:
            self.observe("time_per_output_token_seconds", (end - first) / (request.num_output_tokens - 1))

    def snapshot(self, scheduler: Scheduler, num_steps: int) -> Metrics:
        """Everything at this moment. Blocks kept only for the prefix cache count as free."""
        pool = scheduler.pool
        usage = pool.num_owned / pool.num_blocks
        counters = scheduler.counters
        return Metrics(
            gauges={
                "num_requests_running": len(scheduler.running),
                "num_requests_waiting": len(scheduler.waiting),
                "kv_cache_usage_perc": usage,
                "gpu_cache_usage_perc": usage,
                "kv_cache_waste_perc": scheduler.num_wasted_slots / max(1, pool.num_owned * scheduler.block_size),
            },
            counters={
                "num_preemptions_total": counters.preemptions,
                "prefix_cache_queries_total": counters.prefix_queried_tokens,
                "prefix_cache_hits_total": counters.prefix_hit_tokens,
                "prompt_tokens_total": self.prompt_tokens,
                "generation_tokens_total": self.generation_tokens,
                "engine_steps_total": num_steps,
            },
            finished=dict(self.finished),
            histograms={name: Histogram(h.bounds, list(h.counts), h.sum) for name, h in self.histograms.items()},
        )
