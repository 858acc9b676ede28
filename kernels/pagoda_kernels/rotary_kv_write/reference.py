"""The specification of rotary_kv_write, in plain torch."""

import torch
from torch import Tensor


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
    cos_rows, sin_rows = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    _rotate(q, cos_rows, sin_rows)
    _rotate(k, cos_rows, sin_rows)
    written = slots >= 0
    k_cache.flatten(0, 1)[slots[written]] = k[written]
    v_cache.flatten(0, 1)[slots[written]] = v[written]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [T, heads, D] in place by cos, sin [T, 1, Drot/2]."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    x[..., : 2 * half] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
