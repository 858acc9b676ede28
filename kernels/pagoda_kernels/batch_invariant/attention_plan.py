"""What the batch-invariant attention prepares once per step: which queries are computed together, with which keys.

A request's positions are cut, from its first token on, into tiles of a few neighbours. A tile's place in its request
decides everything about its shape: what else the step holds decides only which tiles are computed, and in which call.
Padding repeats the first slot that its tile reads, which is finite, and is masked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..paged_attention.batch import AttentionBatch

ROWS = 16
"""Query rows of a tile are a multiple of this, so that the scratch memory of every thread is aligned alike."""
KEYS = 64
"""The positions that a tile reads begin and end at multiples of this."""
GROUP_BYTES = 2**22
"""Of keys gathered for one call, unless a single request has more."""


@dataclass(frozen=True)
class Shape:
    """What a plan depends on besides the batch; the same for all layers of most models."""

    block_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    window: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a tile, for one KV head; not all of them are used."""
        return -(-self.group // ROWS) * ROWS

    @property
    def width(self) -> int:
        """Positions of a tile."""
        return self.rows // self.group

    def span(self, tile: int) -> tuple[int, int]:
        """The first position that a tile reads, and how many it reads."""
        start = tile * self.width
        first = max(0, start - self.window + 1) // KEYS * KEYS if self.window else 0
        return first, -(-(start + self.width) // KEYS) * KEYS - first


@dataclass(frozen=True)
class Tile:
    request: int
    index: int
    """It holds the positions from index * width on."""


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles of one span's length: of one request and one span, or each with a span of its own."""

    tiles: slice
    """Their places in the plan."""
    slots: Tensor
    """[S * L] int64, the cache's slots to gather; S is 1 or the number of tiles."""
    mask: Tensor
    """[tiles, 1, rows, L]: 0 or -inf."""


@dataclass(frozen=True, eq=False)
class Plan:
    sources: Tensor
    """[tiles * width] int64: the step's token at each place of each tile; some token where there is none."""
    places: Tensor
    """[T] int64: the place of each token of the step."""
    groups: list[Group]


def make_plan(batch: AttentionBatch, shape: Shape) -> Plan:
    tiles: list[Tile] = []
    groups = []
    for members in _grouped(batch, shape):
        groups.append(_group(batch, members, len(tiles), shape))
        tiles += members
    sources, places = _tokens(batch, tiles, shape.width)
    return Plan(sources, places, groups)


def _grouped(batch: AttentionBatch, shape: Shape) -> Iterator[list[Tile]]:
    """All tiles of the step, in lists that share a call."""
    alone: dict[int, list[Tile]] = defaultdict(list)
    for request, (count, context) in enumerate(zip(batch.query_lens_host, batch.context_lens_host, strict=True)):
        spans: dict[tuple[int, int], list[Tile]] = defaultdict(list)
        for index in range((context - count) // shape.width, (context - 1) // shape.width + 1):
            spans[shape.span(index)].append(Tile(request, index))
        for (_, length), tiles in spans.items():
            if len(tiles) > 1:
                yield tiles
            else:
                alone[length] += tiles
    row_bytes = shape.num_kv_heads * shape.head_size * shape.dtype.itemsize
    for length, tiles in alone.items():
        most = max(1, GROUP_BYTES // (length * row_bytes))
        yield from (tiles[i : i + most] for i in range(0, len(tiles), most))


def _group(batch: AttentionBatch, members: list[Tile], start: int, shape: Shape) -> Group:
    spans = [shape.span(tile.index) for tile in members]
    length = spans[0][1]
    positions = torch.tensor([first for first, _ in spans]).unsqueeze(1) + torch.arange(length)  # [tiles, L]
    of_rows = (torch.arange(shape.rows) // shape.group).clamp(max=shape.width - 1)
    own = torch.tensor([tile.index * shape.width for tile in members]).unsqueeze(1) + of_rows  # [tiles, rows]
    own, other = own.unsqueeze(2), positions.unsqueeze(1)
    hidden = other > own
    if shape.window:
        hidden |= other <= own - shape.window
    mask = torch.zeros(hidden.shape, dtype=shape.dtype).masked_fill_(hidden, float("-inf"))
    read = 1 if len({tile.request for tile in members}) == 1 else len(members)
    slots = _slots(batch, [tile.request for tile in members[:read]], positions[:read], shape.block_size)
    return Group(slice(start, start + len(members)), slots, mask.unsqueeze(1))


def _slots(batch: AttentionBatch, requests: list[int], positions: Tensor, block_size: int) -> Tensor:
    """The slots of positions [S, L] of S requests, flat; those past a request's context repeat the first."""
    contexts = torch.tensor([batch.context_lens_host[request] for request in requests]).unsqueeze(1)
    positions = torch.where(positions < contexts, positions, positions[:, :1])
    blocks = batch.block_tables[requests].long().gather(1, positions // block_size)
    return (blocks * block_size + positions % block_size).flatten()


def _tokens(batch: AttentionBatch, tiles: list[Tile], width: int) -> tuple[Tensor, Tensor]:
    """`Plan.sources` and `Plan.places`."""
    begins = dict(zip(tiles, range(0, len(tiles) * width, width), strict=True))
    places: list[int] = []
    for request, (count, context) in enumerate(zip(batch.query_lens_host, batch.context_lens_host, strict=True)):
        places += [begins[Tile(request, p // width)] + p % width for p in range(context - count, context)]
    where = torch.tensor(places)
    sources = torch.zeros(len(tiles) * width, dtype=torch.int64)
    sources[where] = torch.arange(len(where))
    return sources, where
