"""The figures of a load, from the arrival times of its answers. Pure functions, defined as `vllm bench serve` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np

from pagoda.bench.loads import Load
from pagoda.bench.serve_stream import Answer


class Latencies(msgspec.Struct, frozen=True):
    """Milliseconds of the requests that were answered in full."""

    ttft: list[float]
    """Time to first token: from sending a request to its first chunk. One a request."""
    tpot: list[float]
    """Time per output token: (last chunk - first chunk) / (tokens - 1). One a request of two tokens or more."""
    itl: list[float]
    """Inter-token latency: the gaps between the chunks of a request; many a request."""
    end_to_end: list[float]
    """From sending a request to its last token. One a request."""


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds; percentiles are interpolated linearly."""

    mean: float
    p50: float
    p95: float
    p99: float


class Result(msgspec.Struct, frozen=True):
    load: str
    requests: int
    failures: dict[str, int]
    """How often a request failed, by its message."""
    seconds: float
    """From the first request to the end of the last answer."""
    input_tokens: int
    output_tokens: int
    """Of the requests that were answered in full, as all figures are."""
    client_share: float
    """What the client's process used of one core: near 1, it measured itself."""
    spreads: dict[str, Spread | None]
    """By the names of `Latencies`; None where no request had one."""
    request_rate: float
    """Answers a second."""
    output_rate: float
    """Tokens a second."""
    total_rate: float
    """Tokens a second, input and output."""


def latencies(answers: Sequence[Answer]) -> Latencies:
    """Of answers without a problem."""
    tpot = []
    for a in answers:
        if a.num_tokens is not None and a.num_tokens > 1:
            tpot.append((a.times[-1] - a.times[0]) / (a.num_tokens - 1))
    return Latencies(
        ttft=_ms([a.times[0] - a.began for a in answers]),
        tpot=_ms(tpot),
        itl=_ms([later - earlier for a in answers for earlier, later in pairwise(a.times)]),
        end_to_end=_ms([a.times[-1] - a.began for a in answers]),
    )


def _ms(seconds: list[float]) -> list[float]:
    return [1e3 * s for s in seconds]


def spread(values: Sequence[float]) -> Spread | None:
    """None of nothing."""
    if not values:
        return None
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return Spread(float(np.mean(values)), p50, p95, p99)


def summarise(
    load: str, requests: Sequence[Load], answers: Sequence[Answer], *, seconds: float, cpu_seconds: float
) -> tuple[Result, Latencies]:
    """`requests` and their `answers`, in the same order, which took `seconds` of the clock and of the client's CPU."""
    good = [(r, a) for r, a in zip(requests, answers, strict=True) if a.problem is None]
    taken = latencies([a for _, a in good])
    inputs = sum(len(r.prompt_ids) for r, _ in good)
    outputs = sum(r.num_output for r, _ in good)
    result = Result(
        load=load,
        requests=len(requests),
        failures=dict(Counter(a.problem for a in answers if a.problem is not None)),
        seconds=seconds,
        input_tokens=inputs,
        output_tokens=outputs,
        client_share=cpu_seconds / seconds,
        spreads={name: spread(getattr(taken, name)) for name in Latencies.__struct_fields__},
        request_rate=len(good) / seconds,
        output_rate=outputs / seconds,
        total_rate=(inputs + outputs) / seconds,
    )
    return result, taken
