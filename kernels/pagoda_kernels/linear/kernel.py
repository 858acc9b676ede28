"""linear on CUDA: our own products for up to 64 rows, for the head's 128, and for some matrices' 256; else cuBLAS.

The five matrices of Llama-3.1-8B in bfloat16, all 129 products in one CUDA graph on an H100, ms (reading the weights
once takes 4.81):

| rows | ours | cuBLAS |
| --- | --- | --- |
| 1 | 4.79 | 5.53 |
| 2 | 5.18 | 5.54 |
| 8 | 5.21 | 5.59 |
| 16 | 5.27 | 5.65 |
| 32 | 5.45 | 5.67 |
| 64 | 5.58 | 5.76 |
| 128 | 6.05 | 6.07 |

With more rows, tiles of our own are at best as fast as cuBLAS, also persistent ones of 128 x 256 outputs: at 8192 rows
both are bound by the power that the card may draw.
"""

import torch
from torch import Tensor

from ..devices import has_copy_engine, multiprocessors
from . import PackedWeight, reference
from .reference import pack_linear
from .tiles import Tile, can_tile, tiled_product
from .vector import matrix_vector

__all__ = ["linear", "linear_onto", "pack_linear"]

# By rows: the tile for matrices of few tiles, how many are few, and the tile for larger matrices. A program of few
# takes a multiprocessor's shared memory, 160 to 200 KiB; two of the larger ones' share it, where that pays.
_TILES = {
    16: (Tile(64, 16, 256, stages=5), 66, Tile(64, 16, 256, stages=3)),
    32: (Tile(64, 32, 256, stages=4), 132, Tile(64, 32, 128, stages=4)),
    64: (Tile(64, 64, 128, stages=6), 132, Tile(64, 64, 128, stages=3)),
}
# For up to 128 rows, where many waves hide the last one's idle part: of Llama's matrices the head's.
_WIDE = Tile(128, 128, 64, stages=3, warps=8)
# For 129 to 256 rows, where the tiles keep all multiprocessors busy once: of Llama's the projections to 4096 outputs,
# which take 57 µs (59 by cuBLAS) and 17.7 (18.4).
_ONCE = Tile(64, 128, 128, stages=4)

# Weights below this many elements (a quarter of the smallest measured) are cuBLAS's, which splits their inputs.
_LARGE = 2**22
_MANY_WAVES = 4


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See Linear."""
    if x.shape[0] == 1 and _suits(x, packed) and packed.in_features >= 512:
        return matrix_vector(x, packed, bias)
    tile = _tile(x, packed)
    if tile is None:
        return reference.linear(x, packed, bias)
    return tiled_product(x, packed.data, bias, tile, x.dtype)


def linear_onto(x: Tensor, packed: PackedWeight, residual: Tensor) -> bool:
    """See LinearOnto. Of many rows: cuBLAS reads the residual while it multiplies, so the norm has half the bytes."""
    return x.shape[0] > 2 * _ONCE.rows and reference.linear_onto(x, packed, residual)


def _suits(x: Tensor, packed: PackedWeight) -> bool:
    """Say whether the weight's rows can be read in 16-byte pieces."""
    return (
        packed.data.dtype == x.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and packed.data.is_contiguous()
        and packed.in_features % 8 == 0
    )


def _tile(x: Tensor, packed: PackedWeight) -> Tile | None:
    """Return the tile for these sizes, None where cuBLAS is as fast."""
    rows = x.shape[0]
    if rows < 2 or not _suits(x, packed) or not can_tile(x) or packed.data.numel() < _LARGE:
        return None
    if not has_copy_engine(x.device):
        return None
    for most, (deep, few, tile) in _TILES.items():
        if rows <= most:
            return deep if deep.count(packed.out_features, rows) <= few else tile
    if rows <= _WIDE.rows:
        waves = _WIDE.count(packed.out_features, rows) / multiprocessors(x.device)
        return _WIDE if waves >= _MANY_WAVES else None
    busy = _ONCE.count(packed.out_features, rows) / multiprocessors(x.device)
    return _ONCE if rows <= 2 * _ONCE.rows and 0.9 < busy <= 1 else None
