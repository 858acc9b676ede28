"""edit_logits in the Triton language: only the tokens that change are read or written.

Two launches at most: the penalties, then biases and masks side by side. What a mask excludes is only written, never
read, and who edits a token that the mask excludes writes -inf too: so the order of a masked token's writers is free.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from .edits import AllowedTokens, Bias, LogitsEdits, Penalties

# Pairs (row, token) of a program: with 4 warps two a thread, as each waits for a chain of loads.
_PAIRS = 256
# Words of a mask for a program: 4096 tokens.
_WORDS = 128


def edit_logits(logits: Tensor, edits: LogitsEdits) -> None:
    """See EditLogits."""
    if logits.numel() == 0:
        return
    if logits.stride(1) != 1:
        raise ValueError(f"the logits' rows must be contiguous, their strides are {logits.stride()}")
    if edits.penalties is not None:
        _launch_penalties(logits, edits.penalties)
    if edits.bias is not None or edits.allowed is not None:
        _launch_bias_and_mask(logits, edits.bias, edits.allowed)


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


def _launch_bias_and_mask(logits: Tensor, bias: Bias | None, allowed: AllowedTokens | None) -> None:
    requests, vocabulary = logits.shape
    words = triton.cdiv(vocabulary, 32)
    pairs = 0 if bias is None else len(bias.rows)
    bias_programs = triton.cdiv(pairs, _PAIRS)
    pieces = triton.cdiv(words, _WORDS)
    programs = bias_programs + (0 if allowed is None else requests * pieces)
    if programs == 0:
        return
    _bias_and_mask[(programs,)](
        logits,
        logits if bias is None else bias.rows,
        logits if bias is None else bias.tokens,
        logits if bias is None else bias.values,
        logits if allowed is None else allowed.bits,
        logits if allowed is None else allowed.rows,
        pairs,
        bias_programs,
        logits.stride(0),
        VOCABULARY=vocabulary,
        NUM_WORDS=words,
        PIECES=pieces,
        BIAS=bias is not None,
        MASK=allowed is not None,
        PAIRS=_PAIRS,
        WORDS=_WORDS,
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


@triton.jit(do_not_specialize=["pairs", "bias_programs"])
def _bias_and_mask(
    logits_ptr,
    rows_ptr,
    tokens_ptr,
    values_ptr,
    bits_ptr,
    allowed_rows_ptr,
    pairs,
    bias_programs,
    row_stride,
    VOCABULARY: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    PIECES: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PAIRS: tl.constexpr,
    WORDS: tl.constexpr,
):
    program = tl.program_id(0)
    if BIAS and program < bias_programs:
        pair = program * PAIRS + tl.arange(0, PAIRS)
        inside = pair < pairs
        row = tl.load(rows_ptr + pair, inside, other=0)
        token = tl.load(tokens_ptr + pair, inside, other=0)
        logit_ptr = logits_ptr + row.to(tl.int64) * row_stride + token
        x = tl.load(logit_ptr, inside, other=0.0) + tl.load(values_ptr + pair, inside, other=0.0)
        if MASK:
            mask = tl.load(allowed_rows_ptr + row, inside, other=-1).to(tl.int64)
            word = tl.load(bits_ptr + mask * NUM_WORDS + token // 32, inside & (mask >= 0), other=-1)
            x = tl.where((word >> (token % 32)) & 1 == 0, float("-inf"), x)
        tl.store(logit_ptr, x, inside)
    elif MASK:
        masked_row = (program - bias_programs) // PIECES
        own_mask = tl.load(allowed_rows_ptr + masked_row).to(tl.int64)
        if own_mask >= 0:
            index = (program - bias_programs) % PIECES * WORDS + tl.arange(0, WORDS)
            words = tl.load(bits_ptr + own_mask * NUM_WORDS + index, index < NUM_WORDS, other=-1)
            bit = tl.arange(0, 32)[None, :]
            place = index[:, None] * 32 + bit
            excluded = ((words[:, None] >> bit) & 1 == 0) & (place < VOCABULARY)
            # Through `where` the compiler does not see neighbours, and gives each thread of a warp one token of a
            # word: four of them in a thread would be four scattered stores, as their masks differ.
            place = tl.where(excluded, place, 0)
            forbidden = tl.full((WORDS, 32), float("-inf"), tl.float32)
            tl.store(logits_ptr + masked_row.to(tl.int64) * row_stride + place, forbidden, excluded)
