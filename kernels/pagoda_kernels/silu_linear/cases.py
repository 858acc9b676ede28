"""Shared cases of silu_linear: linear's, whose outputs are the gates and then the ups."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from ..linear import reference as linear_reference
from ..linear.cases import Case
from . import reference

CASES = (
    Case("one_row", 1, 576, 3072),
    Case("no_rows", 0, 576, 3072),
    Case("decode_batch", 33, 576, 1152, bias=True),
    Case("strided_rows", 6, 96, 128, strided=True),
    Case("odd_shapes", 3, 77, 26, bias=True),
    Case("one_output", 33, 64, 2),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's gate and up: a decode batch and prefills."""
    model = bench_model(device)

    def load(rows: int) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            x = randn(rows, model.hidden, device=device, seed=seed, dtype=model.dtype)
            weight = randn(2 * model.intermediate, model.hidden, device=device, seed=seed + 1, dtype=model.dtype)
            weight *= model.hidden**-0.5
            packed = ops.pack_linear(weight)
            return Calls(
                lambda: ops.silu_linear(x, packed),
                lambda: reference.silu_linear(x.float(), linear_reference.pack_linear(weight.float())).to(x.dtype),
                lambda: _by_torch(x, weight),
            )

        width = model.hidden + model.intermediate
        moved = (2 * model.intermediate * model.hidden + rows * width) * model.dtype.itemsize
        flops = 4 * rows * model.hidden * model.intermediate
        name = f"{rows} x {model.hidden} -> {model.intermediate}"
        return BenchLoad(name, make, moved, flops, model.dtype, model.bounds)

    return (load(rows) for rows in sorted({*model.rows, 1024, 2048} if device.type == "cuda" else model.rows))


def _by_torch(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = linear(x, weight).chunk(2, dim=1)
    return silu(gate).mul_(up)
