"""int4_linear of one row in the Triton language.

Converting codes would cost more than the product, so they are not converted: four bits of a word, with the rest masked
off, are a subnormal float, code * 2^(place - 149), and the device multiplies subnormals at full speed, exactly. The
powers of two go into x. What is left is 3.5 instructions a weight: two for the weight itself, the others for x and for
the scales, which four outputs and 16 codes share.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early
from . import PackedInt4Weight
from .layout import BLOCK

# A thread has 16 inputs of each of a block's four groups, for each output; a warp has four blocks. Eight outputs save a
# tenth of the instructions, but fill the registers: 1930 instead of 1770 µs for Llama-3.1-8B's matrices on an H100.
_OUTPUTS = 4
_WARPS = 2

# bfloat16 in both halves of a register. The sum with -0 is an instruction of Ampere, too.
_TIMES = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")


def vector_product(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None) -> Tensor:
    """Return int4_linear(x, packed, bias) for x [1, in], 16 bytes aligned."""
    out = torch.empty(1, packed.out_features, dtype=x.dtype, device=x.device)
    early = launches_early(x.device)
    in_twos = x.element_size() == 2
    _vector_product[(triton.cdiv(packed.out_features, _OUTPUTS),)](
        x[0].view(torch.int32) if in_twos else x,
        packed.data.view(torch.int32),
        packed.scales,
        x if bias is None else bias,
        out,
        packed.out_features,
        INPUTS=packed.in_features,
        BLOCKS=packed.data.shape[1] // BLOCK,
        OUTPUTS=_OUTPUTS,
        WARPS=_WARPS,
        IN_TWOS=in_twos,
        BIAS=bias is not None,
        EARLY=early,
        num_warps=_WARPS,
        **({"launch_pdl": True} if early else {}),
    )
    return out


@triton.jit
def _vector_product(
    x_ptr,
    words_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    outputs,
    INPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WARPS: tl.constexpr,
    IN_TWOS: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    # A tensor [threads, 4 words of a thread] for each output and each half of a block: in tensors with more axes the
    # order in which a compiler gives them to threads is not the same in all of its versions.
    STEP: tl.constexpr = 4 * WARPS
    IS_BF16: tl.constexpr = out_ptr.dtype.element_ty == tl.bfloat16
    output = tl.program_id(0) * OUTPUTS
    thread = tl.arange(0, 32 * WARPS)[:, None]
    word = thread % 8 * 4 + tl.arange(0, 4)[None, :]
    block = thread // 8
    word_ptr = words_ptr + output.to(tl.int64) * (BLOCKS * 64) + block * 64 + word
    scale_ptr = scales_ptr + block * (4 * outputs) + output
    totals = ()
    for _ in tl.static_range(OUTPUTS):
        totals += (tl.zeros((32 * WARPS,), tl.float32),)
    if EARLY:
        gdc_launch_dependents()
    words = _words(word_ptr, block, BLOCKS, STEP, OUTPUTS)
    if EARLY:
        gdc_wait()
    for start in range(0, BLOCKS, STEP):
        for group in tl.static_range(4):
            inside = ((block + start) * 512 + group * 128 < INPUTS) & (word >= 0)
            pair = (block + start) * 256 + group * 64 + word
            low, high = _pairs(x_ptr, pair, inside, group, IN_TWOS, IS_BF16)
            low2, high2 = _pairs(x_ptr, pair + 32, inside, group, IN_TWOS, IS_BF16)
            # The zeros are subnormal, too, at place 0.
            highs = (high + high2) * (65536.0 if group == 0 else 1.0)
            x_sum = tl.sum(low + low2 + highs, axis=1) * -(2.0 ** (4 * group))
            added = ()
            for i in tl.static_range(OUTPUTS):
                sums = low * _low(words[2 * i], group)
                sums = tl.fma(high, _high(words[2 * i], group), sums)
                sums = tl.fma(low2, _low(words[2 * i + 1], group), sums)
                sums = tl.fma(high2, _high(words[2 * i + 1], group), sums)
                packed = tl.load(scale_ptr + (start * 4 + group) * outputs + i, block + start < BLOCKS, other=0)
                # One element along the last axis.
                zero = tl.sum((packed & 15).to(tl.float32, bitcast=True), axis=1)
                scale = tl.sum((packed & -16).to(tl.float32, bitcast=True), axis=1)
                added += (tl.fma(tl.fma(zero, x_sum, tl.sum(sums, axis=1)), scale, totals[i]),)
            totals = added
        if start + STEP < BLOCKS:
            words = _words(word_ptr + (start + STEP) * 64, block + start + STEP, BLOCKS, STEP, OUTPUTS)
    # Outputs are a multiple of 8: none is left over.
    for i in tl.static_range(OUTPUTS):
        out = tl.sum(totals[i], axis=0) * 2.0**60
        if BIAS:
            out += tl.load(bias_ptr + output + i).to(tl.float32)
        tl.store(out_ptr + output + i, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _words(ptr, block, BLOCKS: tl.constexpr, STEP: tl.constexpr, OUTPUTS: tl.constexpr):
    """Return the two halves of a block's words for each output."""
    words = ()
    for i in tl.static_range(2 * OUTPUTS):
        half_ptr = ptr + (i // 2 * BLOCKS * 64 + i % 2 * 32)
        if BLOCKS % STEP == 0:
            words += (tl.load(half_ptr, eviction_policy="evict_first"),)
        else:
            inside = (block < BLOCKS) & (tl.zeros(ptr.shape, tl.int32) == 0)
            words += (tl.load(half_ptr, inside, other=0, eviction_policy="evict_first"),)
    return words


@triton.jit
def _low(words, GROUP: tl.constexpr):
    """Return the codes of the words' lower halves, at place 4 * GROUP."""
    return (words & (15 << 4 * GROUP)).to(tl.float32, bitcast=True)


@triton.jit
def _high(words, GROUP: tl.constexpr):
    """Return those of the upper halves: group 0 at place 16, where it lies, the others at 4 * GROUP."""
    bits = words & 0xF0000 if GROUP == 0 else (words >> 16) & (15 << 4 * GROUP)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pairs(x_ptr, pair, inside, GROUP: tl.constexpr, IN_TWOS: tl.constexpr, IS_BF16: tl.constexpr):
    """Return the even and the odd inputs times 2^(89 - place): with a code at its place, x * code * 2^-60."""
    LOW: tl.constexpr = 89 - 4 * GROUP
    HIGH: tl.constexpr = 73 if GROUP == 0 else LOW
    if not IN_TWOS:
        low = tl.load(x_ptr + 2 * pair, inside, other=0.0).to(tl.float32) * 2.0**LOW
        high = tl.load(x_ptr + 2 * pair + 1, inside, other=0.0).to(tl.float32) * 2.0**HIGH
    else:
        two = tl.load(x_ptr + pair, inside, other=0)
        if IS_BF16:
            powers = tl.full(two.shape, (127 + HIGH) << 23 | (127 + LOW) << 7, tl.int32)
            two = tl.inline_asm_elementwise(_TIMES, "=r,r,r", [two, powers], tl.int32, is_pure=True, pack=1)
            low = (two << 16).to(tl.float32, bitcast=True)
            high = (two & -65536).to(tl.float32, bitcast=True)
        else:
            low = two.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 2.0**LOW
            high = (two >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 2.0**HIGH
    return low, high
