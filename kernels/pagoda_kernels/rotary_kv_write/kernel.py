"""rotary_kv_write in the Triton language: one launch; a program takes a few heads of one token.

A head belongs to one program, which reads all of it before it writes any, so in place is safe.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early

# Heads of a program, at most, and its warps: 32 heads of 128 are 2048 pairs, 16 a thread. Of 4 to 32 heads and 1 to 8
# warps the best on an H200 at 8192 tokens (57.9 µs), and within 0.3 µs of the best at 256.
_HEADS = 32
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
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See RotaryKvWrite."""
    tokens, num_heads, head_size = q.shape
    if tokens == 0:
        return
    num_kv_heads, half = k.shape[1], cos.shape[1]
    rest = head_size - 2 * half
    heads = min(_HEADS, triton.next_power_of_2(num_heads))
    query_programs = triton.cdiv(num_heads, heads)
    programs = query_programs + triton.cdiv(num_kv_heads, heads)
    early = launches_early(q.device)
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
        q if q_norm is None else q_norm,
        k if k_norm is None else k_norm,
        eps,
        k_scale,
        v_scale,
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
        STEP=2 if interleaved else 1,
        APART=1 if interleaved else half,
        NORM=q_norm is not None,
        FP8=k_cache.dtype == torch.float8_e4m3fn,
        PROGRAMS=programs,
        QUERY_PROGRAMS=query_programs,
        HEADS=heads,
        EARLY=early,
        num_warps=_WARPS,
        **({"launch_pdl": True} if early else {}),
    )


@triton.jit
def _cached(x, scale, cache_ptr, FP8: tl.constexpr):
    """What the cache holds for x: the same, or x / scale as the nearest of float8_e4m3fn's finite numbers."""
    if FP8:
        scaled = tl.div_rn(x.to(tl.float32), scale)  # rounded as the reference's division: a tie must stay one
        x = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    return x.to(cache_ptr.dtype.element_ty)


@triton.jit
def _rest(HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, REST_PADDED: tl.constexpr):
    """The dimensions that are not rotated, and which of them there are."""
    dimension = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
    return dimension, dimension < HEAD_SIZE


@triton.jit
def _norm_scale(
    x_ptr,
    first,
    second,
    eps,
    head_inside,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    REST_PADDED: tl.constexpr,
):
    """1 / RMS of the heads at x_ptr, [HEADS, 1], whose rotated dimensions are first and second."""
    squares = tl.sum(first * first + second * second, axis=1)[:, None]
    if REST_PADDED > 0:
        dimension, known = _rest(HEAD_SIZE, HALF, REST_PADDED)
        rest = tl.load(x_ptr + dimension, head_inside & known, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, axis=1)[:, None]
    return tl.rsqrt(squares / HEAD_SIZE + eps)


@triton.jit
def _normed(x, scale, weight_ptr, inside):
    """x times its scale and weight, in float32."""
    return x.to(tl.float32) * scale * tl.load(weight_ptr, inside, other=0.0).to(tl.float32)


@triton.jit
def _rotate(
    x_ptr,
    norm_ptr,
    eps,
    cos_row,
    sin_row,
    inside,
    head_inside,
    pair,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    REST_PADDED: tl.constexpr,
    STEP: tl.constexpr,
    APART: tl.constexpr,
    NORM: tl.constexpr,
):
    """Normalise and rotate the pairs of the heads at x_ptr [HEADS, 1] in place.

    Return the pairs, in x's dtype, and the norm's scale. The dimensions past the pairs stay as they are.
    """
    first_ptr = x_ptr + pair * STEP
    first = tl.load(first_ptr, inside, other=0.0).to(tl.float32)
    second = tl.load(first_ptr + APART, inside, other=0.0).to(tl.float32)
    cos, sin = tl.load(cos_row, pair < HALF, other=0.0), tl.load(sin_row, pair < HALF, other=0.0)
    scale = eps
    if NORM:
        scale = _norm_scale(x_ptr, first, second, eps, head_inside, HEAD_SIZE, HALF, REST_PADDED)
        first = _normed(first, scale, norm_ptr + pair * STEP, pair < HALF)
        second = _normed(second, scale, norm_ptr + pair * STEP + APART, pair < HALF)
    rotated_first = (first * cos - second * sin).to(x_ptr.dtype.element_ty)
    rotated_second = (second * cos + first * sin).to(x_ptr.dtype.element_ty)
    tl.store(first_ptr, rotated_first, inside)
    tl.store(first_ptr + APART, rotated_second, inside)
    return rotated_first, rotated_second, scale


@triton.jit(do_not_specialize=["eps", "k_scale", "v_scale"])
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
    q_norm_ptr,
    k_norm_ptr,
    eps,
    k_scale,
    v_scale,
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
    STEP: tl.constexpr,
    APART: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    PROGRAMS: tl.constexpr,
    QUERY_PROGRAMS: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
        head_ptr = q_ptr + token * q_token + head * q_head
        _, _, scale = _rotate(
            head_ptr, q_norm_ptr, eps, cos_row, sin_row, inside, head < NUM_HEADS, pair,
            HEAD_SIZE, HALF, REST_PADDED, STEP, APART, NORM,
        )  # fmt: skip
        if NORM and REST_PADDED > 0:
            q_rest, q_known = _rest(HEAD_SIZE, HALF, REST_PADDED)
            q_inside = (head < NUM_HEADS) & q_known
            q_tail = _normed(tl.load(head_ptr + q_rest, q_inside, other=0.0), scale, q_norm_ptr + q_rest, q_known)
            tl.store(head_ptr + q_rest, q_tail.to(q_ptr.dtype.element_ty), q_inside)
    else:
        head = (program - QUERY_PROGRAMS) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < NUM_KV_HEADS) & (pair < HALF)
        slot = tl.load(slots_ptr + token)
        dimension = tl.arange(0, HEAD_PADDED)[None, :]
        value_inside = (head < NUM_KV_HEADS) & (dimension < HEAD_SIZE)
        value = tl.load(v_ptr + token * v_token + head * v_head + dimension, value_inside, other=0.0)
        head_ptr = k_ptr + token * k_token + head * k_head
        first, second, scale = _rotate(
            head_ptr, k_norm_ptr, eps, cos_row, sin_row, inside, head < NUM_KV_HEADS, pair,
            HEAD_SIZE, HALF, REST_PADDED, STEP, APART, NORM,
        )  # fmt: skip
        cached = slot * (NUM_KV_HEADS * HEAD_SIZE) + head * HEAD_SIZE  # negative for slot -1
        written = inside & (cached >= 0)
        cached_ptr = k_cache_ptr + cached + pair * STEP
        tl.store(cached_ptr, _cached(first, k_scale, k_cache_ptr, FP8), written)
        tl.store(cached_ptr + APART, _cached(second, k_scale, k_cache_ptr, FP8), written)
        if REST_PADDED > 0:
            rest, known = _rest(HEAD_SIZE, HALF, REST_PADDED)
            rest_inside = (head < NUM_KV_HEADS) & known
            tail = tl.load(head_ptr + rest, rest_inside, other=0.0)
            if NORM:
                tail = _normed(tail, scale, k_norm_ptr + rest, known).to(k_ptr.dtype.element_ty)
                tl.store(head_ptr + rest, tail, rest_inside)
            rest_written = rest_inside & (cached >= 0)
            tl.store(k_cache_ptr + cached + rest, _cached(tail, k_scale, k_cache_ptr, FP8), rest_written)
        tl.store(
            v_cache_ptr + cached + dimension, _cached(value, v_scale, v_cache_ptr, FP8), value_inside & (cached >= 0)
        )
