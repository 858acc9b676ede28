"""sample for CPUs: float32 weights, no sort of the vocabulary where a few hundred candidates settle the filters.

Every filter comes down to a floor: the smallest weight, relative to the most probable token's, that is kept. Against
the reference only those tokens can differ whose float32 rounding decides a floor or the draw.
"""

import torch
from torch import Tensor

from .batch import SamplingBatch
from .levels import GROUP, TILE
from .philox import uniforms
from .reference import cut, first_above, mass_above

# The first is enough for the usual top_k, and for top_p on the usual peaked distribution; what neither settles is
# sorted.
_CANDIDATES = (256, 4096)


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """See Sample."""
    greedy = logits.argmax(dim=-1)
    if params.all_greedy:
        return greedy
    hot = params.temperature > 0
    temperature = torch.where(hot, params.temperature, 1).unsqueeze(1)
    logits = logits.float()
    weights = logits.sub(logits.gather(1, greedy.unsqueeze(1))).div_(temperature).exp_()
    floor = _floor(weights, params, hot)
    if floor is not None:
        weights.masked_fill_(weights < floor.unsqueeze(1), 0)
    return torch.where(hot, _draw(weights, uniforms(params.seeds, params.positions)), greedy)


def _floor(weights: Tensor, params: SamplingBatch, hot: Tensor) -> Tensor | None:
    """Return the smallest weight that the filters keep, [R], or None if no filter is on."""
    if not (params.any_top_k or params.any_top_p or params.any_min_p):
        return None
    floor = params.min_p.clone()
    rows = (hot & ((params.top_k > 0) | (params.top_p < 1))).nonzero().squeeze(1)
    if len(rows) > 0:
        floor[rows] = floor[rows].maximum(_rank_floor(weights[rows], params.top_k[rows], params.top_p[rows]))
    return floor


def _rank_floor(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return the smallest weight that top_k and then top_p keep, [R]."""
    total = weights.sum(dim=-1).double()
    floor = torch.empty(len(weights))
    rows = torch.arange(len(weights))
    for candidates in (*_CANDIDATES, weights.shape[1]):
        undecided = weights if len(rows) == len(weights) else weights[rows]
        largest = undecided.topk(min(candidates, weights.shape[1])).values
        kth = _kth(largest, top_k[rows])
        found = _floor_among(largest, kth, total[rows], top_p[rows])
        floor[rows] = found
        # All tokens above the last candidate are candidates: what is not above it may be only a part.
        rows = rows[found.minimum(kth) <= largest[:, -1]]
        if len(rows) == 0:
            break
    return floor


def _kth(ordered: Tensor, top_k: Tensor) -> Tensor:
    """Return the k-th of the descending weights [R, C], the last one if there are fewer, and inf if top_k is off."""
    index = top_k.clamp(1, ordered.shape[1]).long() - 1
    kth = ordered.gather(1, index.unsqueeze(1)).squeeze(1)
    return kth.masked_fill(top_k == 0, float("inf"))


def _floor_among(ordered: Tensor, kth: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """Return _rank_floor for the largest weights [R, C] in descending order, of rows with the sum `total` [R]."""
    by_rank = kth.isfinite()
    floor = torch.where(by_rank, kth, 0).unsqueeze(1)
    kept = ordered.masked_fill(ordered < floor, 0).double()
    total = torch.where(by_rank, kept.sum(dim=-1), total).unsqueeze(1)
    limit = torch.where(top_p < 1, top_p.double(), float("inf")).unsqueeze(1) * total
    within = (mass_above(kept) < limit) & (kept > 0)
    within[:, 0] = True
    return ordered.masked_fill(~within, float("inf")).amin(dim=-1)


def _draw(weights: Tensor, u: Tensor) -> Tensor:
    """Return reference.draw of float32 weights, which are added up once, group by group."""
    vocabulary = weights.shape[1]
    rows = torch.arange(len(weights))
    groups = cut(weights, GROUP)
    tiles = cut(groups.sum(dim=-1), TILE // GROUP)
    tile = first_above(tiles.sum(dim=-1, dtype=torch.float64), u[0])
    group = tile * (TILE // GROUP) + first_above(tiles[rows, tile], u[1])
    group = group.clamp(max=groups.shape[1] - 1)  # for NaN, as below
    token = group * GROUP + first_above(groups[rows, group], u[2])
    return token.clamp(max=vocabulary - 1)
