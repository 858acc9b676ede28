"""Counts of HTTP requests over all workers of one service (prometheus_client's multiprocess mode)."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess


class HttpMetrics:
    """Set PROMETHEUS_MULTIPROC_DIR before this module's first import to share counts between workers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ["method", "path", "status"]
        self._requests = Counter("pagoda_http_requests", "HTTP requests answered", labels, registry=self._registry)
        self._seconds = Histogram(
            "pagoda_http_request_seconds", "From request to the last byte", ["path"], registry=self._registry
        )

    def count(self, method: str, path: str, status: int, seconds: float) -> None:
        """`path` is the route's pattern, never what a client wrote: labels must stay few."""
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def page(self) -> bytes:
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared)
