"""int4_linear of one row in the Triton language.

A program takes a few outputs. Converting codes would cost more than the product, so they are not converted: four bits
of a word, with the rest masked off, are a subnormal float, code * 2^(place - 149), and the device multiplies subnormals
at full speed, exactly. The powers of two go into x.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early
from . import PackedInt4Weight

# 8 KiB of weights a program in flight, 16 words a thread. The outputs share what x costs (widening it, its powers of
# two): 6.8 instructions a weight with four outputs, 5.9 with eight, which Triton 3.9 does not fit into the registers.
_OUTPUTS = 4
_BLOCKS = 4
_WARPS = 4


def vector_product(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None) -> Tensor:
    """Return int4_linear(x, packed, bias) for x [1, in]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(1, packed.out_features, dtype=x.dtype, device=x.device)
    early = launches_early(x.device)
    _vector_product[(triton.cdiv(packed.out_features, _OUTPUTS),)](
        x,
        packed.data,
        packed.scales,
        x if bias is None else bias,
        out,
        packed.out_features,
        1,
        INPUTS=packed.in_features,
        OUTPUTS=_OUTPUTS,
        BLOCKS=min(_BLOCKS, triton.next_power_of_2(packed.data.shape[1] // 128)),
        BIAS=bias is not None,
        EARLY=early,
        num_warps=_WARPS,
        **({"launch_pdl": True} if early else {}),
    )
    return out


@triton.jit(do_not_specialize=["scale_stride"])
def _vector_product(
    x_ptr,
    words_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    outputs,
    scale_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    # [32 threads, blocks, outputs, 4 words of a thread]: the compiler gives the first axis to the threads of a warp and
    # the second to warps, so a thread has the same inputs of all outputs. That scale_stride is 1 it must not know: it
    # would load scales by their order in memory, and carry each through shared memory to the threads that need it.
    ALL_BLOCKS: tl.constexpr = (INPUTS + 1023) // 1024
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None, None, :, None]
    block = tl.arange(0, BLOCKS)[None, :, None, None]
    input = tl.arange(0, 32)[:, None, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    word_ptr = words_ptr + output.to(tl.int64) * (ALL_BLOCKS * 128) + input
    scale_ptr = scales_ptr + output * scale_stride + tl.zeros((32, 1, 1, 1), tl.int32)
    total = tl.zeros((32, BLOCKS, OUTPUTS), tl.float32)
    if EARLY:
        gdc_launch_dependents()
    inside = (output < outputs) & (block < ALL_BLOCKS)
    words = tl.load(word_ptr + block * 128, inside, other=0, eviction_policy="evict_first")
    if EARLY:
        gdc_wait()
    for _ in range(0, ALL_BLOCKS, BLOCKS):
        for group in tl.static_range(8):
            position = block * 1024 + group * 128 + input
            x = tl.load(x_ptr + position, position < INPUTS, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + (block * 8 + group) * outputs, inside, other=0)
            total += _scaled(x, words, scale, group)
        block += BLOCKS
        inside = (output < outputs) & (block < ALL_BLOCKS)
        words = tl.load(word_ptr + block * 128, inside, other=0, eviction_policy="evict_first")
    out = tl.sum(tl.sum(total, axis=1), axis=0) * 2.0**60
    offset = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    if BIAS:
        out += tl.load(bias_ptr + offset, offset < outputs, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), offset < outputs)


@triton.jit
def _scaled(x, words, packed, GROUP: tl.constexpr):
    """Return a thread's part of one group's sum of x (code - zero) scale, times 2^-60: [32, blocks, outputs]."""
    # The mantissa has 23 bits: the last three groups are moved down.
    PLACE: tl.constexpr = 4 * GROUP if GROUP < 5 else 4 * GROUP - 20
    codes = ((words if GROUP < 5 else words >> 20) & (15 << PLACE)).to(tl.float32, bitcast=True)
    zeros = (packed & 0xF0000).to(tl.float32, bitcast=True)
    scale = packed.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    sums = tl.sum(x * 2.0 ** (149 - PLACE - 60) * codes, axis=3)
    # `zeros` and `scale` have one element along the last axis.
    return (sums - tl.sum(zeros * (tl.sum(x, axis=3)[:, :, :, None] * 2.0 ** (149 - 16 - 60)), axis=3)) * tl.sum(
        scale, axis=3
    )
