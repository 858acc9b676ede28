"""A kernel that only reads: its rate is the floor of every op that is bound by memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import multiprocessors

_BLOCK = 4096


def read(x: Tensor, programs_each: int) -> Tensor:
    """Return the sums of the int32 x, contiguous, that each of so many programs a multiprocessor has read."""
    programs = programs_each * multiprocessors(x.device)
    out = torch.empty(programs, dtype=torch.int32, device=x.device)
    _read[(programs,)](x, out, x.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _read(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        total += tl.load(x_ptr + start + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))
