"""The spans of a step's prefill chunks, of as many queries as a program takes at a time, listed on the device."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch import AttentionBatch

FIELDS = 8
"""Numbers of a row, of which a span has five."""

# Chunks whose lengths, and spans whose rows, a program sees to at a time.
_AT_A_TIME = 128


def list_spans(batch: AttentionBatch, num_tokens: int, queries: int) -> Tensor:
    """Return [1 + most, FIELDS] int32: how many there are, then a row each, a chunk's last first: they see the most.

    A row: the first query's token, the number of queries, the positions before them, the request's context, the chunk.
    num_tokens: the rows of q.
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
        FIELDS=FIELDS,
        AT_A_TIME=_AT_A_TIME,
    )
    return spans


@triton.jit(do_not_specialize=["num_decodes", "chunks", "queries"])
def _list_spans(
    spans_ptr, starts_ptr, contexts_ptr, num_decodes, chunks, queries, FIELDS: tl.constexpr, AT_A_TIME: tl.constexpr
):  # fmt: skip
    chunk = tl.program_id(0)
    starts_ptr += num_decodes
    count, ahead = 0, 0
    for first in range(0, chunks, AT_A_TIME):
        other = first + tl.arange(0, AT_A_TIME)
        known = other < chunks
        lengths = tl.load(starts_ptr + other + 1, known, other=0) - tl.load(starts_ptr + other, known, other=0)
        spans = tl.cdiv(lengths, queries)
        count += tl.sum(spans, 0)
        ahead += tl.sum(tl.where(other > chunk, spans, 0), 0)
    if chunk == 0:
        tl.store(spans_ptr, count)
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
