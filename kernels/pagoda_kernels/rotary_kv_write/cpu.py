"""rotary_kv_write for CPUs in float32: in place, about half the tensor operations of the reference."""

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
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See RotaryKvWrite. Padding (slot -1) and other dtypes than float32 take the reference."""
    if q.dtype != torch.float32 or k_cache.dtype != torch.float32 or len(slots) == 0 or slots.min() < 0:
        reference.rotary_kv_write(
            q, k, v, cos, sin, positions, k_cache, v_cache, slots,
            interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        return
    cos_rows, sin_rows = (table.index_select(0, positions).unsqueeze(1) for table in (cos, sin))
    for x, weight in ((q, q_norm), (k, k_norm)):
        if weight is not None:
            x.mul_(x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight)
        _rotate(x, cos_rows, sin_rows, interleaved)
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate x [T, heads, D] in place by cos, sin [T, 1, Drot/2]."""
    first, second = reference.pairs(x, cos.shape[-1], interleaved)
    rotated_first = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated_first)
