"""silu_mul in the Triton language: one pass."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early

# Columns of a program: with 4 warps, 16 gates and 16 ups a thread, that is four 16-byte loads of a 16-bit dtype.
_COLUMNS = 2048


def silu_mul(gate_up: Tensor) -> Tensor:
    """See SiluMul."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() > 0:
        x = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        columns = min(_COLUMNS, triton.next_power_of_2(width))
        early = launches_early(x.device)
        _silu_mul[(rows, triton.cdiv(width, columns))](
            x,
            out,
            x.stride(0),
            WIDTH=width,
            COLUMNS=columns,
            EARLY=early,
            num_warps=4,
            **({"launch_pdl": True} if early else {}),
        )
    return out


@triton.jit
def _silu_mul(x_ptr, out_ptr, x_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    gate_ptr = x_ptr + row * x_stride + column
    gate = tl.load(gate_ptr, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), inside)
