"""The specification of rotary_kv_write, in plain torch."""

import torch
from torch import Tensor

from ..rms_norm.reference import rms_norm


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
    cos_rows, sin_rows = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    for x, weight in ((q, q_norm), (k, k_norm)):
        wide = x.float() if weight is None else rms_norm(x.float(), weight.float(), eps)
        x.copy_(_rotated(wide, cos_rows, sin_rows, interleaved))
    _write(k_cache, k, slots, k_scale)
    _write(v_cache, v, slots, v_scale)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x [T, heads, D] rotated by cos, sin [T, 1, Drot/2]."""
    first, second = pairs(x, cos.shape[-1], interleaved)
    out = x.clone()
    out_first, out_second = pairs(out, cos.shape[-1], interleaved)
    out_first.copy_(first * cos - second * sin)
    out_second.copy_(second * cos + first * sin)
    return out


def pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second dimensions of the rotated pairs, as views [..., half] of x [..., D]."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _write(cache: Tensor, x: Tensor, slots: Tensor, scale: float) -> None:
    written = slots >= 0
    rows = x[written]
    if cache.dtype == torch.float8_e4m3fn:
        # torch has no indexed write in this dtype: the bytes are written.
        rows = quantise(rows, scale).view(torch.uint8)
        cache = cache.view(torch.uint8)
    cache.flatten(0, 1)[slots[written]] = rows


def quantise(x: Tensor, scale: float) -> Tensor:
    """Return x / scale in float8_e4m3fn, saturated: torch's own conversion turns what is too large into NaN."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    # By a number, a GPU would multiply with the reciprocal.
    scaled = x.float() / torch.full((), scale, device=x.device)
    return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)
