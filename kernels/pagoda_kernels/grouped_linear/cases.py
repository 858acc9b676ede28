"""Shared cases of grouped_linear."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from . import reference


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    expert_starts: Tensor


@dataclass(frozen=True)
class Case:
    name: str
    counts: tuple[int, ...]
    """Rows of each expert."""
    in_features: int = 64
    out_features: int = 48
    strided: bool = False
    """x is a view of wider rows."""

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(self.counts), self.in_features + 24, generator=generator)
        x = x.to(device, dtype)[:, 8 : self.in_features + 8]
        weight = torch.randn(len(self.counts), self.out_features, self.in_features, generator=generator)
        starts = torch.tensor([0, *self.counts]).cumsum(0).int()
        return Inputs(x if self.strided else x.contiguous(), weight.to(device, dtype), starts.to(device))


CASES = (
    Case("two_experts", (3, 5)),
    Case("idle_experts", (0, 4, 0, 0, 17, 0)),
    Case("one_row", (0, 0, 1, 0)),
    Case("no_rows", (0, 0, 0)),
    Case("one_expert", (70,)),
    Case("uneven", (1, 130, 2, 33, 64, 16, 7, 0), in_features=80, out_features=72),
    Case("odd_shapes", (3, 0, 9), in_features=77, out_features=13),
    Case("strided_rows", (5, 6), strided=True),
    Case("one_by_one", (1, 2), in_features=1, out_features=1),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """On a GPU the first product of Mixtral-8x7B's experts (2 of 8 for each token); on a CPU a small one."""
    model = bench_model(device)
    experts, outputs, inputs = (8, 28672, 4096) if device.type == "cuda" else (8, 1024, 512)
    return (_load(2 * tokens, experts, outputs, inputs, model.dtype, device) for tokens in (16, 256, 4096))


def _load(rows: int, experts: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> BenchLoad:
    def make(ops: Ops, seed: int) -> Calls:
        x = randn(rows, inputs, device=device, seed=seed, dtype=dtype)
        weight = randn(experts, outputs, inputs, device=device, seed=seed + 1, dtype=dtype)
        ids = torch.randint(experts, (rows,), generator=torch.Generator().manual_seed(seed))
        counts = ids.bincount(minlength=experts).tolist()
        starts = torch.tensor([0, *counts]).cumsum(0).int().to(device)
        parts = list(zip(torch.split(x, counts), weight, strict=True))
        return Calls(
            lambda: ops.grouped_linear(x, weight, starts),
            lambda: reference.grouped_linear(x, weight, starts),
            lambda: [part @ matrix.T for part, matrix in parts],
        )

    moved = (experts * outputs * inputs + rows * (inputs + outputs)) * dtype.itemsize
    bounds = (2e-2, 4e-3) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    name = f"{rows} rows, {experts} x {inputs} -> {outputs}"
    return BenchLoad(name, make, moved, 2 * rows * outputs * inputs, bounds=bounds)
