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
    *,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """See PagedAttention."""
    queries = torch.split(q, batch.query_lens_host)
    outputs = []
    for request, context_len in enumerate(batch.context_lens_host):
        keys = _cached(k_cache, batch.block_tables[request], context_len) * k_scale
        values = _cached(v_cache, batch.block_tables[request], context_len) * v_scale
        outputs.append(_attend(queries[request], keys, values, scale, window, softcap))
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def _cached(cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """Return the first context_len rows of a request, [C, Hkv, D], in float32."""
    num_blocks = -(-context_len // cache.shape[1])
    return cache[block_table[:num_blocks].long()].flatten(0, 1)[:context_len].float()


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Return the output of one request, [n, Hq, D], for q [n, Hq, D] and keys, values [C, Hkv, D]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("nhd,chd->hnc", q.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_positions(len(q), len(keys), window, q.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnc,chd->nhd", weights, values).to(q.dtype)


def visible_positions(query_len: int, context_len: int, window: int, device: torch.device) -> Tensor:
    """Return [n, C] bool: which positions each of the last n tokens of a context sees."""
    own = torch.arange(context_len - query_len, context_len, device=device).unsqueeze(1)
    other = torch.arange(context_len, device=device)
    visible = other <= own
    return visible & (other > own - window) if window else visible
