"""sample in the Triton language: the logits are read once where they can be, and the vocabulary is not sorted.

1. `tiles`, many programs a row: the largest logit of each tile of the vocabulary and its id, the tile's softmax sum
   relative to that, and the largest logit of each group of 32 neighbours.
2. `pick`, a program a row. Greedy rows and rows without filters need only the tiles (and one of them again, for the
   draw). With filters, let f be the lowest number that at most 256 group maxima reach: all logits from f up lie in
   these groups, which are gathered, and the thresholds of top_k, top_p and min_p are found among their logits by
   bisection. That settles nearly all rows.
3. `narrow`, many programs a row, for a top_p that keeps more tokens than that.
4. `search`, a program a row, for the other rows that are not settled.

Who has nothing left to do ends at once: the host does not know which rows are settled. Everything runs in a fixed
order, so the same (seed, position, logits, parameters) give the same token in any batch.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .batch import SamplingBatch
from .levels import GROUP, TILE
from .narrow import collect_kernel, count_kernel, finish_kernel, locate_kernel
from .pick import pick_kernel
from .search import search_kernel
from .tiles import largest_kernel, tiles_kernel

# Groups of a tile.
_TILE_GROUPS = TILE // GROUP
# Groups that `pick` looks into.
_PICKED = 256
# Bins that `narrow` counts logits in, the logits of a row that it may keep for the end, and the tiles of a program: a
# single one, unless so many rows fill the chip anyway; there, a program for each tile of settled rows would cost its
# start.
_BINS = 128
_SLOTS = 4096
_SEGMENT, _MANY_ROWS = 4, 16
# Thresholds that `search` tries in a pass.
_SEARCH_WAYS = 8


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """See Sample."""
    requests, vocabulary = logits.shape
    out = torch.empty(requests, dtype=torch.int64, device=logits.device)
    if requests == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tiles = _launch_tiles(logits, params)
    sizes = {"VOCABULARY": vocabulary, "NUM_TILES": tiles.count, "TILES_PADDED": triton.next_power_of_2(tiles.count)}
    if params.all_greedy:
        largest_kernel[(requests,)](
            tiles.largest, tiles.ids, out, vocabulary,
            NUM_TILES=tiles.count, PADDED=sizes["TILES_PADDED"], num_warps=1,
        )  # fmt: skip
        return out
    rows = _Rows(requests, logits.device, _filtered(params))
    _launch_pick(logits, params, tiles, rows, out, sizes)
    if params.any_top_p:
        _launch_narrow(logits, params, rows, out, sizes)
    if rows.filtered:
        search_kernel[(requests,)](
            logits,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seeds,
            params.positions,
            tiles.largest,
            tiles.sums,
            rows.state,
            out,
            logits.stride(0),
            GROUP=GROUP,
            TILE=min(TILE, max(GROUP, triton.next_power_of_2(vocabulary))),
            WAYS=_SEARCH_WAYS,
            **sizes,
            num_warps=16,
        )
    return out


def _filtered(params: SamplingBatch) -> bool:
    return params.any_top_k or params.any_top_p or params.any_min_p


class _Tiles:
    """What the first pass leaves: [R, tiles] each, and the groups' maxima if there are filters."""

    def __init__(self, logits: Tensor, filtered: bool) -> None:
        requests, vocabulary = logits.shape
        self.count = triton.cdiv(vocabulary, TILE)
        self.largest, self.sums = torch.empty(2, requests, self.count, dtype=torch.float32, device=logits.device)
        self.minima = torch.empty_like(self.largest) if filtered else self.largest
        self.ids = torch.empty(requests, self.count, dtype=torch.int32, device=logits.device)
        self.group_max = self.largest
        if filtered:
            groups = self.count * _TILE_GROUPS
            self.group_max = torch.empty(requests, groups, dtype=torch.float32, device=logits.device)


class _Rows:
    """How far each row has come, and what `pick` knows of one that it could not settle. Read only with filters."""

    def __init__(self, requests: int, device: torch.device, filtered: bool) -> None:
        self.filtered = filtered
        size = requests if filtered else 0
        self.state = torch.empty(size, dtype=torch.int32, device=device)
        self.picked = torch.empty(size, _PICKED, dtype=torch.int32, device=device)
        self.largest = torch.empty(size, dtype=torch.float32, device=device)
        self.target = torch.empty(size, dtype=torch.float64, device=device)
        self.found = torch.empty(size, dtype=torch.float64, device=device)
        self.bracket = torch.empty(size, 2, dtype=torch.int32, device=device)


def _launch_tiles(logits: Tensor, params: SamplingBatch) -> _Tiles:
    filtered = _filtered(params) and not params.all_greedy
    tiles = _Tiles(logits, filtered)
    tiles_kernel[(logits.shape[0], tiles.count)](
        logits,
        params.temperature,
        tiles.largest,
        tiles.ids,
        tiles.sums,
        tiles.minima,
        tiles.group_max,
        logits.stride(0),
        VOCABULARY=logits.shape[1],
        GROUP=GROUP,
        GROUPS=_TILE_GROUPS,
        NUM_TILES=tiles.count,
        GREEDY=params.all_greedy,
        FILTERED=filtered,
        num_warps=4,
    )
    return tiles


def _launch_pick(
    logits: Tensor, params: SamplingBatch, tiles: _Tiles, rows: _Rows, out: Tensor, sizes: dict[str, Any]
) -> None:
    groups = tiles.count * _TILE_GROUPS
    pick_kernel[(len(out),)](
        logits,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.seeds,
        params.positions,
        tiles.largest,
        tiles.ids,
        tiles.sums,
        tiles.minima,
        tiles.group_max,
        rows.picked,
        rows.state,
        rows.largest,
        rows.target,
        rows.found,
        rows.bracket,
        out,
        logits.stride(0),
        GROUP=GROUP,
        TILE=TILE,
        NUM_GROUPS=groups,
        GROUPS_PADDED=triton.next_power_of_2(groups),
        PICKED=_PICKED,
        FILTERED=rows.filtered,
        **sizes,
        num_warps=8,
    )


def _launch_narrow(logits: Tensor, params: SamplingBatch, rows: _Rows, out: Tensor, sizes: dict[str, Any]) -> None:
    requests, tiles = len(out), sizes["NUM_TILES"]
    segment = _SEGMENT if requests >= _MANY_ROWS else 1
    segments = triton.cdiv(tiles, segment)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(requests, *shape, dtype=dtype, device=logits.device)

    counts, filled = scratch(segments, _BINS, dtype=torch.int32), scratch(dtype=torch.int32)
    bracket, above = scratch(2, dtype=torch.int32), scratch(tiles)
    candidates, owners = scratch(_SLOTS), scratch(_SLOTS, dtype=torch.int32)
    sizes = {**sizes, "TILE": TILE}
    segmented = {**sizes, "SEGMENT": segment}
    stride = logits.stride(0)
    count_kernel[(requests, segments)](
        logits,
        rows.state,
        rows.bracket,
        counts,
        stride,
        BINS=_BINS,
        SEGMENTS=segments,
        **segmented,
        num_warps=4,
    )
    locate_kernel[(requests,)](
        params.temperature,
        rows.state,
        rows.largest,
        rows.target,
        rows.found,
        rows.bracket,
        counts,
        bracket,
        filled,
        BINS=_BINS,
        SEGMENTS=segments,
        SEGMENTS_PADDED=triton.next_power_of_2(segments),
        num_warps=1,
    )
    collect_kernel[(requests, segments)](
        logits,
        params.temperature,
        rows.state,
        rows.largest,
        bracket,
        above,
        candidates,
        owners,
        filled,
        stride,
        SLOTS=_SLOTS,
        **segmented,
        num_warps=8,
    )
    finish_kernel[(requests,)](
        logits,
        params.temperature,
        params.seeds,
        params.positions,
        rows.state,
        rows.largest,
        rows.target,
        rows.bracket,
        bracket,
        above,
        candidates,
        owners,
        filled,
        out,
        stride,
        GROUP=GROUP,
        SLOTS=_SLOTS,
        **sizes,
        num_warps=8,
    )
