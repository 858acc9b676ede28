"""embedding in the Triton language: a program copies a piece of one row."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a program: with 4 warps, four 16-byte loads a thread of a 16-bit dtype.
_COLUMNS = 4096


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """See Embedding."""
    tokens, size = token_ids.shape[0], weight.shape[1]
    out = torch.empty(tokens, size, dtype=weight.dtype, device=weight.device)
    if out.numel() > 0:
        columns = min(_COLUMNS, triton.next_power_of_2(size))
        _embedding[(tokens, triton.cdiv(size, columns))](
            token_ids, weight, out, token_ids.stride(0), SIZE=size, COLUMNS=columns, num_warps=4
        )
    return out


@triton.jit
def _embedding(ids_ptr, weight_ptr, out_ptr, ids_stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(ids_ptr + token * ids_stride).to(tl.int64)
    values = tl.load(weight_ptr + row * SIZE + column, column < SIZE)
    tl.store(out_ptr + token * SIZE + column, values, column < SIZE)
