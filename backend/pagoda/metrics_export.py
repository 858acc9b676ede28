"""The engine's snapshots as Triton custom metrics, by deltas, on the host's thread alone.

Triton's histograms take one observation a call, 75–150 µs each; ours arrive in bulk. So a histogram is exported as the
counters it is made of on a Prometheus page (`_bucket` with `le`, `_sum`, `_count`), moved by what a snapshot added.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from pagoda.protocol import Histogram, Metrics

OWN = frozenset({"engine_steps_total", "kv_cache_waste_perc", "session_payloads_total"})
"""Series that no other engine has; the others have the names that dashboards know from vLLM."""


def full_name(name: str) -> str:
    return ("pagoda:" if name in OWN else "vllm:") + name


class MetricsExport:
    """Called with every snapshot; `pb_utils` is Triton's module."""

    def __init__(self, pb_utils: Any, model_name: str, version: str) -> None:
        self._pb_utils = pb_utils
        self._labels = {"model_name": model_name, "model": model_name, "version": version}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._last: dict[tuple[str, str], float] = {}
        self._gauges: set[str] = set()

    def __call__(self, metrics: Metrics) -> None:
        for name, value in metrics.gauges.items():
            self._gauge(name, value)
        for name, value in metrics.counters.items():
            self._counter(name, value)
        for reason, count in metrics.finished.items():
            self._counter("request_success_total", count, finished_reason=reason)
        for name, histogram in metrics.histograms.items():
            self._histogram(name, histogram)

    def engine_down(self) -> None:
        """Nothing runs in an engine that is gone."""
        for name in self._gauges:
            self._gauge(name, 0.0)

    def _gauge(self, name: str, value: float) -> None:
        self._gauges.add(name)
        metric = self._metric("GAUGE", name, {})
        if self._last.get((name, "")) != value:
            self._last[name, ""] = value
            metric.set(value)

    def _counter(self, name: str, value: float, **labels: str) -> None:
        """Move a counter to `value`; a smaller value than the last is a new engine's, which starts from zero."""
        key = (name, repr(sorted(labels.items())))
        metric = self._metric("COUNTER", name, labels)
        last = self._last.get(key, 0.0)
        delta = value - last if value >= last else value
        self._last[key] = value
        if delta:
            metric.increment(delta)

    def _histogram(self, name: str, histogram: Histogram) -> None:
        bounds = [*(format(bound, "g") for bound in histogram.bounds), "+Inf"]
        totals = list(accumulate(histogram.counts))
        for bound, total in zip(bounds, totals, strict=True):
            self._counter(f"{name}_bucket", total, le=bound)
        self._counter(f"{name}_sum", histogram.sum)
        self._counter(f"{name}_count", totals[-1])

    def _metric(self, kind: str, name: str, labels: dict[str, str]) -> Any:
        key = (name, repr(sorted(labels.items())))
        if key not in self._metrics:
            self._metrics[key] = self._family(kind, name).Metric(labels={**self._labels, **labels})
        return self._metrics[key]

    def _family(self, kind: str, name: str) -> Any:
        if name not in self._families:
            family = self._pb_utils.MetricFamily
            self._families[name] = family(
                name=full_name(name), description=DESCRIPTIONS.get(name, name), kind=getattr(family, kind)
            )
        return self._families[name]


DESCRIPTIONS = {
    "num_requests_running": "Requests in the engine's steps",
    "num_requests_waiting": "Requests waiting for their first step",
    "kv_cache_usage_perc": "Share of KV cache blocks held by live requests, 0 to 1",
    "gpu_cache_usage_perc": "Share of KV cache blocks held by live requests, 0 to 1",
    "kv_cache_waste_perc": "Share of the slots in these blocks that hold no token, 0 to 1",
    "num_preemptions_total": "Requests sent back to the queue for want of blocks",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits_total": "Prompt tokens found in the prefix cache",
    "prompt_tokens_total": "Prompt tokens processed",
    "generation_tokens_total": "Tokens generated",
    "request_success_total": "Requests ended, by reason",
    "engine_steps_total": "Steps of the engine's loop",
    "session_payloads_total": "Payloads sent to sessions, each one response of Triton's",
}
