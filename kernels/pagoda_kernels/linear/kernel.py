"""linear on CUDA: our own products for up to 64 rows, cuBLAS for the rest.

The five matrices of Llama-3.1-8B in bfloat16, all 129 products in one CUDA graph on an H200, µs (reading the weights
once takes 3350):

| rows | ours | cuBLAS | |
| --- | --- | --- | --- |
| 1 | 3372 | 3916 | vector.py, all matrices |
| 16 | 3887 | 3983 | tiles.py, all matrices |
| 32 | 3950 | 4074 | tiles.py, and cuBLAS for gate_up |
| 64 | 4136 | 4169 | tiles.py, and cuBLAS for gate_up |
| 128 | 4530 | 4505 | the best of tiles.py and cuBLAS for each matrix: left to cuBLAS |
| 256 | 6786 | 6761 | the same |
"""

import torch
from torch import Tensor

from . import PackedWeight, reference
from .reference import pack_linear
from .tiles import Tile, can_tile, has_copy_engine, tiled_product
from .vector import matrix_vector

__all__ = ["linear", "pack_linear"]

# A program takes one multiprocessor's shared memory, 160 to 200 KiB.
_TILES = (Tile(64, 16, 256, stages=5), Tile(64, 32, 128, stages=7), Tile(64, 64, 128, stages=6))

# Weights below this many elements (a quarter of the smallest measured) are cuBLAS's, which splits their inputs.
_LARGE = 2**22
# Tiles beyond one wave over a H200's multiprocessors are worth it only when many waves hide the last one's idle part.
_ONE_WAVE, _MANY_WAVES = 132, 8 * 132


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See Linear."""
    if x.shape[0] == 1 and _suits(x, packed) and packed.in_features >= 512:
        return matrix_vector(x, packed, bias)
    tile = _tile(x, packed)
    if tile is None:
        return reference.linear(x, packed, bias)
    return tiled_product(x, packed.data, bias, tile, x.dtype)


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
    tile = next((tile for tile in _TILES if 2 <= rows <= tile.rows), None)
    if tile is None or not _suits(x, packed) or not can_tile(x) or packed.data.numel() < _LARGE:
        return None
    if rows > 16 and _ONE_WAVE < tile.count(packed.out_features, rows) < _MANY_WAVES:
        return None
    return tile if has_copy_engine(x.device) else None
