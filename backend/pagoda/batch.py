"""A plan as tensors: what one forward pass reads, in the plan's order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pagoda_kernels import AttentionBatch

from pagoda.scheduler import Chunk, Plan


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of R requests, S of which are sampled. All tensors on the runner's device."""

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64, each token's place in its request."""
    slots: torch.Tensor
    """[T] int64, where the token's key and value go: block * block_size + offset."""
    attention: AttentionBatch
    sample_rows: torch.Tensor
    """[S] int64, rows of the last tokens of the requests that are sampled."""


def build(plan: Plan, *, block_size: int, device: torch.device) -> Batch:
    """Lay out a plan whose tokens are all known on the host."""
    chunks = plan.chunks
    return Batch(
        token_ids=_tensor([t for c in chunks for t in c.request.token_ids[c.start : c.start + c.count]], device),
        positions=_tensor([p for c in chunks for p in range(c.start, c.start + c.count)], device),
        slots=_tensor([s for c in chunks for s in _slots(c, block_size)], device),
        attention=_attention(plan, block_size, device),
        sample_rows=_tensor(_sample_rows(chunks), device),
    )


def _tensor(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _slots(chunk: Chunk, block_size: int) -> list[int]:
    blocks = chunk.request.block_ids
    return [
        blocks[position // block_size] * block_size + position % block_size
        for position in range(chunk.start, chunk.start + chunk.count)
    ]


def _sample_rows(chunks: list[Chunk]) -> list[int]:
    rows, end = [], 0
    for chunk in chunks:
        end += chunk.count
        if chunk.samples:
            rows.append(end - 1)
    return rows


def _attention(plan: Plan, block_size: int, device: torch.device) -> AttentionBatch:
    chunks = plan.chunks
    query_lens = [c.count for c in chunks]
    context_lens = [c.start + c.count for c in chunks]
    tables = [c.request.block_ids[: -(-n // block_size)] for c, n in zip(chunks, context_lens, strict=True)]
    width = max(len(table) for table in tables)
    starts = [0]
    for length in query_lens:
        starts.append(starts[-1] + length)
    return AttentionBatch(
        block_tables=torch.tensor([t + [-1] * (width - len(t)) for t in tables], dtype=torch.int32, device=device),
        query_starts=_tensor(starts, device, torch.int32),
        context_lens=_tensor(context_lens, device, torch.int32),
        query_lens_host=query_lens,
        context_lens_host=context_lens,
        num_decodes=plan.num_decodes,
    )
