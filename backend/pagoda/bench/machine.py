"""What the machine can do at most, measured: its memory's bandwidth, its matrix rate, and a model's matrices alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import numpy as np
import torch

from pagoda.hf_config import HFConfig

T = TypeVar("T")


class Machine(msgspec.Struct, frozen=True):
    """Bytes a second read, operations a second in matrix products of the model's type, and the model's matrices:
    milliseconds for all of them by the vendor's library, by rows."""

    bandwidth: float
    matrix_rate: float
    products: dict[int, float]
    fp8_rate: float | None = None
    """Operations a second in matrix products of 8-bit floats; None where the vendor's library has none."""

    def product_seconds(self, rows: int) -> float:
        """Of the model's matrices, between the measured rows by interpolation, beyond them in proportion."""
        known = sorted(self.products)
        beyond = max(1.0, rows / known[-1])
        return beyond * float(np.interp(rows, known, [self.products[count] for count in known])) / 1e3


PEERS_GPU = Machine(
    bandwidth=4.24e12,
    matrix_rate=785e12,
    products={1: 4.10, 16: 4.18, 64: 4.33, 128: 4.71, 256: 6.86, 512: 11.98, 1024: 24.1},
)
"""The H200 on which the GPU's peer was measured, with Llama-3.1-8B's matrices in bfloat16."""


def measure(config: HFConfig, dtype: torch.dtype, device: torch.device) -> Machine:
    rows = tuple(PEERS_GPU.products) if device.type == "cuda" else ()
    fp8_rate = _fp8_rate(device) if device.type == "cuda" else None
    return Machine(
        measure_bandwidth(device), _matrix_rate(dtype, device), products(config, dtype, device, rows), fp8_rate
    )


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over far more than any cache reads."""
    data = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    return data.nbytes / best(lambda: data.sum(), device)


def _matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: a @ b, device)


def _fp8_rate(device: torch.device) -> float:
    size = 8192
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    work = partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return 2 * size**3 / best(work, device)


def products(config: HFConfig, dtype: torch.dtype, device: torch.device, rows: Sequence[int]) -> dict[int, float]:
    """Milliseconds of every matrix product of a step, one after the other (on a GPU in one CUDA graph), by rows."""
    return timed_products(config, dtype, device, rows, lambda weight: weight, torch.nn.functional.linear)


def timed_products(
    config: HFConfig,
    dtype: torch.dtype,
    device: torch.device,
    rows: Sequence[int],
    pack: Callable[[torch.Tensor], T],
    linear: Callable[[torch.Tensor, T], object],
) -> dict[int, float]:
    """The same by an implementation that packs its weights first."""
    if not rows:
        return {}
    shapes = [*matrices(config) * config.num_layers, (config.vocab_size, config.hidden_size)]
    weights = [(shape[1], pack(torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02))) for shape in shapes]
    found = {}
    for count in rows:
        inputs = {columns: torch.randn(count, columns, device=device).to(dtype) for _, columns in shapes}

        def multiply(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for columns, weight in weights:
                linear(inputs[columns], weight)

        found[count] = sustained(multiply, device) * 1e3
    return found


def matrices(config: HFConfig) -> list[tuple[int, int]]:
    """[out, in] of a dense layer's matrices, as they are multiplied."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return [(q + 2 * kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)]


def sustained(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`; on a GPU the mean of 20 replays of its graph after 3, as the peer's table was made.

    A fastest run is one before the GPU has become warm: at its limit of power it then multiplies more slowly.
    """
    work()
    if device.type == "cpu":
        return best(work, device)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(3):
        graph.replay()
    _wait(device)
    began = time.perf_counter()
    for _ in range(20):
        graph.replay()
    _wait(device)
    return (time.perf_counter() - began) / 20


def best(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of several groups of four runs."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        for _ in range(4):
            work()
        _wait(device)
        seconds.append((time.perf_counter() - began) / 4)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give what was measured with back, so that an engine finds the memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
