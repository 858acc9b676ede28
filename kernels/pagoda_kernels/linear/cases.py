"""Shared cases of linear."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..bench_loads import BenchLoad, BenchModel, Calls, bench_model, randn
from ..dispatch import Ops
from . import reference


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
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

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.in_features + 24, generator=generator).to(device, dtype)
        x = x[:, 8 : self.in_features + 8]
        weight = torch.randn(self.out_features, self.in_features, generator=generator).to(device, dtype)
        bias = torch.randn(self.out_features, generator=generator).to(device, dtype) if self.bias else None
        return Inputs(x if self.strided else x.contiguous(), weight, bias)


CASES = (
    Case("one_row", 1, 576, 960),
    Case("no_rows", 0, 576, 960),
    Case("no_rows_bias", 0, 5, 7, bias=True),
    Case("decode_batch", 33, 576, 576, bias=True),
    Case("prefill", 256, 576, 3072),
    Case("down_projection", 7, 1536, 576),
    Case("strided_rows", 6, 96, 64, strided=True),
    Case("one_strided_row", 1, 96, 64, bias=True, strided=True),
    Case("odd_shapes", 3, 77, 13, bias=True),
    Case("one_by_one", 1, 1, 1, bias=True),
    Case("one_output", 5, 64, 1),
    Case("one_input", 5, 1, 64),
)


def matrices(model: BenchModel) -> tuple[tuple[int, int], ...]:
    """Return (out, in) of the model's matrices: qkv, o, gate_up, down and head."""
    heads = (model.heads + 2 * model.kv_heads) * model.head_size
    return (
        (heads, model.hidden),
        (model.hidden, model.heads * model.head_size),
        (2 * model.intermediate, model.hidden),
        (model.hidden, model.intermediate),
        (model.vocabulary, model.hidden),
    )


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's matrices, with one row, few rows and decode batches."""
    model = bench_model(device)

    def load(rows: int, out_features: int, in_features: int) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            x = randn(rows, in_features, device=device, seed=seed, dtype=model.dtype)
            weight = randn(out_features, in_features, device=device, seed=seed + 1, dtype=model.dtype)
            packed = ops.pack_linear(weight)
            return Calls(
                lambda: ops.linear(x, packed),
                lambda: reference.linear(x, reference.pack_linear(weight)),
                lambda: functional.linear(x, weight),
            )

        moved = (out_features * in_features + rows * (in_features + out_features)) * model.dtype.itemsize
        return BenchLoad(
            f"{rows} x {in_features} -> {out_features}",
            make,
            moved,
            2 * rows * in_features * out_features,
            model.dtype,
            model.bounds,
        )

    return (load(rows, *matrix) for rows in (1, 16, 64, 256) for matrix in matrices(model))
