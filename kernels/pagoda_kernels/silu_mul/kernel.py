"""silu_mul and silu_mul_fp8 in the Triton language."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early
from ..fp8_linear import Fp8Rows
from ..fp8_linear.e4m3 import to_e4m3
from ..gated import gated, gated_mul

# Threads of a program of silu_mul_fp8, which has a whole row: 16 gates and 16 ups each of a row of 16384.
_PER_THREAD = 32


def silu_mul(gate_up: Tensor) -> Tensor:
    """See SiluMul."""
    return gated_mul(gate_up, tanh_gelu=False)


def silu_mul_fp8(gate_up: Tensor) -> Fp8Rows:
    """See SiluMulFp8."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = Fp8Rows.empty(rows, width, like=gate_up)
    if rows * width > 0:
        x = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        columns = triton.next_power_of_2(width)
        early = launches_early(x.device)
        _silu_mul_fp8[(rows,)](
            x,
            out.values,
            out.scales,
            x.stride(0),
            WIDTH=width,
            COLUMNS=columns,
            EARLY=early,
            num_warps=min(16, max(1, columns // (32 * _PER_THREAD))),
            **({"launch_pdl": True} if early else {}),
        )
    return out


@triton.jit
def _silu_mul_fp8(
    x_ptr, values_ptr, scales_ptr, x_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    gate_ptr = x_ptr + row * x_stride + column
    gate = tl.load(gate_ptr, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, inside, other=0.0).to(tl.float32)
    out = gated(gate, up, False).to(x_ptr.dtype.element_ty).to(tl.float32)
    values, scale = to_e4m3(out, tl.max(tl.abs(out), axis=1))
    tl.store(values_ptr + row * WIDTH + column, values, inside)
    tl.store(scales_ptr + row + tl.arange(0, 1), scale)
