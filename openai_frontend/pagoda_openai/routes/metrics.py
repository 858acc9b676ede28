"""GET /metrics: the engines' series as their sessions bring them, and this frontend's own of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from fastapi import APIRouter
from pagoda.metrics_export import DESCRIPTIONS, full_name
from pagoda.protocol import Metrics
from pagoda.registry import Registry
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.requests import Request
from starlette.responses import Response

from pagoda_openai.http_metrics import HttpMetrics
from pagoda_openai.state import frontend_of

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text. Engine counts are as of the last half second."""
    http: HttpMetrics = request.app.state.http_metrics
    collector = CollectorRegistry()
    collector.register(EngineCollector(frontend_of(request).registry))
    page = await asyncio.to_thread(lambda: generate_latest(collector) + http.page())
    return Response(page, media_type=CONTENT_TYPE_LATEST)


class EngineCollector:
    """Turns the sessions' latest snapshots into Prometheus families, labelled by model."""

    def __init__(self, registry: Registry) -> None:
        self._snapshots = {n: e.session.metrics for n, e in registry if e.session.metrics is not None}

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for model, snapshot in self._snapshots.items():
            if snapshot is not None:
                self._add(families, model, snapshot)
        return families.values()

    def _add(self, families: dict[str, Metric], model: str, snapshot: Metrics) -> None:
        for name, value in snapshot.gauges.items():
            _family(families, GaugeMetricFamily, name, ["model_name"]).add_metric([model], value)
        for name, value in snapshot.counters.items():
            _family(families, CounterMetricFamily, name, ["model_name"]).add_metric([model], value)
        for reason, count in snapshot.finished.items():
            labels = ["model_name", "finished_reason"]
            _family(families, CounterMetricFamily, "request_success_total", labels).add_metric([model, reason], count)
        for name, histogram in snapshot.histograms.items():
            total, buckets = 0, []
            for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
                total += count
                buckets.append((bound, total))
            _family(families, HistogramMetricFamily, name, ["model_name"]).add_metric([model], buckets, histogram.sum)


def _family(families: dict[str, Metric], kind: type[Metric], name: str, labels: list[str]):  # type: ignore[no-untyped-def]
    if name not in families:
        families[name] = kind(full_name(name), DESCRIPTIONS.get(name, name), labels=labels)  # type: ignore[call-arg]
    return families[name]
