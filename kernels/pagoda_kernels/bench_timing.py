"""How the benchmark measures: the time of a call, and the two rates that bound every op on this machine."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

# Bytes that a round of calls should go through: several times the L2 cache of an H200 (60 MB).
_ROTATED_BYTES = 250 * 2**20
_MOST_SETS = 40
_WARM_UP_S = 0.05


def sets_for(bytes_each: int) -> int:
    """Return how many sets of inputs to rotate, so that none is still in a cache when its turn comes again."""
    return max(1, min(_MOST_SETS, -(-_ROTATED_BYTES // max(1, bytes_each))))


def median_us(calls: Sequence[Call], device: torch.device, repeats: int = 10) -> float:
    """Return the median time of one call, in microseconds, over rounds through all of them.

    On a GPU a round is one CUDA graph between two events: what the host needs to launch is not in it.
    """
    return _cuda_us(calls, repeats) if device.type == "cuda" else _cpu_us(calls, repeats)


def _cuda_us(calls: Sequence[Call], repeats: int) -> float:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]  # kept: calls must not share their outputs' memory
    # A chip that has been idle takes a while to raise its clocks.
    end_of_warm_up = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < end_of_warm_up:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / len(outputs))
    return statistics.median(times)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _cpu_us(calls: Sequence[Call], repeats: int, budget_s: float = 0.5) -> float:
    calls[0]()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < repeats or time.perf_counter() < end:
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - start)
        if time.perf_counter() > end + 4 * budget_s:
            break
    return statistics.median(times) * 1e6


def read_rate(device: torch.device) -> float:
    """Return the bytes a second that a sum over 4 GiB (on a CPU, 256 MiB) reads."""
    size = 2**30 if device.type == "cuda" else 2**26
    x = torch.ones(size, dtype=torch.int32, device=device)
    calls: list[Call] = [lambda: x.view(torch.float32).sum()]
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from .bench_read import read

        calls = [lambda programs=programs: read(x, programs) for programs in (8, 16)]  # type: ignore[misc]
    return size * 4 / min(median_us([call], device, 7) for call in calls) * 1e6


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of PyTorch's square matrix product in a dtype, on random numbers."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        us = median_us([lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)], device, 7)
    else:
        us = median_us([lambda: a @ b], device, 7)
    return 2 * size**3 / us * 1e6
