"""silu_linear on CUDA: one kernel, or linear and silu_mul where that is faster.

Llama-3.1-8B's in bfloat16 on an H100, µs:

| rows | linear, silu_mul | one kernel |
| --- | --- | --- |
| 128 | 94 | 88 |
| 160 | 100 | 101 |
| 256 | 111 | 103 |
| 384 | 141 | 134 |
| 512 | 172 | 181 |
| 1024 | 340 | 309 |
| 2048 | 693 | 703 |
| 8192 | 3011 | 2828 |
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import sys
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..devices import has_copy_engine, multiprocessors
from ..linear import PackedWeight
from ..linear.kernel import linear
from ..linear.tiles import can_tile
from ..silu_mul.kernel import silu_mul


@dataclass(frozen=True)
class Block:
    """What a program computes at a time: rows x outputs, for which it reads as many gates and ups."""

    rows: int = 128
    outputs: int = 128
    inputs: int = 64
    stages: int = 4
    warps: int = 8

    def count(self, rows: int, outputs: int) -> int:
        """Return how many blocks an output has."""
        blocks: int = triton.cdiv(rows, self.rows) * triton.cdiv(outputs, self.outputs)
        return blocks


_BLOCKS = (
    (range(65, 129), Block(outputs=64, inputs=128, stages=3)),
    (range(161, 385), Block()),
    (range(1024, sys.maxsize), Block()),
)
"""By rows; in between, cuBLAS is faster by more than the activation's own pass takes."""
_LEAST_BUSY = 0.8
"""Of the multiprocessors while the last blocks are computed, all rounds counted: cuBLAS can split work more evenly."""


def silu_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See SiluLinear."""
    block = _block(x, packed) if bias is None else None
    if block is None:
        return silu_mul(linear(x, packed, bias))
    return fused(x, packed.data, block, multiprocessors(x.device))


def _block(x: Tensor, packed: PackedWeight) -> Block | None:
    """Return the block for these sizes, None where one kernel is not faster."""
    block = next((block for rows, block in _BLOCKS if x.shape[0] in rows), None)
    if block is None or not _suits(x, packed):
        return None
    programs = multiprocessors(x.device)
    count = block.count(x.shape[0], packed.out_features // 2)
    return block if count >= _LEAST_BUSY * programs * triton.cdiv(count, programs) else None


def _suits(x: Tensor, packed: PackedWeight) -> bool:
    """Say whether the copy engine can read and write all that there is."""
    return (
        packed.data.dtype == x.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and packed.out_features // 2 * x.itemsize % 16 == 0
        and packed.data.is_contiguous()
        and can_tile(x)
        and can_tile(packed.data)
        and has_copy_engine(x.device)
    )


def fused(x: Tensor, weight: Tensor, block: Block, programs: int) -> Tensor:
    """Return silu_linear of x [T, in] and a contiguous weight [2I, in], by at most so many programs.

    The rows of x, of the weight and of the result start at multiples of 16 bytes.
    """
    rows, in_features = x.shape
    outputs = weight.shape[0] // 2
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    # One load fetches a block of gates and the block of ups that belongs to it, for one product of twice the width.
    gate_up = weight.view(2, outputs, in_features)
    _silu_linear[(min(programs, block.count(rows, outputs)),)](
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block.rows, block.inputs]),
        TensorDescriptor(gate_up, list(gate_up.shape), list(gate_up.stride()), [2, block.outputs, block.inputs]),
        TensorDescriptor(out, list(out.shape), list(out.stride()), [block.rows, block.outputs]),
        triton.cdiv(rows, block.rows),
        triton.cdiv(outputs, block.outputs),
        triton.cdiv(in_features, block.inputs),
        ROWS=block.rows,
        OUTPUTS=block.outputs,
        INPUTS=block.inputs,
        STAGES=block.stages,
        num_warps=block.warps,
    )
    return out


@triton.jit(do_not_specialize=["down", "across", "steps"])
def _silu_linear(
    x,
    weight,
    out,
    down,
    across,
    steps,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The blocks' loops run as one (flatten), so that a block's first loads overlap with the activation of the one
    # before. Two counters: the one that is ahead serves the loads, the other the stores.
    programs = tl.num_programs(0)
    stored = tl.program_id(0) - programs
    for block in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        i, j = _place(block, down, across)
        total = tl.zeros((ROWS, 2 * OUTPUTS), tl.float32)
        for step in tl.range(steps, num_stages=STAGES):
            xs = x.load([i * ROWS, step * INPUTS])
            weights = weight.load([0, j * OUTPUTS, step * INPUTS]).reshape(2 * OUTPUTS, INPUTS)
            total = tl.dot(xs, weights.T, total)
        stored += programs
        i, j = _place(stored, down, across)
        gate, up = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, OUTPUTS)), (0, 2, 1)))
        out.store([i * ROWS, j * OUTPUTS], (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype))


@triton.jit
def _place(block, down, across, GROUP: tl.constexpr = 8):
    """Return a block's place, down and across: GROUP rows of blocks are walked together, so that neighbours in time
    share weights and rows in the L2 cache."""
    first = block // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = block % (GROUP * across)
    return first + within % height, within // height
