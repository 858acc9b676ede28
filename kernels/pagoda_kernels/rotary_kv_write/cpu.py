"""rotary_kv_write for CPUs in float32: truly in place, about half the tensor operations of the reference."""

import torch
from torch import Tensor

from . import reference


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
    """See RotaryKvWrite. Padding (slot -1) and other dtypes than float32 take the reference."""
    if q.dtype != torch.float32 or len(slots) == 0 or slots.min() < 0:
        reference.rotary_kv_write(q, k, v, cos, sin, positions, k_cache, v_cache, slots)
        return
    cos_rows, sin_rows = (table.index_select(0, positions).unsqueeze(1) for table in (cos, sin))
    _rotate(q, cos_rows, sin_rows)
    _rotate(k, cos_rows, sin_rows)
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [T, heads, D] in place by cos, sin [T, 1, Drot/2]."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated_first = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated_first)
