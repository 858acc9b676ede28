"""What is known of each running request, in a row of its own.

On the device its last sampled token and its block table: so a step that is launched before the last one's samples are
read finds its tokens there, and of the tables only new blocks travel. On the host the same table, and what the request
asks of the sampler: so a step is laid out by gathering rows, without a look into each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray

from pagoda import wishes
from pagoda.plan import Chunk
from pagoda.request import Request, Status
from pagoda.transfer import upload

COMPARED = 64
"""Blocks of each request that are compared at a time."""
_EPOCH = attrgetter("epoch")


class Rows:
    """Rows 0…max_num_seqs - 1 belong to requests; row `spare` to nobody: padding may read and write it."""

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.spare = max_num_seqs
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        """[rows, max_blocks]. Beyond a request's own blocks, whatever was there before."""
        self.host_tables = np.zeros((max_num_seqs + 1, max_blocks), np.int32)
        """The same on the host."""
        self.wishes = np.zeros(max_num_seqs + 1, wishes.DTYPE)
        """[rows]."""
        self._device = device
        self._row_of: dict[Request, int] = {}
        self._free = list(range(max_num_seqs))
        self._epochs = np.full(max_num_seqs + 1, -1)
        self._num_blocks = np.zeros(max_num_seqs + 1, np.int64)
        """Leading blocks of each row that the tables know."""
        self._compared = np.zeros(0, np.int64)
        """The rows that `common_blocks` was last asked for."""
        self._num_common = 0

    def place(self, chunks: Sequence[Chunk], num_blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Each chunk's row, [R]; chunk r's step needs the first num_blocks[r] blocks of its request in the tables.

        Blocks that the device lacks are on their way afterwards. A request keeps its row while it runs; within an epoch
        its blocks only grow. Raises RuntimeError when more requests run than there are rows.
        """
        rows = np.array([self._row_of.get(chunk.request, self.spare) for chunk in chunks], np.int64)
        epochs = np.fromiter(map(_EPOCH, chunks), np.int64, len(chunks))
        for i in (self._epochs[rows] != epochs).nonzero()[0].tolist():
            rows[i] = self._enter(chunks[i])
        short = (self._num_blocks[rows] < num_blocks).nonzero()[0]
        if len(short):
            self._extend([chunks[i].request for i in short.tolist()], rows[short])
        return rows

    def common_blocks(self, rows: NDArray[np.int64], most: int) -> int:
        """How many of their first `most` blocks the requests in rows [D] have in common, or fewer.

        While the rows stay the same, what they had in common is not looked for again: their tables only grow.
        """
        if not np.array_equal(rows, self._compared):
            self._compared, self._num_common = rows.copy(), self._count_common(rows, most)
        return min(self._num_common, most)

    def _count_common(self, rows: NDArray[np.int64], most: int) -> int:
        heads = self.host_tables[rows, 0]
        if (heads != heads[0]).any():
            return 0
        for first in range(0, most, COMPARED):
            blocks = self.host_tables[rows, first : min(first + COMPARED, most)]
            differs = (blocks != blocks[0]).any(axis=0)
            if differs.any():
                return first + int(differs.argmax())
        return most

    def remember(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep sampled tokens [S] as the last ones of rows [S], int64 both."""
        self.last_tokens.index_copy_(0, rows, tokens)

    def _enter(self, chunk: Chunk) -> int:
        row = self._row_of.get(chunk.request)
        if row is None:
            if not self._free:
                self._leave_ended()
            row = self._row_of[chunk.request] = self._free.pop()
            self.wishes[row] = wishes.record(chunk.request)
        self._epochs[row] = chunk.epoch
        self._num_blocks[row] = 0
        self._compared = np.zeros(0, np.int64)
        return row

    def _leave_ended(self) -> None:
        """Rows are taken back late: only when one is wanted is every request looked at."""
        for request in [r for r in self._row_of if r.status is not Status.RUNNING]:
            row = self._row_of.pop(request)
            self._epochs[row] = -1
            self._free.append(row)
        if not self._free:
            raise RuntimeError(f"more than {self.spare} requests run at once")

    def _extend(self, requests: Sequence[Request], rows: NDArray[np.int64]) -> None:
        """Bring the tables of requests [N] up to date in their rows, here and on the device."""
        cells: list[int] = []
        blocks: list[int] = []
        known = self._num_blocks[rows]
        firsts = rows * self.host_tables.shape[1] + known
        for request, count, first in zip(requests, known.tolist(), firsts.tolist(), strict=True):
            new = request.block_ids[count:]
            cells += range(first, first + len(new))
            blocks += new
        self._num_blocks[rows] = [len(request.block_ids) for request in requests]
        places, values = np.array(cells, np.int64), np.array(blocks, np.int32)
        self.host_tables.reshape(-1)[places] = values
        where, what = upload([places, values], self._device)
        self.block_tables.view(-1).index_copy_(0, where, what)
