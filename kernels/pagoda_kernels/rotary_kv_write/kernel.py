"""rotary_kv_write in the Triton language: one launch; a program rotates a few heads of one token.

A head belongs to one program, which reads both halves before it writes either, so in place is safe.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

# Heads and warps of a program: 8 heads of 128 are 512 pairs, 4 a thread. The best of 2 to 16 heads and 1 to 8 warps on
# an H200, at 256 tokens as at 8192.
_HEADS = 8
_WARPS = 4


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> None:
    """See RotaryKvWrite."""
    tokens, num_heads, head_size = q.shape
    if tokens == 0:
        return
    num_kv_heads, half = k.shape[1], cos.shape[1]
    rest = head_size - 2 * half
    query_programs = triton.cdiv(num_heads, _HEADS)
    programs = query_programs + triton.cdiv(num_kv_heads, _HEADS)
    _rotary_kv_write[(tokens * programs,)](
        q,
        k,
        v,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        slots,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.stride(0),
        sin.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        HALF=half,
        HALF_PADDED=triton.next_power_of_2(half),
        HEAD_PADDED=triton.next_power_of_2(head_size),
        REST_PADDED=triton.next_power_of_2(rest) if rest else 0,
        PROGRAMS=programs,
        QUERY_PROGRAMS=query_programs,
        HEADS=_HEADS,
        num_warps=_WARPS,
    )


@triton.jit
def _rotary_kv_write(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    cos_stride,
    sin_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    QUERY_PROGRAMS: tl.constexpr,
    HEADS: tl.constexpr,
):
    # All loads that depend on nothing come first: the rows of cos and sin wait for the position.
    program = tl.program_id(0) % PROGRAMS
    token = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    pair = tl.arange(0, HALF_PADDED)[None, :]
    position = tl.load(positions_ptr + token)
    cos_row = cos_ptr + position * cos_stride + pair
    sin_row = sin_ptr + position * sin_stride + pair
    if program < QUERY_PROGRAMS:
        head = program * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < NUM_HEADS) & (pair < HALF)
        first_ptr = q_ptr + token * q_token + head * q_head + pair
        first = tl.load(first_ptr, inside, other=0.0).to(tl.float32)
        second = tl.load(first_ptr + HALF, inside, other=0.0).to(tl.float32)
        cos, sin = tl.load(cos_row, pair < HALF, other=0.0), tl.load(sin_row, pair < HALF, other=0.0)
        tl.store(first_ptr, (first * cos - second * sin).to(q_ptr.dtype.element_ty), inside)
        tl.store(first_ptr + HALF, (second * cos + first * sin).to(q_ptr.dtype.element_ty), inside)
    else:
        head = (program - QUERY_PROGRAMS) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < NUM_KV_HEADS) & (pair < HALF)
        first_ptr = k_ptr + token * k_token + head * k_head + pair
        first = tl.load(first_ptr, inside, other=0.0).to(tl.float32)
        second = tl.load(first_ptr + HALF, inside, other=0.0).to(tl.float32)
        slot = tl.load(slots_ptr + token)
        dimension = tl.arange(0, HEAD_PADDED)[None, :]
        value_inside = (head < NUM_KV_HEADS) & (dimension < HEAD_SIZE)
        value = tl.load(v_ptr + token * v_token + head * v_head + dimension, value_inside, other=0.0)
        cos, sin = tl.load(cos_row, pair < HALF, other=0.0), tl.load(sin_row, pair < HALF, other=0.0)
        rotated_first = (first * cos - second * sin).to(k_ptr.dtype.element_ty)
        rotated_second = (second * cos + first * sin).to(k_ptr.dtype.element_ty)
        tl.store(first_ptr, rotated_first, inside)
        tl.store(first_ptr + HALF, rotated_second, inside)

        cached = slot * (NUM_KV_HEADS * HEAD_SIZE) + head * HEAD_SIZE  # negative for slot -1
        written = inside & (cached >= 0)
        tl.store(k_cache_ptr + cached + pair, rotated_first, written)
        tl.store(k_cache_ptr + cached + pair + HALF, rotated_second, written)
        if REST_PADDED > 0:
            rest = tl.arange(0, REST_PADDED)[None, :] + 2 * HALF
            written = (head < NUM_KV_HEADS) & (rest < HEAD_SIZE) & (cached >= 0)
            tail = tl.load(k_ptr + token * k_token + head * k_head + rest, written, other=0.0)
            tl.store(k_cache_ptr + cached + rest, tail, written)
        tl.store(v_cache_ptr + cached + dimension, value, value_inside & (cached >= 0))
