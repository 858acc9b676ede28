"""What the device remembers of each running request: its last sampled token and its block table, in a row of its own.

So a step that is launched before the last one's samples are read finds its tokens on the device, and of the block
tables only new blocks travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagoda.plan import Chunk
from pagoda.request import Request, Status
from pagoda.transfer import upload


@dataclass(slots=True)
class _Place:
    row: int
    epoch: int
    num_blocks: int = 0
    """Leading blocks that the device's table knows."""


class Rows:
    """Rows 0…max_num_seqs - 1 belong to requests; row `spare` to nobody: padding may read and write it."""

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.spare = max_num_seqs
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        """[rows, max_blocks]. Beyond a request's own blocks, whatever was there before."""
        self._device = device
        self._places: dict[Request, _Place] = {}
        self._free = list(range(max_num_seqs))

    def place(self, chunks: Sequence[Chunk]) -> list[int]:
        """Each chunk's row, its blocks sent on their way.

        A request keeps its row while it runs; within an epoch its blocks only grow. Raises RuntimeError when more
        requests run than there are rows.
        """
        rows: list[int] = []
        cells: list[int] = []
        blocks: list[int] = []
        width = self.block_tables.shape[1]
        for chunk in chunks:
            request = chunk.request
            place = self._places.get(request)
            if place is None or place.epoch != chunk.epoch:
                place = self._enter(request, chunk.epoch)
            rows.append(place.row)
            if place.num_blocks < len(request.block_ids):
                new = request.block_ids[place.num_blocks :]
                first = place.row * width + place.num_blocks
                cells += range(first, first + len(new))
                blocks += new
                place.num_blocks = len(request.block_ids)
        if blocks:
            where, what = upload([np.array(cells, np.int64), np.array(blocks, np.int32)], self._device)
            self.block_tables.view(-1).index_copy_(0, where, what)
        return rows

    def remember(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep sampled tokens [S] as the last ones of rows [S], int64 both."""
        self.last_tokens.index_copy_(0, rows, tokens)

    def _enter(self, request: Request, epoch: int) -> _Place:
        known = self._places.get(request)
        if known is None and not self._free:
            self._leave_ended()
        place = _Place(self._free.pop() if known is None else known.row, epoch)
        self._places[request] = place
        return place

    def _leave_ended(self) -> None:
        """Rows are taken back late: only when one is wanted is every request looked at."""
        for request in [r for r in self._places if r.status is not Status.RUNNING]:
            self._free.append(self._places.pop(request).row)
        if not self._free:
            raise RuntimeError(f"more than {self.spare} requests run at once")
