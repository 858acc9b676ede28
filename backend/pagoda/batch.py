"""A plan as tensors: what one forward pass reads, in the plan's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pagoda_kernels import AttentionBatch

from pagoda.plan import Chunk, Plan
from pagoda.rows import Rows
from pagoda.transfer import upload
from pagoda.wishes import Wishes

SHARED_DECODES = 32
SHARED_TOKENS = 256
"""Decodes, and tokens of their common prefix, from which on it pays to read it once for all."""

_START, _COUNT, _SAMPLES = attrgetter("start"), attrgetter("count"), attrgetter("samples")


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
    outputs: torch.Tensor | None = None
    """[S] int64, the tokens whose hidden states are wanted; None: all."""


class Layout(NamedTuple):
    """The same on the host, before it travels; arrays of int64."""

    token_ids: NDArray[np.int64]
    """[T]; -1 where the token is its request's last sample, known to the device alone. Only decodes have such."""
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    rows: NDArray[np.int64]
    """[R], each request's row in `Rows`."""
    query_lens: NDArray[np.int64]
    """[R], tokens of this step."""
    context_lens: NDArray[np.int64]
    """[R], tokens in the cache, those of this step included."""
    num_decodes: int
    shared_prefix: int
    """Leading tokens that all decodes have in the same blocks; 0 where that is not worth a thought."""
    sample_rows: NDArray[np.int64]
    """[S], the last tokens of the chunks that sample."""
    sampled: NDArray[np.int64]
    """[S], rows in `Rows` of the requests that sample."""
    wishes: Wishes
    """[S], what these requests ask of the sampler."""
    scores_prompts: bool
    """True when a request of the step asks for its prompt's log-probabilities."""

    @property
    def longest(self) -> int:
        """The largest of `context_lens`."""
        return int(self.context_lens.max())


def lay_out(plan: Plan, rows: Rows, block_size: int) -> Layout:
    """Gather a plan's tokens; new blocks of its requests are on their way to the device's tables afterwards."""
    chunks = plan.chunks
    starts = np.fromiter(map(_START, chunks), np.int64, len(chunks))
    counts = np.fromiter(map(_COUNT, chunks), np.int64, len(chunks))
    samples = np.fromiter(map(_SAMPLES, chunks), np.bool_, len(chunks))
    contexts = starts + counts
    places = rows.place(chunks, (contexts + block_size - 1) // block_size)
    num_decodes = _leading((counts == 1) & (starts > 0))
    ends = counts.cumsum()
    owners, positions = places, starts
    if num_decodes < len(chunks):
        owners, positions = places.repeat(counts), np.arange(ends[-1]) + (contexts - ends).repeat(counts)
    index, offset = np.divmod(positions, block_size)
    blocks = rows.host_tables[owners, index].astype(np.int64)
    sampled = places[samples]
    return Layout(
        token_ids=_tokens(chunks, num_decodes),
        positions=positions,
        slots=blocks * block_size + offset,
        rows=places,
        query_lens=counts,
        context_lens=contexts,
        num_decodes=num_decodes,
        shared_prefix=_shared_prefix(rows, places[:num_decodes], starts[:num_decodes], block_size),
        sample_rows=ends[samples] - 1,
        sampled=sampled,
        wishes=rows.wishes.take(sampled),
        scores_prompts=bool(rows.wishes["prompt_logprobs"][places].any()),
    )


def _leading(flags: NDArray[np.bool_]) -> int:
    """How many true values there are before the first false one."""
    first = int(flags.argmin())
    return len(flags) if flags[first] else first


def _tokens(chunks: Sequence[Chunk], num_decodes: int) -> NDArray[np.int64]:
    """[T], see `Layout.token_ids`."""
    tokens = [-1 if c.reads_pending else c.request.token_ids[c.start] for c in chunks[:num_decodes]]
    for chunk in chunks[num_decodes:]:
        tokens += chunk.request.token_ids[chunk.start : chunk.start + chunk.count]
    return np.array(tokens, np.int64)


def _shared_prefix(rows: Rows, places: NDArray[np.int64], starts: NDArray[np.int64], block_size: int) -> int:
    """Tokens in the leading blocks that all decodes have in common, each with a token of its own behind them.

    0 for a few decodes, and for a short prefix.
    """
    if len(places) < SHARED_DECODES:
        return 0
    tokens = block_size * rows.common_blocks(places, int(starts.min()) // block_size)
    return tokens if tokens >= SHARED_TOKENS else 0


def send(layout: Layout, rows: Rows, block_size: int, device: torch.device) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """The layout as a batch, with `sample_rows` and `sampled` on the device; one copy."""
    starts = np.zeros(len(layout.query_lens) + 1, np.int32)
    np.cumsum(layout.query_lens, out=starts[1:])
    contexts = layout.context_lens.astype(np.int32)
    arrays = [layout.token_ids, layout.positions, layout.slots, layout.rows, layout.sample_rows, layout.sampled]
    prefix_len = np.array([layout.shared_prefix], np.int32)
    token_ids, positions, slots, places, sample_rows, sampled, query_starts, context_lens, prefix = upload(
        [*arrays, starts, contexts, prefix_len], device
    )
    decodes = layout.num_decodes
    if (layout.token_ids[:decodes] < 0).any():
        token_ids[:decodes] = read_pending(token_ids[:decodes], places[:decodes], rows)
    width = -(-layout.longest // block_size)
    attention = AttentionBatch(
        block_tables=rows.block_tables[:, :width].index_select(0, places),
        query_starts=query_starts,
        context_lens=context_lens,
        query_lens_host=layout.query_lens.tolist(),
        context_lens_host=layout.context_lens.tolist(),
        num_decodes=decodes,
        shared_prefix=prefix if layout.shared_prefix else None,
        shared_prefix_host=layout.shared_prefix,
    )
    outputs = None if layout.scores_prompts or decodes == len(layout.rows) else sample_rows
    return Batch(token_ids, positions, slots, attention, outputs), sample_rows, sampled


def read_pending(token_ids: torch.Tensor, places: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Token ids [D] with each -1 replaced by the last token of its row."""
    return torch.where(token_ids < 0, rows.last_tokens[places], token_ids)
