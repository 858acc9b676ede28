"""Matrix products whose rows keep their bits: every product has one of a few row counts, proved to agree."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..linear import PackedWeight
from ..linear import cpu as plain
from .rows import silu_mul

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Tiles that are tried. Small ones spare a lone request, large ones a prefill."""
BASE = 16
"""The tile that the others must agree with."""
PASS_ROWS = 16
"""Rows of padding that cost about as much as another pass over the weight, while that comes from memory."""
_ALIGNMENT = 64


class Products:
    """The products of one model. Remembers, by the weight's shape, which tiles agree with one another.

    Two row counts agree when a row has the same bits in both, wherever it stands and whatever the other rows hold. The
    order of a sum depends on shapes and not on values, so one product of random rows tells for all of a shape. A tile
    of one row agrees with itself alone by definition: it is what remains when nothing else does.
    """

    def __init__(self) -> None:
        self._tiles: dict[tuple[int, int, torch.dtype, bool], tuple[int, ...]] = {}

    def pack_linear(self, weight: Tensor) -> PackedWeight:
        """See PackLinear. Tries the tiles for the first weight of its shape: a few hundred rows are multiplied."""
        packed = plain.pack_linear(weight)
        self.tiles(packed, weight.dtype)
        return packed

    def linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """See Linear. A row's bits depend on that row, the weight and the bias alone."""
        x, done = x.contiguous(), 0
        products = []
        for rows in cover(len(x), self.tiles(packed, x.dtype)):
            products.append(_product(x[done : done + rows], rows, packed))
            done += rows
        if not products:
            return x.new_empty(0, packed.out_features)
        product = products[0] if len(products) == 1 else torch.cat(products)
        return product if bias is None else product.add_(bias)

    def silu_linear(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """See SiluLinear. A row's bits depend on that row, the weight and the bias alone."""
        return silu_mul(self.linear(x, packed, bias))

    def grouped_linear(self, x: Tensor, weight: Tensor, expert_starts: Tensor) -> Tensor:
        """See GroupedLinear. A row's bits depend on that row and its expert's weight alone."""
        out = x.new_empty(len(x), weight.shape[1])
        for expert, (start, end) in enumerate(pairwise(expert_starts.tolist())):
            if end > start:
                out[start:end] = self.linear(x[start:end], PackedWeight(weight[expert], *weight.shape[1:]))
        return out

    def tiles(self, packed: PackedWeight, dtype: torch.dtype) -> tuple[int, ...]:
        """The row counts that are used for a weight, ascending."""
        key = (packed.out_features, packed.in_features, dtype, packed.data.is_mkldnn)
        if key not in self._tiles:
            self._tiles[key] = agreeing(packed, dtype)
        return self._tiles[key]


def agreeing(packed: PackedWeight, dtype: torch.dtype) -> tuple[int, ...]:
    """The row counts that give the same bits as tiles of BASE rows do; (1,) when these disagree among themselves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROW_COUNTS[-1] + BASE, packed.in_features, generator=generator).to(dtype)
    expected = torch.cat([_product(x[i : i + BASE], BASE, packed) for i in range(0, len(x), BASE)])
    shift = BASE // 2 - 1  # so that each row stands elsewhere than in `expected`, with other neighbours
    same = [
        rows
        for rows in ROW_COUNTS
        if torch.equal(_product(x[shift : shift + rows], rows, packed), expected[shift : shift + rows])
    ]
    return tuple(same) if BASE in same else (1,)


def cover(count: int, tiles: Sequence[int]) -> Iterator[int]:
    """Cut `count` rows into tiles, given in ascending order; the last one may hold more rows than are left."""
    while count > 0:
        holding = next((tile for tile in tiles if tile >= count), None)
        if holding is None or holding - count > PASS_ROWS:
            holding = max((tile for tile in tiles if tile <= count), default=holding)
        assert holding is not None
        yield holding
        count -= holding


def _product(x: Tensor, rows: int, packed: PackedWeight) -> Tensor:
    """The product of x [n, in], n <= rows, as one of `rows` rows: [n, out]."""
    count = len(x)
    if count < rows:
        x = pad(x, (0, 0, 0, rows - count))
    elif x.data_ptr() % _ALIGNMENT:  # some libraries choose their order by it
        x = x.clone()
    return plain.linear(x, packed)[:count]
