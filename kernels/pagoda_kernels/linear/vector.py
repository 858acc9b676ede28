"""The matrix-vector product in the Triton language.

It reads every weight once and is bound by that. A program takes one row of the weight, 2048 columns at a time, and adds
across its threads only at the end. The weights are evicted first, so that what the next kernels read stays in the L2
cache. From Hopper on, a product starts to read its weights while the kernel ahead is still ending.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early
from . import PackedWeight

_ROWS = 1
_COLUMNS = 2048
_WARPS = 4


def matrix_vector(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return linear(x, packed, bias) for x [1, in] and a contiguous weight."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(1, packed.out_features, dtype=x.dtype, device=x.device)
    early = launches_early(x.device)
    _matrix_vector[(triton.cdiv(packed.out_features, _ROWS),)](
        x,
        packed.data,
        x if bias is None else bias,
        out,
        OUTPUTS=packed.out_features,
        INPUTS=packed.in_features,
        ROWS=_ROWS,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(packed.in_features)),
        BIAS=bias is not None,
        EARLY=early,
        num_warps=_WARPS,
        **({"launch_pdl": True} if early else {}),
    )
    return out


@triton.jit
def _matrix_vector(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    weights = weight_ptr + row[:, None].to(tl.int64) * INPUTS + column[None, :]
    inside = (row < OUTPUTS)[:, None] & (column < INPUTS)[None, :]
    if EARLY:
        # The next kernel may move in where this one leaves room. This one reads its weights, which nobody writes,
        # while the kernel ahead is still running, and only then waits for it: x may be that kernel's result.
        gdc_launch_dependents()
        weight = tl.load(weights, inside, other=0.0, eviction_policy="evict_first")
        gdc_wait()
    else:
        weight = tl.load(weights, inside, other=0.0, eviction_policy="evict_first")
    x = tl.load(x_ptr + column, column < INPUTS, other=0.0)
    total = weight.to(tl.float32) * x.to(tl.float32)[None, :]
    for start in range(COLUMNS, INPUTS, COLUMNS):
        x = tl.load(x_ptr + start + column, start + column < INPUTS, other=0.0)
        inside = (row < OUTPUTS)[:, None] & (start + column < INPUTS)[None, :]
        weight = tl.load(weights + start, inside, other=0.0, eviction_policy="evict_first")
        total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, axis=1)
    if BIAS:
        out += tl.load(bias_ptr + row, row < OUTPUTS, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), row < OUTPUTS)
