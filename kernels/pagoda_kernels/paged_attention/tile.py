"""What the attention kernels do with a tile: read it from the cache, and add it to a softmax that is under way.

The softmax keeps a running maximum and sum for each row (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023,
arXiv:2307.08691), all in base 2.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def nothing_seen(ROWS: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """The running output, maximum and sum of rows that have seen no position."""
    total = tl.zeros((ROWS, HEAD_PADDED), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    return total, peak, tl.zeros((ROWS,), tl.float32)


@triton.jit
def load_queries(
    q_ptr, row, head, q_row, q_head, real, EIGHT_BITS: tl.constexpr, GROUP: tl.constexpr, HEAD_PADDED: tl.constexpr
):
    """Rows of queries, a token's GROUP heads after each other; q_ptr is at token and head 0 of the first.

    EIGHT_BITS: for keys of 8 bits, which become what the queries are: two of them float16 by one instruction, bfloat16
    by four, which were the limit of decodes. So bfloat16 queries become float16: exactly from 2^-14 on, smaller ones to
    within 2^-25. Those beyond 65504, which no model has, are cut off there.
    """
    dimension = tl.arange(0, HEAD_PADDED)
    offset = (row // GROUP) * q_row + (head * GROUP + row % GROUP) * q_head
    q = tl.load(q_ptr + offset[:, None] + dimension[None, :], real, other=0.0)
    if EIGHT_BITS and q.dtype == tl.bfloat16:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return q


@triton.jit
def cached_tile(
    k_ptr, v_ptr, table_ptr, start, first, last, head,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """The keys and values of the positions from start on. CHECK: only those in [first, last) may be read."""
    position = start + tl.arange(0, POSITIONS)
    dimension = tl.arange(0, HEAD_PADDED)
    if CHECK:
        live = (position >= first) & (position < last)
        block = tl.load(table_ptr + position // BLOCK_SIZE, live, other=0)
    else:
        block = tl.load(table_ptr + position // BLOCK_SIZE)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    offset = slot[:, None] * (NUM_KV_HEADS * HEAD_SIZE) + (head * HEAD_SIZE + dimension)[None, :]
    # Slots that must not be read may hold NaN, which no weight of zero would hide.
    if CHECK:
        inside = live[:, None] & (dimension < HEAD_SIZE)[None, :]
        k = tl.load(k_ptr + offset, inside, other=0.0)
        v = tl.load(v_ptr + offset, inside, other=0.0)
    elif HEAD_SIZE < HEAD_PADDED:
        inside = (dimension < HEAD_SIZE)[None, :]
        k = tl.load(k_ptr + offset, inside, other=0.0)
        v = tl.load(v_ptr + offset, inside, other=0.0)
    else:
        k = tl.load(k_ptr + offset)
        v = tl.load(v_ptr + offset)
    return k, v


@triton.jit
def weigh(
    peak, weight_sum, q, k, visible, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, MAYBE_NOTHING: tl.constexpr,
):  # fmt: skip
    """The weights of a tile's positions, what earlier ones shrink by, and the new maximum and sum.

    MASKED: rows see what `visible` says. MAYBE_NOTHING: a row may not have seen anything afterwards.
    """
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if SOFTCAP:
        # softcap * tanh(x), where both factors of x and the result are in base 2.
        scores = softcap - 2 * softcap / (1 + tl.exp(2 * (scores * scale / softcap)))
        scale = 1.0
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    base = new_peak
    if MAYBE_NOTHING:
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(peak - base)
    return weights, shrink, new_peak, weight_sum * shrink + tl.sum(weights, 1)


@triton.jit
def add_values(total, weights, shrink, v, DTYPE: tl.constexpr):
    """Add a tile's weighted values to the running output."""
    return tl.dot(weights.to(DTYPE), v.to(DTYPE), total * shrink[:, None], input_precision="ieee")


@triton.jit
def add_tile(
    total, peak, weight_sum, q, k, v, visible, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, MAYBE_NOTHING: tl.constexpr,
):  # fmt: skip
    """Add a tile that is at hand: see weigh."""
    weights, shrink, peak, weight_sum = weigh(
        peak, weight_sum, q, k, visible, scale, softcap, MASKED, SOFTCAP, MAYBE_NOTHING
    )
    return add_values(total, weights, shrink, v, q.dtype), peak, weight_sum
