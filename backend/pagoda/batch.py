"""A plan as tensors: what one forward pass reads, in the plan's order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pagoda_kernels import AttentionBatch

from pagoda.graph_shapes import SHARED_DECODES, SHARED_TOKENS
from pagoda.plan import Chunk, Plan
from pagoda.rows import Rows
from pagoda.transfer import upload


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of R requests, S of which are sampled. All tensors on the runner's device."""

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64, each token's place in its request."""
    slots: torch.Tensor
    """[T] int64, where the token's key and value go: block * block_size + offset; -1 for padding."""
    attention: AttentionBatch


@dataclass(frozen=True, slots=True)
class Layout:
    """The same on the host, before it travels; int64 arrays."""

    token_ids: NDArray[np.int64]
    """[T]; -1 where the token is its request's last sample, known to the device alone. Only decodes have such."""
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    rows: NDArray[np.int64]
    """[R], each request's row in `Rows`."""
    query_lens: list[int]
    context_lens: list[int]
    num_decodes: int
    shared_prefix: int
    """Leading tokens that all decodes have in the same blocks; 0 where that is not worth a thought."""
    sample_rows: NDArray[np.int64]
    """[S], the last tokens of the chunks that sample."""
    sampled: NDArray[np.int64]
    """[S], rows in `Rows` of the requests that sample."""


def lay_out(plan: Plan, rows: Rows, block_size: int) -> Layout:
    """Gather a plan's tokens; new blocks of its requests are on their way to the device's tables afterwards."""
    chunks = plan.chunks
    places = np.array(rows.place(chunks), np.int64)
    starts = np.array([c.start for c in chunks], np.int64)
    counts = np.array([c.count for c in chunks], np.int64)
    samples = np.array([c.samples for c in chunks], np.bool_)
    continues = (counts == 1) & (starts > 0)
    num_decodes = len(chunks) if continues.all() else int(continues.argmin())
    ends = counts.cumsum()
    tokens = np.empty(int(ends[-1]), np.int64)
    blocks = np.empty_like(tokens)
    tokens[:num_decodes] = [-1 if c.reads_pending else c.request.token_ids[c.start] for c in chunks[:num_decodes]]
    blocks[:num_decodes] = [c.request.block_ids[c.start // block_size] for c in chunks[:num_decodes]]
    for chunk, end in zip(chunks[num_decodes:], ends[num_decodes:].tolist(), strict=True):
        tokens[end - chunk.count : end] = chunk.request.token_ids[chunk.start : chunk.start + chunk.count]
        blocks[end - chunk.count : end] = _blocks(chunk, block_size)
    positions = np.arange(len(tokens)) + np.repeat(starts - (ends - counts), counts)
    return Layout(
        token_ids=tokens,
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        rows=places,
        query_lens=counts.tolist(),
        context_lens=(starts + counts).tolist(),
        num_decodes=num_decodes,
        shared_prefix=block_size * common_blocks(chunks[:num_decodes], block_size),
        sample_rows=ends[samples] - 1,
        sampled=places[samples],
    )


def common_blocks(decodes: list[Chunk], block_size: int) -> int:
    """Leading blocks that all decodes have in common, each with a token of its own behind them; 0 for a few."""
    if len(decodes) < SHARED_DECODES or decodes[0].request.block_ids[0] != decodes[-1].request.block_ids[0]:
        return 0
    shortest = min(decodes, key=lambda chunk: chunk.start)
    common = shortest.request.block_ids[: shortest.start // block_size]
    for chunk in decodes:
        others = chunk.request.block_ids[: len(common)]
        if others != common:
            common = common[: next(i for i, (a, b) in enumerate(zip(common, others, strict=True)) if a != b)]
    return len(common) if len(common) * block_size >= SHARED_TOKENS else 0


def _blocks(chunk: Chunk, block_size: int) -> NDArray[np.int64]:
    """The block of each of a chunk's tokens."""
    first, last = chunk.start // block_size, (chunk.start + chunk.count - 1) // block_size
    blocks = np.array(chunk.request.block_ids[first : last + 1], np.int64)
    skipped = chunk.start - first * block_size
    return blocks.repeat(block_size)[skipped : skipped + chunk.count]


def send(layout: Layout, rows: Rows, block_size: int, device: torch.device) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """The layout as a batch, with `sample_rows` and `sampled` on the device; one copy."""
    starts = np.zeros(len(layout.query_lens) + 1, np.int32)
    np.cumsum(layout.query_lens, out=starts[1:])
    contexts = np.array(layout.context_lens, np.int32)
    arrays = [layout.token_ids, layout.positions, layout.slots, layout.rows, layout.sample_rows, layout.sampled]
    prefix_len = np.array([layout.shared_prefix], np.int32)
    token_ids, positions, slots, places, sample_rows, sampled, query_starts, context_lens, prefix = upload(
        [*arrays, starts, contexts, prefix_len], device
    )
    decodes = layout.num_decodes
    if (layout.token_ids[:decodes] < 0).any():
        token_ids[:decodes] = read_pending(token_ids[:decodes], places[:decodes], rows)
    width = -(-max(layout.context_lens) // block_size)
    attention = AttentionBatch(
        block_tables=rows.block_tables[:, :width].index_select(0, places),
        query_starts=query_starts,
        context_lens=context_lens,
        query_lens_host=layout.query_lens,
        context_lens_host=layout.context_lens,
        num_decodes=decodes,
        shared_prefix=prefix if layout.shared_prefix else None,
        shared_prefix_host=layout.shared_prefix,
    )
    return Batch(token_ids, positions, slots, attention), sample_rows, sampled


def read_pending(token_ids: torch.Tensor, places: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Token ids [D] with each -1 replaced by the last token of its row."""
    return torch.where(token_ids < 0, rows.last_tokens[places], token_ids)
