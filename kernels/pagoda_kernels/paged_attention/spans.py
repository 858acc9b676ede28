"""The spans of a step's prefill chunks, of as many queries as a program takes at a time, listed on the device."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch import AttentionBatch

FIELDS = 8
"""Numbers of a row, of which a span has five."""
POSITIONS = 128
"""Of a tile."""

# Chunks whose lengths, decodes whose contexts, and spans whose rows, a program sees to at a time.
_AT_A_TIME = 128
# Positions, of a cache of 8 bits, that a decode reads on a multiprocessor while 128 rows multiply a tile of as many
# positions as rows on another: on an H100 both take 1.9 µs.
_READ_MEANWHILE = 460
# With more multiprocessors decodes read no faster.
_MOST_FOR_DECODES = 48
# Programs may have one turn of spans more than they must, two, and so on.
_TURNS = 16


def list_spans(
    batch: AttentionBatch, num_tokens: int, queries: int, num_kv_heads: int, processors: int, decodes_itemsize: int
) -> Tensor:
    """Return [1 + most, FIELDS] int32: how many there are, and how many programs are to share them, then a row each.

    A row: the first query's token, the number of queries, the positions before them, the request's context, the chunk.
    A chunk's last come first: they see the most. num_tokens: the rows of q. There is a program for each multiprocessor.
    decodes_itemsize: of the cache that decodes read on the others meanwhile, or 0. With it there are so many programs
    that both kinds will probably be done soonest. A window is not thought of: it shortens what both of them see.
    """
    chunks = batch.num_requests - batch.num_decodes
    spans = torch.empty(1 + num_tokens // queries + chunks, FIELDS, dtype=torch.int32, device=batch.query_starts.device)
    _list_spans[(chunks,)](
        spans,
        batch.query_starts,
        batch.context_lens,
        batch.num_decodes,
        chunks,
        queries,
        batch.num_decodes if decodes_itemsize else 0,
        _READ_MEANWHILE // max(decodes_itemsize, 1),
        num_kv_heads,
        processors,
        FIELDS=FIELDS,
        POSITIONS=POSITIONS,
        AT_A_TIME=_AT_A_TIME,
        MOST_FOR_DECODES=_MOST_FOR_DECODES,
        TURNS=_TURNS,
    )
    return spans


@triton.jit(
    do_not_specialize=[
        "num_decodes", "chunks", "queries", "decodes_beside", "read_meanwhile", "num_kv_heads", "processors"
    ]
)  # fmt: skip
def _list_spans(
    spans_ptr, starts_ptr, contexts_ptr, num_decodes, chunks, queries, decodes_beside, read_meanwhile,
    num_kv_heads, processors,
    FIELDS: tl.constexpr, POSITIONS: tl.constexpr, AT_A_TIME: tl.constexpr, MOST_FOR_DECODES: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    starts_ptr += num_decodes
    count, ahead, tiles = 0, 0, 0
    for first in range(0, chunks, AT_A_TIME):
        other = first + tl.arange(0, AT_A_TIME)
        known = other < chunks
        lengths = tl.load(starts_ptr + other + 1, known, other=0) - tl.load(starts_ptr + other, known, other=0)
        spans = tl.cdiv(lengths, queries)
        count += tl.sum(spans, 0)
        ahead += tl.sum(tl.where(other > chunk, spans, 0), 0)
        seen = tl.load(contexts_ptr + num_decodes + other, known, other=0) - lengths // 2
        tiles += tl.sum(spans * (seen // POSITIONS + 1), 0)
    if chunk == 0:
        tl.store(spans_ptr, count)
        read = 0
        for first in range(0, decodes_beside, AT_A_TIME):
            decode = first + tl.arange(0, AT_A_TIME)
            read += tl.sum(tl.load(contexts_ptr + decode, decode < decodes_beside, other=0), 0)
        # In units of a tile's time. The fewest programs that are done within so many turns leave the others to decodes,
        # which have all when the chunks are done.
        items = count * num_kv_heads
        turns = tl.maximum(tl.cdiv(items, processors), 1) + tl.arange(0, TURNS)
        programs = tl.cdiv(items, turns)
        taken = turns * (tiles * 1.0 / tl.maximum(count, 1))
        reading = read * 1.0 * num_kv_heads / read_meanwhile
        left = tl.maximum(reading - taken * tl.minimum(processors - programs, MOST_FOR_DECODES), 0.0)
        soonest = tl.argmin(1.05 * taken + left / MOST_FOR_DECODES, 0)  # of equals, the one with few turns
        chosen = tl.sum(tl.where(tl.arange(0, TURNS) == soonest, programs, 0), 0)
        tl.store(spans_ptr + 1, tl.where(read == 0, processors, chosen))
    token = tl.load(starts_ptr + chunk)
    length = tl.load(starts_ptr + chunk + 1) - token
    context = tl.load(contexts_ptr + num_decodes + chunk)
    own = tl.cdiv(length, queries)
    for first in range(0, own, AT_A_TIME):
        span = first + tl.arange(0, AT_A_TIME)
        skipped = span * queries
        row_ptr = spans_ptr + (ahead + own - span) * FIELDS
        inside = span < own
        tl.store(row_ptr, token + skipped, inside)
        tl.store(row_ptr + 1, tl.minimum(length - skipped, queries), inside)
        tl.store(row_ptr + 2, context - length + skipped, inside)
        tl.store(row_ptr + 3, context, inside)
        tl.store(row_ptr + 4, chunk, inside)
