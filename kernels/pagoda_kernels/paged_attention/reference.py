"""The specification of paged_attention, in plain torch: one request after the other, in float32."""

import torch
from torch import Tensor

from .batch import AttentionBatch


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See PagedAttention."""
    queries = torch.split(q, batch.query_lens_host)
    outputs = []
    for request, context_len in enumerate(batch.context_lens_host):
        keys = _cached(k_cache, batch.block_tables[request], context_len)
        values = _cached(v_cache, batch.block_tables[request], context_len)
        outputs.append(_attend(queries[request], keys, values, scale, sliding_window, softcap))
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def _cached(cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """Return the first context_len rows of a request, [C, Hkv, D]."""
    num_blocks = -(-context_len // cache.shape[1])
    return cache[block_table[:num_blocks].long()].flatten(0, 1)[:context_len]


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """Return the output of one request, [n, Hq, D], for q [n, Hq, D] and keys, values [C, Hkv, D]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("nhd,chd->hnc", q.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_positions(len(q), len(keys), sliding_window, q.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnc,chd->nhd", weights, values).to(q.dtype)


def visible_positions(query_len: int, context_len: int, window: int | None, device: torch.device) -> Tensor:
    """Return [n, C] bool: which positions each of the last n tokens of a context sees."""
    own = torch.arange(context_len - query_len, context_len, device=device).unsqueeze(1)
    other = torch.arange(context_len, device=device)
    visible = other <= own
    return visible if window is None else visible & (other > own - window)
