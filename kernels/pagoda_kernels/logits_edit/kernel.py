"""edit_logits in the Triton language: tokens that nobody edits are not read, but beside those that a mask excludes.

Three launches at most, as a token may be everybody's: the penalties, the biases, the masks. A mask is applied to eight
tokens at a time, 32 bytes, the least that memory writes: where it excludes all of them they are only written, where it
excludes some they are read, too. Stores of single tokens would make the memory do the same, one sector after the other:
that took 385 µs on an H100 for 256 random masks, instead of 64.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .edits import AllowedTokens, Bias, LogitsEdits, Penalties

# Pairs (row, token) of a program: with 4 warps two a thread, as each waits for a chain of loads.
_PAIRS = 256
# Bytes of a mask for a program: 4096 tokens, 32 a thread.
_BYTES = 512


def edit_logits(logits: Tensor, edits: LogitsEdits) -> None:
    """See EditLogits."""
    if logits.numel() == 0:
        return
    if logits.stride(1) != 1:
        raise ValueError(f"the logits' rows must be contiguous, their strides are {logits.stride()}")
    if edits.penalties is not None:
        _launch_penalties(logits, edits.penalties)
    if edits.bias is not None:
        _launch_bias(logits, edits.bias)
    if edits.allowed is not None:
        _launch_mask(logits, edits.allowed)


def _launch_penalties(logits: Tensor, penalties: Penalties) -> None:
    pairs = len(penalties.rows)
    if pairs == 0:
        return
    _penalise[(triton.cdiv(pairs, _PAIRS),)](
        logits,
        penalties.repetition,
        penalties.presence,
        penalties.frequency,
        penalties.rows,
        penalties.tokens,
        penalties.counts,
        pairs,
        logits.stride(0),
        PAIRS=_PAIRS,
        num_warps=4,
    )


def _launch_bias(logits: Tensor, bias: Bias) -> None:
    pairs = len(bias.rows)
    if pairs == 0:
        return
    _add_bias[(triton.cdiv(pairs, _PAIRS),)](
        logits,
        bias.rows,
        bias.tokens,
        bias.values,
        pairs,
        logits.stride(0),
        PAIRS=_PAIRS,
        num_warps=4,
    )


def _launch_mask(logits: Tensor, allowed: AllowedTokens) -> None:
    requests, vocabulary = logits.shape
    pieces = triton.cdiv(vocabulary, 8 * _BYTES)
    _mask[(requests * pieces,)](
        logits,
        allowed.bits.view(torch.uint8),
        allowed.rows,
        logits.stride(0),
        VOCABULARY=vocabulary,
        MASK_BYTES=4 * triton.cdiv(vocabulary, 32),
        PIECES=pieces,
        BYTES=_BYTES,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["pairs"])
def _penalise(
    logits_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    rows_ptr,
    tokens_ptr,
    counts_ptr,
    pairs,
    row_stride,
    PAIRS: tl.constexpr,
):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    row = tl.load(rows_ptr + pair, inside, other=0)
    token = tl.load(tokens_ptr + pair, inside, other=0)
    count = tl.load(counts_ptr + pair, inside, other=0)
    logit_ptr = logits_ptr + row.to(tl.int64) * row_stride + token
    x = tl.load(logit_ptr, inside, other=0.0)
    repetition = tl.load(repetition_ptr + row, inside, other=1.0)
    presence = tl.load(presence_ptr + row, inside, other=0.0)
    frequency = tl.load(frequency_ptr + row, inside, other=0.0)
    x = tl.where(x > 0, x / repetition, x * repetition)
    x -= frequency * count.to(tl.float32)
    x -= tl.where(count > 0, presence, 0.0)
    tl.store(logit_ptr, x, inside)


@triton.jit(do_not_specialize=["pairs"])
def _add_bias(logits_ptr, rows_ptr, tokens_ptr, values_ptr, pairs, row_stride, PAIRS: tl.constexpr):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    row = tl.load(rows_ptr + pair, inside, other=0)
    token = tl.load(tokens_ptr + pair, inside, other=0)
    logit_ptr = logits_ptr + row.to(tl.int64) * row_stride + token
    x = tl.load(logit_ptr, inside, other=0.0) + tl.load(values_ptr + pair, inside, other=0.0)
    tl.store(logit_ptr, x, inside)


@triton.jit
def _mask(
    logits_ptr,
    bits_ptr,
    allowed_rows_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    MASK_BYTES: tl.constexpr,
    PIECES: tl.constexpr,
    BYTES: tl.constexpr,
):
    row = tl.program_id(0) // PIECES
    mask = tl.load(allowed_rows_ptr + row).to(tl.int64)
    if mask >= 0:
        index = (tl.program_id(0) % PIECES * BYTES + tl.arange(0, BYTES))[:, None]
        bit = tl.arange(0, 8)[None, :]
        byte = tl.load(bits_ptr + mask * MASK_BYTES + index, index < MASK_BYTES, other=255).to(tl.int32)
        token = index * 8 + bit
        inside = token < VOCABULARY
        logit_ptr = logits_ptr + row.to(tl.int64) * row_stride + token
        x = tl.load(logit_ptr, inside & (byte > 0) & (byte < 255), other=0.0)
        x = tl.where((byte >> bit) & 1 == 0, float("-inf"), x)
        tl.store(logit_ptr, x, inside & (byte < 255))
