"""Shared cases of silu_mul and silu_mul_fp8."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from . import reference


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    width: int
    """I, half the width of gate_up."""
    magnitude: float = 1.0

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        gate_up = torch.randn(self.rows, 2 * self.width, generator=generator) * self.magnitude
        return gate_up.to(device, dtype)


CASES = (
    Case("one_row", 1, 1536),
    Case("no_rows", 0, 1536),
    Case("decode_batch", 33, 1536),
    Case("prefill", 256, 768),
    Case("odd_width", 3, 77),
    Case("width_1", 2, 1),
    Case("saturated", 4, 128, magnitude=200.0),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's activations: [rows, 2 * intermediate], plain and quantised."""
    model = bench_model(device)

    def load(rows: int, *, fp8: bool) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            gate_up = randn(rows, 2 * model.intermediate, device=device, seed=seed, dtype=model.dtype)
            if fp8:
                return Calls(lambda: ops.silu_mul_fp8(gate_up), lambda: reference.silu_mul_fp8(gate_up))
            gate, up = gate_up.chunk(2, dim=1)
            return Calls(
                lambda: ops.silu_mul(gate_up), lambda: reference.silu_mul(gate_up), lambda: silu(gate).mul_(up)
            )

        moved = rows * model.intermediate * (2 * model.dtype.itemsize + (1 if fp8 else model.dtype.itemsize))
        name = f"{rows} x {model.intermediate}{', fp8' if fp8 else ''}"
        return BenchLoad(name, make, moved, bounds=model.bounds)

    return (load(rows, fp8=fp8) for rows in model.rows for fp8 in (False, True))
