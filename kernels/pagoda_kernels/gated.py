"""Gated activations, activation(gate) * up, in the Triton language: one pass, for silu_mul and gelu_mul alike.

Both activations are gate times the logistic function of something: of the gate itself, or for the tanh approximation
of GELU of 2 sqrt(2 / pi) (gate + 0.044715 gate³), as (1 + tanh(y)) / 2 is the logistic function of 2 y.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .early_launch import launches_early

# Columns of a program: with 4 warps, 16 gates and 16 ups a thread, that is four 16-byte loads of a 16-bit dtype.
_COLUMNS = 2048


def gated_mul(gate_up: Tensor, *, tanh_gelu: bool) -> Tensor:
    """Return activation(gate) * up, [T, I], for gate_up = [gate | up] of shape [T, 2I]: GELU's, or else SiLU's."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() > 0:
        x = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        columns = min(_COLUMNS, triton.next_power_of_2(width))
        early = launches_early(x.device)
        _gated_mul[(rows, triton.cdiv(width, columns))](
            x,
            out,
            x.stride(0),
            WIDTH=width,
            COLUMNS=columns,
            TANH_GELU=tanh_gelu,
            EARLY=early,
            num_warps=4,
            **({"launch_pdl": True} if early else {}),
        )
    return out


@triton.jit
def _gated_mul(
    x_ptr,
    out_ptr,
    x_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TANH_GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    gate_ptr = x_ptr + row * x_stride + column
    gate = tl.load(gate_ptr, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, inside, other=0.0).to(tl.float32)
    out = gated(gate, up, TANH_GELU)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def gated(gate, up, TANH_GELU: tl.constexpr):
    """Return activation(gate) * up, float32 all: GELU's, or else SiLU's."""
    if TANH_GELU:
        argument = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    else:
        argument = gate
    return gate / (1.0 + tl.exp(-argument)) * up
