"""rms_norm and its kin in the Triton language: one pass, a few rows to a program, each row in registers."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early
from ..fp8_linear import Fp8Rows
from ..fp8_linear.e4m3 import to_e4m3

# Elements of a program's tile. A row of 4096 is one program of 4 warps: 32 elements a thread, that is four independent
# 16-byte loads of a 16-bit dtype. Narrow rows (the QK norm's 64 or 128) share a program.
_TILE = 2048
_PER_THREAD = 32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See RmsNorm."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        rows = x if x.dim() <= 3 and x.stride(-1) == 1 else x.contiguous().flatten(0, -2)
        inner = rows.shape[1] if rows.dim() == 3 else 1
        strides = rows.stride()[:2] if rows.dim() == 3 else (rows.stride(0) if rows.dim() == 2 else 0, 0)
        _launch(rows, strides, inner, None, weight, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See AddRmsNorm."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_add(x, residual, weight, out, eps)
    return out


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """See AddRmsNormFp8."""
    out = Fp8Rows.empty(x.shape[0], x.shape[1], like=x)
    _launch_add(x, residual, weight, out.values, eps, out.scales)
    return out


def _launch_add(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, scales: Tensor | None = None
) -> None:
    if out.numel() > 0:
        if residual.stride(1) != 1:
            raise ValueError(f"the residual's rows must be contiguous, its strides are {residual.stride()}")
        x = x if x.stride(1) == 1 else x.contiguous()
        _launch(x, (x.stride(0), 0), 1, residual, weight, out, eps, scales)


def _launch(
    x: Tensor,
    strides: tuple[int, ...],
    inner: int,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    scales: Tensor | None = None,
) -> None:
    """Row i of x lies at (i // inner) * strides[0] + (i % inner) * strides[1]. With scales, out is e4m3."""
    size = out.shape[-1]
    rows = out.numel() // size
    columns = triton.next_power_of_2(size)
    # A batch too small to fill the chip spreads over as many programs as it has rows.
    rows_each = max(1, _TILE // columns) if rows * columns > 2**20 or columns <= 256 else 1
    warps = min(16, max(1, triton.next_power_of_2(rows_each * columns) // (32 * _PER_THREAD)))
    early = launches_early(x.device)
    _rms_norm[(triton.cdiv(rows, rows_each),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        scales,
        rows,
        strides[0],
        strides[1],
        inner,
        0 if residual is None else residual.stride(0),
        eps,
        SIZE=size,
        COLUMNS=columns,
        ROWS=rows_each,
        ADD=residual is not None,
        EARLY=early,
        num_warps=warps,
        **({"launch_pdl": True} if early else {}),
    )


@triton.jit(do_not_specialize=["rows", "eps"])
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scales_ptr,
    rows,
    x_outer,
    x_inner,
    inner,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    each = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = each[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < SIZE)
    weight = tl.load(weight_ptr + column, column < SIZE, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + (row // inner) * x_outer + (row % inner) * x_inner + column, inside, other=0.0).to(tl.float32)
    if ADD:
        residual = residual_ptr + row * residual_stride + column
        total = (x + tl.load(residual, inside, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual, total, inside)
        x = total.to(tl.float32)
    weighted = x * weight
    if scales_ptr is None:
        out = weighted * tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
    else:
        # Both reductions in one. The largest number stays that when all are scaled and rounded.
        squares, largest = tl.reduce((x * x, tl.abs(weighted)), 1, _add_and_compare)
        scale = tl.rsqrt(squares / SIZE + eps)
        out, scales = to_e4m3(_rounded(weighted * scale[:, None], x_ptr), _rounded(largest * scale, x_ptr))
        tl.store(scales_ptr + each, scales, each < rows)
    tl.store(out_ptr + row * SIZE + column, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _add_and_compare(total, largest, other_total, other_largest):
    return total + other_total, tl.maximum(largest, other_largest)


@triton.jit
def _rounded(x, like_ptr):
    """x float32, as it is in the type of what a pointer points to."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)
