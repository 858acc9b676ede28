"""top_logprobs in the Triton language: the logits are read once, and the vocabulary is not sorted.

1. `_tiles`, many programs a row: of each tile of the vocabulary the largest logit, the softmax sum relative to it and
   the number of logits above the token's; and the largest logit of each group of 32 neighbours.
2. `_best`, a program a row: adds these up, takes the k best groups, and of their logits the k best.

Order the groups by their largest logit, and by their place among equals: the k best logits lie in the first k groups,
for a group outside has k logits before its own largest. Numbers and places are compared as one 64-bit key.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..float_order import from_order_key, order_key
from . import TopLogprobs, check_k

# Neighbours of a group: 128 bytes. Groups of a tile: 4096 logits, 32 a thread with 4 warps, in 16-byte loads.
_GROUP = 32
_TILE_GROUPS = 128


def top_logprobs(logits: Tensor, tokens: Tensor, k: int) -> TopLogprobs:
    """See GetTopLogprobs."""
    requests, vocabulary = logits.shape
    check_k(k, vocabulary)
    found = _empty(requests, k, logits.device)
    if requests == 0:
        return found
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_tiles = triton.cdiv(vocabulary, _GROUP * _TILE_GROUPS)
    num_groups = num_tiles * _TILE_GROUPS
    tile_max, tile_sum = torch.empty(2, requests, num_tiles, dtype=torch.float32, device=logits.device)
    tile_above = torch.empty(requests, num_tiles, dtype=torch.int32, device=logits.device)
    group_max = torch.empty(requests, num_groups, dtype=torch.float32, device=logits.device) if k else tile_max
    tiles = (tile_max, tile_sum, tile_above, group_max)
    sizes = {"VOCABULARY": vocabulary, "GROUP": _GROUP, "NUM_TILES": num_tiles, "K": k}
    _tiles[(requests, num_tiles)](
        logits, tokens, *tiles, logits.stride(0), GROUPS=_TILE_GROUPS, **sizes, num_warps=4
    )  # fmt: skip
    _best[(requests,)](
        logits,
        tokens,
        *tiles,
        found.logprob,
        found.rank,
        found.top_ids,
        found.top_logprobs,
        logits.stride(0),
        NUM_GROUPS=num_groups,
        TILES_PADDED=triton.next_power_of_2(num_tiles),
        GROUPS_PADDED=triton.next_power_of_2(num_groups),
        K_PADDED=triton.next_power_of_2(max(k, 1)),
        **sizes,
        num_warps=8 if k else 1,
    )
    return found


def _empty(requests: int, k: int, device: torch.device) -> TopLogprobs:
    return TopLogprobs(
        torch.empty(requests, dtype=torch.float32, device=device),
        torch.empty(requests, dtype=torch.int64, device=device),
        torch.empty(requests, k, dtype=torch.int64, device=device),
        torch.empty(requests, k, dtype=torch.float32, device=device),
    )


@triton.jit
def _weights(x, largest):
    """exp(x - largest), 0 for a forbidden token also where all are forbidden."""
    return tl.where(x == float("-inf"), 0.0, tl.exp(x - largest))


@triton.jit
def _tiles(
    logits_ptr,
    tokens_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    tile_above_ptr,
    group_max_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_TILES: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = tile * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row_ptr = logits_ptr + row * row_stride
    x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf"))
    own = tl.load(row_ptr + tl.load(tokens_ptr + row))
    maxima = tl.max(x, 1)
    largest = tl.max(maxima, 0)
    out = row * NUM_TILES + tile
    tl.store(tile_max_ptr + out, largest)
    tl.store(tile_sum_ptr + out, tl.sum(tl.sum(_weights(x, largest), 1), 0))
    tl.store(tile_above_ptr + out, tl.sum(tl.sum((x > own).to(tl.int32), 1), 0))
    if K > 0:
        tl.store(group_max_ptr + row * (NUM_TILES * GROUPS) + group, maxima)


@triton.jit
def _ordered(x, place):
    """A 64-bit key: larger for a larger x and, among equals, for a lower place below 2^31."""
    return (order_key(x).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def _next_best(keys, last):
    """The largest key below the last one."""
    return tl.max(tl.where(keys < last, keys, -0x8000000000000000), 0)


@triton.jit
def _best(
    logits_ptr,
    tokens_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    tile_above_ptr,
    group_max_ptr,
    logprob_ptr,
    rank_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_TILES: tl.constexpr,
    K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    tile = tl.arange(0, TILES_PADDED)
    inside = tile < NUM_TILES
    maxima = tl.load(tile_max_ptr + row * NUM_TILES + tile, inside, other=float("-inf"))
    sums = tl.load(tile_sum_ptr + row * NUM_TILES + tile, inside, other=0.0)
    above = tl.load(tile_above_ptr + row * NUM_TILES + tile, inside, other=0)
    largest = tl.max(maxima, 0)
    normaliser = largest + tl.log(tl.sum(sums * _weights(maxima, largest), 0))
    own = tl.load(row_ptr + tl.load(tokens_ptr + row))
    tl.store(logprob_ptr + row, own - normaliser)
    tl.store(rank_ptr + row, tl.sum(above, 0).to(tl.int64) + 1)
    if K > 0:
        group = tl.arange(0, GROUPS_PADDED)
        group_max = tl.load(group_max_ptr + row * NUM_GROUPS + group, group < NUM_GROUPS, other=float("-inf"))
        keys = _ordered(group_max, group)
        index = tl.arange(0, K_PADDED)
        picked = tl.zeros((K_PADDED,), tl.int32)
        last = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
        for i in range(K):
            last = _next_best(keys, last)
            picked = tl.where(index == i, 0x7FFFFFFF - (last & 0x7FFFFFFF).to(tl.int32), picked)

        token = picked[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (index < K)[:, None] & (token < VOCABULARY)
        x = tl.load(row_ptr + token, inside, other=float("-inf"))
        keys = tl.where(inside, _ordered(x, token), -0x8000000000000000)
        keys = tl.reshape(keys, (K_PADDED * GROUP,))
        last = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
        for i in range(K):
            last = _next_best(keys, last)
            chosen = 0x7FFFFFFF - (last & 0x7FFFFFFF).to(tl.int32)
            logit = from_order_key((last >> 32).to(tl.int32))
            tl.store(top_ids_ptr + row * K + i, tl.minimum(chosen, VOCABULARY - 1).to(tl.int64))
            tl.store(top_logprobs_ptr + row * K + i, logit - normaliser)
