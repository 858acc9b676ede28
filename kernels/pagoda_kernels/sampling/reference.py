"""The specification of sample, in plain torch: sorts, and sums in float64."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batch import SamplingBatch
from .levels import GROUP, TILE
from .philox import uniforms

NEVER = float("-inf")


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """See Sample."""
    greedy = logits.argmax(dim=-1)
    if params.all_greedy:
        return greedy
    drawn = draw(kept_logits(logits, params).softmax(dim=-1), uniforms(params.seeds, params.positions))
    return torch.where(params.temperature == 0, greedy, drawn)


def kept_logits(logits: Tensor, params: SamplingBatch) -> Tensor:
    """Return (logits - their maximum) / temperature, float64 [R, V], and -inf where a filter drops the token."""
    temperature = torch.where(params.temperature == 0, 1, params.temperature).unsqueeze(1)
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperature
    threshold = params.min_p.double().log().unsqueeze(1)
    if params.any_top_k or params.any_top_p:
        threshold = threshold.maximum(_rank_threshold(scaled, params))
    return scaled.masked_fill(scaled < threshold, NEVER)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Return ids [R]: a tile of the weights [R, V], a group in it, a token in that, by u [3, R] in [0, 1)."""
    rows = torch.arange(len(weights), device=weights.device)
    tiles = cut(weights, TILE)
    tile = first_above(tiles.sum(dim=-1), u[0])
    groups = cut(tiles[rows, tile], GROUP)
    group = first_above(groups.sum(dim=-1), u[1])
    token = first_above(groups[rows, group], u[2])
    return (tile * TILE + group * GROUP + token).clamp(max=weights.shape[1] - 1)  # for NaN


def cut(values: Tensor, size: int) -> Tensor:
    """Return pieces of the values [R, N]: [R, pieces, size], the last one filled with zeros."""
    pieces = -(-values.shape[1] // size)
    missing = pieces * size - values.shape[1]
    return (pad(values, (0, missing)) if missing else values).reshape(len(values), pieces, size)


def first_above(weights: Tensor, u: Tensor) -> Tensor:
    """Return the first index [R] at which the cumulative weights [R, C] exceed the share u [R] of their sum."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    # Rounding can lift u * total to the total itself: the last weight above zero is the limit.
    last = torch.searchsorted(cumulative, total)
    first = torch.searchsorted(cumulative, u.unsqueeze(1) * total, right=True).minimum(last)
    return first.squeeze(1).clamp(max=weights.shape[1] - 1)  # for NaN


def _rank_threshold(scaled: Tensor, params: SamplingBatch) -> Tensor:
    """Return the smallest logit, [R, 1], that top_k and then top_p keep."""
    ordered = scaled.sort(dim=-1, descending=True).values
    vocabulary = ordered.shape[1]
    k = torch.where(params.top_k == 0, vocabulary, params.top_k).clamp(max=vocabulary).long().unsqueeze(1)
    kth = ordered.gather(1, k - 1)
    probabilities = ordered.masked_fill(ordered < kth, NEVER).softmax(dim=-1)
    top_p = torch.where(params.top_p >= 1, float("inf"), params.top_p.double()).unsqueeze(1)
    kept = (mass_above(probabilities) < top_p) & (ordered >= kth)
    kept[:, 0] = True
    return ordered.masked_fill(~kept, float("inf")).amin(dim=-1, keepdim=True)


def mass_above(ordered: Tensor) -> Tensor:
    """Return, for each of the descending values [R, C], the sum of those strictly larger."""
    before = pad(ordered.cumsum(dim=-1), (1, -1))
    first_among_equals = pad(ordered[:, 1:] < ordered[:, :-1], (1, 0), value=True)
    # The sums before never fall: the largest up to here is that of the first among equals.
    return before.masked_fill(~first_among_equals, 0).cummax(dim=-1).values
