"""Shared cases of int4_linear."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from ..linear.cases import matrices
from . import GROUP, Int4Weight, reference


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Int4Weight
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    groups: int
    """Groups of 128 inputs."""
    out_features: int
    bias: bool = False
    strided: bool = False
    """x is a view of wider rows."""

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        in_features = GROUP * self.groups
        x = torch.randn(self.rows, in_features + 24, generator=generator).to(device, dtype)[:, 8 : in_features + 8]
        bias = torch.randn(self.out_features, generator=generator).to(device, dtype) if self.bias else None
        weight = random_weight(self.out_features, in_features, device, seed)
        return Inputs(x if self.strided else x.contiguous(), weight, bias)


def random_weight(out_features: int, in_features: int, device: str | torch.device, seed: int) -> Int4Weight:
    """Return a weight with every code, every zero and scales that differ by a factor of 100."""
    generator = torch.Generator(device).manual_seed(seed)
    groups = (out_features, in_features // GROUP)

    def fours(*shape: int) -> Tensor:
        return torch.randint(16, shape, generator=generator, device=device, dtype=torch.uint8)

    scales = 10 ** (2 * torch.rand(groups, generator=generator, device=device) - 2)
    return Int4Weight(fours(out_features, in_features), fours(*groups), scales.half())


CASES = (
    Case("one_row", 1, 3, 24, bias=True),
    Case("one_row_long", 1, 33, 8),
    Case("no_rows", 0, 1, 8, bias=True),
    Case("few_rows", 5, 5, 72, bias=True),
    Case("one_group", 2, 1, 8),
    Case("strided_rows", 17, 2, 40, strided=True),
    Case("one_strided_row", 1, 2, 40, strided=True),
    Case("decode_batch", 65, 2, 64),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's matrices, with one row, few rows and decode batches, beside a product in the model's own dtype."""
    model = bench_model(device)

    def load(rows: int, out_features: int, in_features: int) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            x = randn(rows, in_features, device=device, seed=seed, dtype=model.dtype)
            weight = random_weight(out_features, in_features, device, seed)
            packed = ops.pack_int4_linear(weight)
            plain = reference.dequantise(weight).to(model.dtype)
            return Calls(
                lambda: ops.int4_linear(x, packed),
                lambda: reference.int4_linear(x, reference.pack_int4_linear(weight)),
                lambda: functional.linear(x, plain),
            )

        moved = out_features * in_features // 2 + out_features * (in_features // GROUP) * 3
        moved += rows * (in_features + out_features) * model.dtype.itemsize
        return BenchLoad(
            f"{rows} x {in_features} -> {out_features}",
            make,
            moved,
            2 * rows * in_features * out_features,
            model.dtype,
            model.bounds,
        )

    # SmolLM2's 576 inputs are no whole groups: on a CPU only its down projection could be int4.
    shapes = [matrix for matrix in matrices(model) if matrix[1] % GROUP == 0]
    return (load(rows, *matrix) for rows in (1, 16, 64, 256) for matrix in shapes)
