"""fp8_linear on CUDA: a kernel that quantises x, unless what made x has, then tiles of our own or torch's _scaled_mm.

The five matrices of Llama-3.1-8B, all 129 products in one CUDA graph on an H200, µs, quantiser included:

| rows | tiles.py | _scaled_mm (cuBLAS) | the choice below | bf16 cuBLAS |
| --- | --- | --- | --- | --- |
| 16 | 2429 | 3494 | 2353 | 3987 |
| 64 | 2683 | 3572 | 2554 | 4180 |
| 256 | 4591 | 4303 | about 3970 | 5960 |

Since then the quantiser multiplies where it divided, and the tiles' products start early (tiles.py): on an H100 they
take 3.09 ms for 16 rows (3.27 before), 3.30 for 64 (3.47) and 4.68 for 256 (4.77), in bf16 7.03.

At 8192 rows _scaled_mm takes 0.55 of bf16's time.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..devices import has_copy_engine
from ..early_launch import launches_early
from ..linear.tiles import Scales, Tile, can_tile, tiled_product
from . import Fp8Rows, Fp8Weight, PackedFp8Weight
from .e4m3 import to_e4m3

__all__ = ["fp8_linear", "pack_fp8_linear", "quantise_rows"]

# Up to one wave over a H200's multiprocessors the deepest pipeline wins; beyond, two programs to a multiprocessor.
_ONE_WAVE = 132
_FEW = {
    16: (Tile(64, 16, 512, stages=4), Tile(64, 16, 256, stages=4)),
    64: (Tile(64, 64, 256, 6), Tile(64, 64, 256, 3)),
}
# For 65 to 256 rows and one wave of tiles; split when the inputs are long: with 14336 of them that takes 8 µs less than
# cuBLAS, which takes 37.
_MANY = Tile(128, 128, 128, stages=6, warps=8)
_MANY_SPLIT = Tile(128, 128, 128, stages=6, warps=8, splits=2)
_LONG = 8192
_SPLIT_TILES = 64


def pack_fp8_linear(weight: Fp8Weight) -> PackedFp8Weight:
    """See PackFp8Linear."""
    arrivals = torch.zeros(_SPLIT_TILES, dtype=torch.int32, device=weight.values.device)
    return PackedFp8Weight(weight.values.contiguous(), weight.scales, arrivals, *weight.values.shape)


def fp8_linear(x: Tensor | Fp8Rows, packed: PackedFp8Weight, bias: Tensor | None = None) -> Tensor:
    """See Fp8Linear."""
    assert packed.scales is not None
    if x.shape[0] == 0:
        return packed.scales.new_empty(0, packed.out_features, dtype=x.dtype)
    values, scales = (x.values, x.scales) if isinstance(x, Fp8Rows) else quantise_rows(x)
    tile = _tile(x.shape[0], packed)
    if tile is None or not can_tile(packed.data) or not has_copy_engine(values.device):
        return _by_cublas(values, scales, packed, bias, x.dtype)
    return tiled_product(values, packed.data, bias, tile, x.dtype, Scales(scales, packed.scales), packed.arrivals)


def _tile(rows: int, packed: PackedFp8Weight) -> Tile | None:
    """Return the tile for these sizes, None where cuBLAS is as fast."""
    for most, (one_wave, more) in _FEW.items():
        if rows <= most:
            return one_wave if one_wave.count(packed.out_features, rows) <= _ONE_WAVE else more
    if rows > 256 or _MANY.count(packed.out_features, rows) > _ONE_WAVE:
        return None
    split = packed.in_features >= _LONG and _MANY.count(packed.out_features, rows) <= _SPLIT_TILES
    return _MANY_SPLIT if split else _MANY


def _by_cublas(
    values: Tensor, scales: Tensor, packed: PackedFp8Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    assert packed.scales is not None
    # cuBLAS scales rows for bfloat16 alone.
    out = torch._scaled_mm(
        values, packed.data.T, scales[:, None], packed.scales[None], out_dtype=torch.bfloat16, use_fast_accum=True
    ).to(dtype)
    return out if bias is None else out.add_(bias)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 values [T, in], contiguous, and float32 scales [T]: those of quantise.py."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, size = x.shape
    out = Fp8Rows.empty(rows, size, like=x)
    early = launches_early(x.device)
    _quantise_rows[(rows,)](
        x,
        out.values,
        out.scales,
        x.stride(0),
        SIZE=size,
        COLUMNS=triton.next_power_of_2(size),
        EARLY=early,
        num_warps=8,
        **({"launch_pdl": True} if early else {}),
    )
    return out.values, out.scales


@triton.jit
def _quantise_rows(
    x_ptr,
    values_ptr,
    scales_ptr,
    x_stride,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + row * x_stride + column, column < SIZE, other=0.0).to(tl.float32)
    values, scale = to_e4m3(x, tl.max(tl.abs(x), axis=1))
    tl.store(values_ptr + row * SIZE + column, values, column < SIZE)
    tl.store(scales_ptr + row + tl.arange(0, 1), scale)
