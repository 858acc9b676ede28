"""Shared cases of fp8_linear."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from ..linear.cases import matrices
from . import Fp8Weight, reference
from .quantise import quantise


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Fp8Weight
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    in_features: int
    out_features: int
    bias: bool = False
    strided: bool = False
    """x is a view of wider rows."""
    uneven: bool = False
    """Rows of x and outputs of the weight differ in size by a factor of up to 1000; one row of x is zero."""

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.in_features + 24, generator=generator)
        weight = torch.randn(self.out_features, self.in_features, generator=generator)
        if self.uneven:
            x *= 10 ** (3 * torch.rand(self.rows, 1, generator=generator) - 2)
            x[self.rows // 2] = 0
            weight *= 10 ** (3 * torch.rand(self.out_features, 1, generator=generator) - 2)
        bias = torch.randn(self.out_features, generator=generator).to(device, dtype) if self.bias else None
        x = x.to(device, dtype)[:, 8 : self.in_features + 8]
        return Inputs(x if self.strided else x.contiguous(), quantise(weight.to(device)), bias)


CASES = (
    Case("one_row", 1, 256, 96),
    Case("no_rows", 0, 64, 32, bias=True),
    Case("decode_batch", 9, 320, 80, bias=True),
    Case("strided_rows", 5, 96, 64, strided=True),
    Case("uneven", 20, 144, 48, uneven=True),
    Case("one_input_block", 3, 16, 16),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's matrices, with few rows, a decode batch and a prefill, beside a product in the model's own dtype."""
    model = bench_model(device)

    def load(rows: int, out_features: int, in_features: int) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            x = randn(rows, in_features, device=device, seed=seed, dtype=model.dtype)
            plain = randn(out_features, in_features, device=device, seed=seed + 1, dtype=model.dtype)
            weight = quantise(plain)
            packed = ops.pack_fp8_linear(weight)
            return Calls(
                lambda: ops.fp8_linear(x, packed),
                lambda: reference.fp8_linear(x, reference.pack_fp8_linear(weight)),
                lambda: functional.linear(x, plain),
            )

        moved = out_features * in_features + rows * (in_features + out_features) * model.dtype.itemsize
        return BenchLoad(
            f"{rows} x {in_features} -> {out_features}",
            make,
            moved,
            2 * rows * in_features * out_features,
            torch.float8_e4m3fn,
        )

    rows_of_loads = dict.fromkeys((1, 16, 64, 256, model.rows[-1]))
    return (load(rows, *matrix) for rows in rows_of_loads for matrix in matrices(model))
