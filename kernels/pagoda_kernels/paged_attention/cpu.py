"""paged_attention for CPUs, without a gather where torch offers one less.

A decode is bound by memory, so each key and value should travel from memory once. Keys are gathered row by row, for a
group of requests at a time that fits the L2 caches, and multiplied there; values are not gathered at all, since
`embedding_bag` is a weighted sum of table rows. A prefill chunk gathers its request's context once and is bound by
arithmetic: torch's own fused attention does it.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from . import reference
from .batch import AttentionBatch
from .cpu_plan import DecodeGroup, DecodePlan, PrefillChunk, Shape, make_plan
from .reference import visible_positions


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
    """See PagedAttention. Over a cache of 8-bit floats this is the reference, which is several times slower."""
    if k_cache.dtype != q.dtype:
        return reference.paged_attention(
            q, k_cache, v_cache, batch, scale, window=window, softcap=softcap, k_scale=k_scale, v_scale=v_scale
        )
    _, block_size, num_kv_heads, head_size = k_cache.shape
    shape = Shape(block_size, q.shape[1], num_kv_heads, head_size, k_cache.dtype, window)
    plan = batch.prepare(make_plan, shape)
    out = torch.empty(q.shape, dtype=q.dtype)
    if plan.decode is not None:
        _decode(out, q, k_cache, v_cache, plan.decode, scale * k_scale, softcap)
    for chunk in plan.chunks:
        out[chunk.rows] = _prefill(q[chunk.rows], k_cache, v_cache, chunk, scale * k_scale, softcap)
    return out if v_scale == 1 else out.mul_(v_scale)


def _decode(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: DecodePlan, scale: float, softcap: float
) -> None:
    """Write the decodes' rows of out."""
    _, _, num_kv_heads, head_size = k_cache.shape
    queries = q.index_select(0, plan.order)
    if plan.diagonal is not None:
        queries = _spread(plan.diagonal, queries, num_kv_heads)
    key_rows, value_rows = k_cache.view(-1, num_kv_heads * head_size), v_cache.view(-1, head_size)
    attended = []
    for group in plan.groups:
        torch.index_select(key_rows, 0, group.slots, out=group.keys)
        if plan.diagonal is None:
            attended.append(_attend_gathered(group, queries[group.rows], v_cache, scale, softcap))
        else:
            attended.append(_attend_diagonal(group, queries[group.rows], value_rows, scale, softcap))
    out.index_copy_(0, plan.order, torch.cat(attended).view(len(plan.order), -1, head_size))


def _spread(spread: Tensor, q: Tensor, num_kv_heads: int) -> Tensor:
    """Copy q [B, Hq, D] to the diagonal blocks of spread [B, Hq, Hkv * D] and return it."""
    num_decodes, num_heads, head_size = q.shape
    group = num_heads // num_kv_heads
    blocks = spread.view(num_decodes, num_kv_heads, group, num_kv_heads, head_size)
    diagonal = blocks.diagonal(dim1=1, dim2=3)  # [B, group, D, Hkv]
    diagonal.copy_(q.view(num_decodes, num_kv_heads, group, head_size).permute(0, 2, 3, 1))
    return spread


def _attend_diagonal(group: DecodeGroup, queries: Tensor, value_rows: Tensor, scale: float, softcap: float) -> Tensor:
    """Return the output [G * Hq, D] for spread queries [G, Hq, Hkv * D], with the keys gathered."""
    scores = group.scores
    keys = group.keys.view(scores.shape[0], scores.shape[2], -1).transpose(1, 2)  # [G, Hkv * D, L]
    if softcap:
        _cap(torch.baddbmm(scores, queries, keys, beta=0, alpha=scale, out=scores), softcap)
        if group.mask is not None:
            scores.add_(group.mask)
    elif group.mask is None:
        torch.baddbmm(scores, queries, keys, beta=0, alpha=scale, out=scores)
    else:
        torch.baddbmm(group.mask, queries, keys, alpha=scale, out=scores)
    torch.softmax(scores, dim=-1, out=scores)
    return embedding_bag(group.value_rows, value_rows, group.bags, mode="sum", per_sample_weights=scores.flatten())


def _attend_gathered(group: DecodeGroup, queries: Tensor, v_cache: Tensor, scale: float, softcap: float) -> Tensor:
    """Return the output [G * Hq, D] for queries [G, Hq, D], with the keys gathered."""
    requests, _, width = group.scores.shape
    shape = (requests, width, *v_cache.shape[2:])
    keys, values = group.keys.view(shape), v_cache.flatten(0, 1).index_select(0, group.slots).view(shape)
    mask = None if group.mask is None else group.mask.unsqueeze(1)
    heads = queries.unsqueeze(2)  # [G, Hq, 1, D]
    attended = _attend(heads, keys.transpose(1, 2), values.transpose(1, 2), mask, scale, softcap)
    return attended.reshape(-1, queries.shape[-1])


def _prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: PrefillChunk, scale: float, softcap: float) -> Tensor:
    """Return the chunk's output, [n, Hq, D]."""
    keys, values = (
        cache.flatten(0, 1).index_select(0, chunk.slots).transpose(0, 1).unsqueeze(0) for cache in (k_cache, v_cache)
    )
    heads = q.transpose(0, 1).unsqueeze(0)
    attended = _attend(heads, keys, values, chunk.mask, scale, softcap, causal=chunk.mask is None)
    return attended.squeeze(0).transpose(0, 1)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float, causal: bool = False
) -> Tensor:
    """Return the output [G, Hq, n, D] for q [G, Hq, n, D] and keys, values [G, Hkv, L, D]."""
    if not softcap:
        return scaled_dot_product_attention(q, keys, values, mask, is_causal=causal, scale=scale, enable_gqa=True)
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = _cap(q @ keys.transpose(2, 3) * scale, softcap)
    if causal:
        scores.masked_fill_(~visible_positions(q.shape[2], keys.shape[2], 0, q.device), float("-inf"))
    elif mask is not None:
        scores.add_(mask)
    return torch.softmax(scores, dim=-1) @ values


def _cap(scores: Tensor, softcap: float) -> Tensor:
    """Replace the scores by softcap * tanh(scores / softcap) and return them."""
    return scores.div_(softcap).tanh_().mul_(softcap)
