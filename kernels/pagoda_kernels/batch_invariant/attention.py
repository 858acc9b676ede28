"""paged_attention whose rows keep their bits: each query stands at a place, in a shape, that its position decides.

A decode computes a tile of a few neighbouring positions with one query in it. Each pair of a tile and a KV head is one
thread's work in torch's fused attention, which treats all of them alike (Dao et al. 2022, arXiv:2205.14135).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..paged_attention.batch import AttentionBatch
from .attention_plan import Group, Plan, Shape, make_plan


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
    """See PagedAttention. A query's bits depend on it and on its request's keys and values up to it alone."""
    if len(q) == 0:
        return torch.empty(q.shape, dtype=q.dtype)
    _, block_size, num_kv_heads, head_size = k_cache.shape
    shape = Shape(block_size, q.shape[1], num_kv_heads, head_size, q.dtype, window)
    plan = batch.prepare(make_plan, shape)
    queries = _arrange(q, plan, shape)
    attended = torch.empty_like(queries)
    for group in plan.groups:
        keys, values = (_gather(cache, group, q.dtype) for cache in (k_cache, v_cache))
        attend = _attend_capped if softcap else _attend
        attended[group.tiles] = attend(queries[group.tiles], keys, values, group.mask, scale * k_scale, softcap)
    out = _arrange_back(attended, plan, shape)
    return out if v_scale == 1 else out.mul_(v_scale)


def _arrange(q: Tensor, plan: Plan, shape: Shape) -> Tensor:
    """Queries [T, Hq, D] as [tiles, Hkv, rows, D]; the rows of a tile are its positions, then the heads of a group."""
    placed = q.index_select(0, plan.sources).view(-1, shape.width, shape.num_kv_heads, shape.group, shape.head_size)
    rows = placed.transpose(1, 2).flatten(2, 3)
    return pad(rows, (0, 0, 0, shape.rows - rows.shape[2])).contiguous()


def _arrange_back(attended: Tensor, plan: Plan, shape: Shape) -> Tensor:
    rows = attended[:, :, : shape.width * shape.group]
    placed = rows.view(-1, shape.num_kv_heads, shape.width, shape.group, shape.head_size).transpose(1, 2)
    return placed.reshape(-1, shape.num_heads, shape.head_size).index_select(0, plan.places)


def _gather(cache: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """[S, Hkv, L, D]. From 8-bit floats this is exact."""
    rows = cache.flatten(0, 1).index_select(0, group.slots).to(dtype)
    return rows.view(-1, group.mask.shape[-1], *cache.shape[2:]).transpose(1, 2)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, _: float) -> Tensor:
    """[G, Hkv, rows, D] for q of that shape, keys and values [G or 1, Hkv, L, D], mask [G, 1, rows, L]."""
    tiles = len(q)
    if tiles * q.shape[1] == 1:
        # A single piece of work would run outside of torch's threads, where the matrix library may start its own.
        q, mask = q.expand(2, -1, -1, -1), mask.expand(2, -1, -1, -1)
    keys, values = (x.expand(len(q), -1, -1, -1) for x in (keys, values))
    return scaled_dot_product_attention(q, keys, values, mask, scale=scale)[:tiles]


def _attend_capped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """The same with capped scores, which torch has no fused attention for: tile by tile, several times slower."""
    keys, values = (x.contiguous().expand(len(q), -1, -1, -1) for x in (keys, values))
    out = torch.empty_like(q)
    for tile in range(len(q)):
        scores = (q[tile] @ keys[tile].transpose(1, 2)).mul_(scale / softcap).tanh_().mul_(softcap).add_(mask[tile])
        out[tile] = torch.softmax(scores, dim=-1) @ values[tile]
    return out
