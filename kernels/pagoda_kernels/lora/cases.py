"""Shared cases of add_lora."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bench_loads import BenchLoad, Calls, bench_model
from ..dispatch import Ops
from . import AddLora, reference


@dataclass(frozen=True)
class Inputs:
    """In the order of the op's arguments."""

    out: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    adapters: Tensor
    scales: Tensor

    def run(self, op: AddLora) -> Tensor:
        op(self.out, self.x, self.a, self.b, self.adapters, self.scales)
        return self.out


@dataclass(frozen=True)
class Case:
    name: str
    adapters: tuple[int, ...]
    """Of each row."""
    loaded: int = 4
    rank: int = 16
    in_features: int = 96
    out_features: int = 80
    strided: bool = False
    """out is columns of a wider tensor, and so is x."""

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        rows = len(self.adapters)
        out = randn(rows, self.out_features + 24)[:, 8 : self.out_features + 8]
        x = randn(rows, self.in_features + 24)[:, 8 : self.in_features + 8]
        if not self.strided:
            out, x = out.contiguous(), x.contiguous()
        a = randn(self.loaded, self.rank, self.in_features) * self.in_features**-0.5
        b = randn(self.loaded, self.out_features, self.rank)
        scales = torch.rand(self.loaded, generator=generator) * 2 + 0.5
        return Inputs(out, x, a, b, torch.tensor(self.adapters, dtype=torch.int32, device=device), scales.to(device))


CASES = (
    Case("one_row", (2,)),
    Case("no_rows", ()),
    Case("no_adapter", (-1, -1, -1)),
    Case("one_adapter", (1,) * 40),
    Case("mixed", (0, -1, 3, 3, 1, -1, 0, 2, 2, 0, -1)),
    Case("long_chunks", (2,) * 33 + (-1,) * 20 + (0,) * 50),
    Case("every_row_its_own", tuple(range(20)), loaded=20, rank=8),
    Case("odd_shapes", (0, 2, 1), rank=5, in_features=77, out_features=13),
    Case("rank_64", (0, 1, 1, -1), rank=64),
    Case("strided_rows", (1, 0, -1, 3, 2), strided=True),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's first MLP product with 8 adapters of rank 16: mixed rows, and chunks of one adapter."""
    model = bench_model(device)
    loaded, rank = 8, 16
    mixed = Case("mixed", tuple(i * 5 % (loaded + 1) - 1 for i in range(model.rows[-2])))
    chunks = Case("chunks", tuple(i // (model.rows[-1] // loaded) for i in range(model.rows[-1])))

    def load(case: Case) -> BenchLoad:
        rows, inputs, outputs = len(case.adapters), model.hidden, 2 * model.intermediate
        sized = Case(case.name, case.adapters, loaded, rank, inputs, outputs)

        def make(ops: Ops, seed: int) -> Calls:
            i = sized.make(model.dtype, str(device), seed)
            return Calls(lambda: i.run(ops.add_lora), lambda: i.run(reference.add_lora))

        adapted = sum(adapter >= 0 for adapter in case.adapters)
        moved = (adapted * (inputs + 2 * outputs) + loaded * rank * (inputs + outputs)) * model.dtype.itemsize
        flops = 2 * adapted * rank * (inputs + outputs)
        return BenchLoad(f"{rows} rows, {case.name}, {loaded} of rank {rank}", make, moved, flops, bounds=model.bounds)

    return (load(case) for case in (mixed, chunks))
