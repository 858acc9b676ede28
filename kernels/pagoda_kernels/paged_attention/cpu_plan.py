"""What the CPU attention prepares once per step: for each request, which cache slots to read, and what to mask.

Padding never reads a foreign slot. It repeats the first slot of its own request, which is finite, so a weight of zero
is enough to hide it, and NaN in unused cache memory is never touched.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .batch import AttentionBatch
from .reference import visible_positions

# Requests of a group share their matrix products. Their gathered keys should stay in the L2 caches between the gather
# and the product. Both bounds were measured on two cores with 1 MiB of L2 each.
GROUP_KEY_BYTES = 2**21
GROUP_REQUESTS = 32

# One product over all KV heads, with block-diagonal queries, wastes Hkv - 1 of Hkv operations, and still beats
# separate products, each too thin for the matrix library, while Hkv is small.
DIAGONAL_KV_HEADS = 8


@dataclass(frozen=True)
class Shape:
    """What a plan depends on besides the batch; the same for all layers of most models."""

    block_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    window: int


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """G requests of similar length, padded to L positions."""

    rows: slice
    """Their rows in DecodePlan.order."""
    slots: Tensor
    """[G * L] int64: the slots to gather keys from."""
    mask: Tensor | None
    """[G, 1, L]: 0 or, for padding, -inf; None if all have length L."""
    keys: Tensor
    """[G * L, Hkv * D] scratch, shared by all groups."""
    scores: Tensor
    """[G, Hq, L] scratch, shared by all groups."""
    value_rows: Tensor
    """[G * Hq * L] int32: the row of the cache, seen as [num_slots * Hkv, D], that each score belongs to."""
    bags: Tensor
    """[G * Hq] int32: where the rows of each request and head begin."""


@dataclass(frozen=True, eq=False)
class DecodePlan:
    order: Tensor
    """[B] int64: the decodes sorted by length."""
    groups: list[DecodeGroup]
    diagonal: Tensor | None
    """[B, Hq, Hkv * D] scratch for each query in the columns of its KV head, zeros elsewhere; None: too many heads."""


@dataclass(frozen=True, eq=False)
class PrefillChunk:
    rows: slice
    """Its query tokens."""
    slots: Tensor
    """[C] int64: the slots its queries attend to."""
    mask: Tensor | None
    """[n, C]: 0 or -inf; None if the chunk begins its request, so that a plain causal mask will do."""


@dataclass(frozen=True, eq=False)
class Plan:
    decode: DecodePlan | None
    chunks: list[PrefillChunk]


def make_plan(batch: AttentionBatch, shape: Shape) -> Plan:
    decode = _plan_decodes(batch, shape) if batch.num_decodes else None
    return Plan(decode, list(_plan_chunks(batch, shape)))


def _plan_decodes(batch: AttentionBatch, shape: Shape) -> DecodePlan:
    contexts = batch.context_lens_host[: batch.num_decodes]
    lens = [min(c, shape.window) for c in contexts] if shape.window else contexts
    order = sorted(range(len(lens)), key=lens.__getitem__)
    spans = list(_group(lens, order, shape))
    widths = [lens[order[span.stop - 1]] for span in spans]
    sizes = [(span.stop - span.start) * width for span, width in zip(spans, widths, strict=True)]

    keys = torch.empty(max(sizes), shape.num_kv_heads * shape.head_size, dtype=shape.dtype)
    scores = torch.empty(max(sizes) * shape.num_heads, dtype=shape.dtype)
    groups = []
    for span, width, size in zip(spans, widths, sizes, strict=True):
        requests = order[span]
        slots, mask = _padded_slots(batch, requests, [lens[r] for r in requests], width, shape)
        num_scores = size * shape.num_heads
        group_scores = scores[:num_scores].view(len(requests), shape.num_heads, width)
        bags = torch.arange(0, num_scores, width, dtype=torch.int32)
        rows = _value_rows(slots.view(len(requests), width), shape)
        groups.append(DecodeGroup(span, slots, mask, keys[:size], group_scores, rows, bags))
    diagonal = None
    if shape.num_kv_heads <= DIAGONAL_KV_HEADS:
        diagonal = torch.zeros(len(order), shape.num_heads, keys.shape[1], dtype=shape.dtype)
    return DecodePlan(torch.tensor(order), groups, diagonal)


def _group(lens: list[int], order: list[int], shape: Shape) -> Iterator[slice]:
    """Cut the sorted order into groups whose padded keys fit the budget."""
    row_bytes = shape.num_kv_heads * shape.head_size * shape.dtype.itemsize
    start = 0
    for stop in range(1, len(order)):
        grown = (stop - start + 1) * lens[order[stop]] * row_bytes
        if grown > GROUP_KEY_BYTES or stop - start == GROUP_REQUESTS:
            yield slice(start, stop)
            start = stop
    yield slice(start, len(order))


def _padded_slots(
    batch: AttentionBatch, requests: list[int], lens: list[int], width: int, shape: Shape
) -> tuple[Tensor, Tensor | None]:
    """Return the slots [G * L] of the last `lens` positions of each request, and the mask [G, 1, L] of the padding."""
    offsets, length = torch.arange(width), torch.tensor(lens).unsqueeze(1)
    first = batch.context_lens[requests].unsqueeze(1) - length
    padding = offsets >= length
    slots = _slots(batch.block_tables[requests], first + offsets.masked_fill(padding, 0), shape.block_size)
    if lens[0] == width:
        return slots.flatten(), None
    mask = torch.zeros(padding.shape, dtype=shape.dtype).masked_fill_(padding, float("-inf"))
    return slots.flatten(), mask.unsqueeze(1)


def _value_rows(slots: Tensor, shape: Shape) -> Tensor:
    """Return the value row of each score, flat from [G, Hq, L], for slots [G, L]."""
    heads = torch.arange(shape.num_heads, dtype=torch.int32)
    kv_heads = heads // (shape.num_heads // shape.num_kv_heads)
    # int32 halves the traffic; its range is 2**31 rows, which is more than 512 GB of float32 values of head size 64.
    return (slots.int().unsqueeze(1) * shape.num_kv_heads + kv_heads.view(1, -1, 1)).flatten()


def _plan_chunks(batch: AttentionBatch, shape: Shape) -> Iterator[PrefillChunk]:
    ends = list(accumulate(batch.query_lens_host))
    for request in range(batch.num_decodes, batch.num_requests):
        query_len, context_len = batch.query_lens_host[request], batch.context_lens_host[request]
        window = shape.window
        first = max(0, context_len - query_len - window + 1) if window else 0
        slots = _slots(batch.block_tables[request], torch.arange(first, context_len), shape.block_size)
        mask = None
        if query_len < context_len or window:
            visible = visible_positions(query_len, context_len - first, window, slots.device)
            mask = torch.zeros(visible.shape, dtype=shape.dtype).masked_fill_(~visible, float("-inf"))
        yield PrefillChunk(slice(ends[request] - query_len, ends[request]), slots, mask)


def _slots(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return the slots of positions, int64, for tables [..., max_blocks] and positions [..., L] of the same rank."""
    blocks = block_tables.long().gather(-1, positions // block_size)
    return blocks * block_size + positions % block_size
