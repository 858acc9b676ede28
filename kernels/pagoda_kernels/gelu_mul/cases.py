"""Shared cases of gelu_mul: silu_mul's, whose inputs have the same form."""

from collections.abc import Iterator

import torch
from torch.nn.functional import gelu

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from ..silu_mul.cases import CASES, Case
from . import reference

__all__ = ["CASES", "Case", "bench_loads"]


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's activations: [rows, 2 * intermediate]."""
    model = bench_model(device)

    def load(rows: int) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            gate_up = randn(rows, 2 * model.intermediate, device=device, seed=seed, dtype=model.dtype)
            gate, up = gate_up.chunk(2, dim=1)
            return Calls(
                lambda: ops.gelu_mul(gate_up),
                lambda: reference.gelu_mul(gate_up),
                lambda: gelu(gate, approximate="tanh").mul_(up),
            )

        moved = 3 * rows * model.intermediate * model.dtype.itemsize
        return BenchLoad(f"{rows} x {model.intermediate}", make, moved, bounds=model.bounds)

    return (load(rows) for rows in model.rows)
