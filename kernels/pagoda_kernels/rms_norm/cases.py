"""Shared cases of rms_norm and its kin."""

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
    residual: Tensor
    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    strided: bool = False
    """x is a view of wider rows."""
    magnitude: float = 1.0
    eps: float = 1e-5

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        size = self.shape[-1]
        x = torch.randn(*self.shape[:-1], size + 24, generator=generator) * self.magnitude
        x = x.to(device, dtype)[..., 8 : size + 8]
        residual = torch.randn(self.shape, generator=generator).to(device, dtype)
        weight = (1 + torch.randn(size, generator=generator) / 4).to(device, dtype)
        return Inputs(x if self.strided else x.contiguous(), residual, weight, self.eps)


CASES = (
    Case("one_row", (1, 576)),
    Case("no_rows", (0, 576)),
    Case("decode_batch", (7, 576)),
    Case("prefill", (129, 2048)),
    Case("odd_width", (5, 65)),
    Case("width_1", (3, 1)),
    Case("strided_rows", (6, 96), strided=True),
    Case("per_head", (5, 9, 64), strided=True),
    Case("large_values", (4, 128), magnitude=1e3),
    Case("tiny_values", (4, 128), magnitude=1e-4, eps=1e-6),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's norms, with and without the residual, and quantised."""
    model = bench_model(device)
    for rows in model.rows:
        yield _norm_load(model, rows, device)
        yield _add_load(model, rows, device, fp8=False)
        yield _add_load(model, rows, device, fp8=True)


def _norm_load(model: BenchModel, rows: int, device: torch.device) -> BenchLoad:
    def make(ops: Ops, seed: int) -> Calls:
        x = randn(rows, model.hidden, device=device, seed=seed, dtype=model.dtype)
        weight = randn(model.hidden, device=device, seed=seed + 1, dtype=model.dtype)
        return Calls(
            lambda: ops.rms_norm(x, weight, 1e-5),
            lambda: reference.rms_norm(x, weight, 1e-5),
            lambda: functional.rms_norm(x, (model.hidden,), weight, 1e-5),
        )

    moved = 2 * rows * model.hidden * model.dtype.itemsize
    return BenchLoad(f"{rows} x {model.hidden}", make, moved, bounds=model.bounds)


def _add_load(model: BenchModel, rows: int, device: torch.device, *, fp8: bool) -> BenchLoad:
    def make(ops: Ops, seed: int) -> Calls:
        x, residual = randn(2, rows, model.hidden, device=device, seed=seed, dtype=model.dtype)
        weight = randn(model.hidden, device=device, seed=seed + 1, dtype=model.dtype)
        if fp8:
            return Calls(
                lambda: (ops.add_rms_norm_fp8(x, residual, weight, 1e-5), residual),
                lambda: (reference.add_rms_norm_fp8(x, residual, weight, 1e-5), residual),
            )
        return Calls(
            lambda: (ops.add_rms_norm(x, residual, weight, 1e-5), residual),
            lambda: (reference.add_rms_norm(x, residual, weight, 1e-5), residual),
            lambda: functional.rms_norm(residual.add_(x), (model.hidden,), weight, 1e-5),
        )

    moved = rows * model.hidden * (3 * model.dtype.itemsize + (1 if fp8 else model.dtype.itemsize))
    name = f"{rows} x {model.hidden}, residual{', fp8' if fp8 else ''}"
    return BenchLoad(name, make, moved, bounds=model.bounds)
