"""Shared cases of paged_attention: batches over a cache whose unused slots hold NaN and whose blocks are shuffled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import AttentionBatch


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    scale: float


@dataclass(frozen=True)
class Case:
    """Requests are (query length, context length); decodes come first."""

    name: str
    requests: tuple[tuple[int, int], ...]
    num_decodes: int
    num_heads: int = 9
    num_kv_heads: int = 3
    head_size: int = 64
    block_size: int = 16
    sliding_window: int | None = None
    softcap: float | None = None

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        batch = make_batch(self.requests, self.num_decodes, self.block_size, generator, device)
        num_blocks = int(batch.block_tables.max()) + 2
        shape = (num_blocks, self.block_size, self.num_kv_heads, self.head_size)
        written = _written_slots(batch, self.block_size)
        k_cache, v_cache = (_poisoned_cache(shape, written, generator).to(device, dtype) for _ in range(2))
        q = torch.randn(batch.num_tokens, self.num_heads, self.head_size, generator=generator).to(device, dtype)
        return Inputs(q, k_cache, v_cache, batch, self.head_size**-0.5)


def make_batch(
    requests: tuple[tuple[int, int], ...],
    num_decodes: int,
    block_size: int,
    generator: torch.Generator,
    device: str = "cpu",
) -> AttentionBatch:
    """Return a batch with random block ids, in which block 0 belongs to nobody."""
    query_lens, context_lens = [n for n, _ in requests], [c for _, c in requests]
    needed = [-(-c // block_size) for c in context_lens]
    ids = torch.randperm(sum(needed) + len(needed), generator=generator).int() + 1
    tables = torch.full((len(requests), max(needed) + 1), -1, dtype=torch.int32)
    for row, own in zip(tables, torch.split(ids[: sum(needed)], needed), strict=True):
        row[: len(own)] = own
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    contexts = torch.tensor(context_lens, dtype=torch.int32)
    return AttentionBatch(
        tables.to(device), starts.to(device), contexts.to(device), query_lens, context_lens, num_decodes
    )


def _written_slots(batch: AttentionBatch, block_size: int) -> Tensor:
    rows = []
    for table, context_len in zip(batch.block_tables.cpu().long(), batch.context_lens_host, strict=True):
        positions = torch.arange(context_len)
        rows.append(table[positions // block_size] * block_size + positions % block_size)
    return torch.cat(rows)


def _poisoned_cache(shape: tuple[int, int, int, int], written: Tensor, generator: torch.Generator) -> Tensor:
    cache = torch.full(shape, float("nan"))
    cache.flatten(0, 1)[written] = torch.randn(len(written), *shape[2:], generator=generator)
    return cache


_MIXED = ((1, 33), (1, 16), (1, 1), (1, 200), (1, 47), (5, 5), (17, 40), (1, 9), (64, 64), (3, 130))

CASES = (
    Case("one_decode_one_token", ((1, 1),), 1),
    Case("one_decode_full_block", ((1, 16),), 1),
    Case("one_decode_one_over", ((1, 17),), 1),
    Case("equal_decodes", ((1, 64),) * 5, 5),
    Case("ragged_decodes", tuple((1, c) for c in (5, 300, 16, 31, 32, 33, 1, 128, 77)), 9),
    Case("more_decodes_than_a_group", tuple((1, 1 + 7 * i) for i in range(40)), 40),
    Case("fresh_chunk", ((50, 50),), 0),
    Case("one_token_chunk", ((1, 1), (1, 20)), 0),
    Case("later_chunk", ((32, 80),), 0),
    Case("last_chunk_unaligned", ((13, 77),), 0),
    Case("mixed", _MIXED, 5),
    Case("mixed_mha", _MIXED, 5, num_heads=4, num_kv_heads=4),
    Case("mixed_mqa", _MIXED, 5, num_heads=4, num_kv_heads=1),
    Case("mixed_many_kv_heads", _MIXED, 5, num_heads=32, num_kv_heads=16),
    Case("mixed_head_80", _MIXED, 5, num_heads=4, num_kv_heads=2, head_size=80),
    Case("mixed_head_128", _MIXED, 5, num_heads=8, num_kv_heads=2, head_size=128),
    Case("mixed_block_8", _MIXED, 5, block_size=8),
    Case("mixed_block_128", _MIXED, 5, block_size=128),
    Case("mixed_window_1", _MIXED, 5, sliding_window=1),
    Case("mixed_window_20", _MIXED, 5, sliding_window=20),
    Case("mixed_window_beyond", _MIXED, 5, sliding_window=4096),
    Case("mixed_softcap", _MIXED, 5, softcap=30.0),
)
