"""Tokens that the sampler draws follow the exact distribution, over seeds and over places."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from engine.sampler_rig import VOCABULARY, draw, expected_edits, make_chunk, random_logits
from pagoda.sampling_params import SamplingParams
from torch import Tensor

DRAWS = 20_000


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """The chance of a larger deviation, for the categories with at least five expected; the rest are one category."""
    expected = probabilities.double() * counts.sum()
    large = expected >= 5
    got = torch.cat([counts[large].double(), counts[~large].sum().double().reshape(1)])
    want = torch.cat([expected[large], expected[~large].sum().reshape(1)])
    got, want = got[want > 0], want[want > 0]
    statistic = ((got - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(want) - 1) / 2, dtype=torch.float64), statistic / 2))


def exact(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] for edited logits [V], filter by filter, in float64 and by sorting."""
    p = (logits.double() / params.temperature).softmax(dim=-1)
    order = p.argsort(descending=True)
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    above = p[order].cumsum(dim=-1) - p[order]
    p[order[above >= params.top_p]] = 0
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


DISTRIBUTIONS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=2.0),
    "top_k": SamplingParams(top_k=12),
    "top_p": SamplingParams(top_p=0.8),
    "min_p": SamplingParams(min_p=0.1),
    "all filters": SamplingParams(temperature=1.4, top_k=25, top_p=0.9, min_p=0.02),
    "penalties and temperature": SamplingParams(
        temperature=1.5, repetition_penalty=1.4, presence_penalty=0.8, frequency_penalty=-0.3
    ),
    "logit_bias": SamplingParams(logit_bias={3: 2.0, 40: -3.0, 41: 4.0}),
    "list, words and stop ids": SamplingParams(
        temperature=1.2, allowed_token_ids=tuple(range(5, 65)), bad_words=((9, 8), (30,)), min_tokens=10
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    params = DISTRIBUTIONS[name]
    logits = random_logits(1, 3, spread=1.5)
    requests = [make_chunk([5, 6, 7], [7, 8, 9], params, seed) for seed in range(20)]
    chunks = [msgspec.structs.replace(requests[i % 20], start=i // 20) for i in range(DRAWS)]
    probabilities = exact(expected_edits(chunks[0], logits[0]), params)
    tokens = torch.tensor(draw(chunks, logits.expand(DRAWS, -1)).token_ids)
    counts = torch.bincount(tokens, minlength=VOCABULARY)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_p(counts, probabilities) > 1e-4


@pytest.mark.parametrize("varied", ["seeds", "places"])
def test_either_seeds_or_places_alone_are_enough_for_it(varied: str) -> None:
    logits = random_logits(1, 3, spread=1.5)
    chunk = make_chunk([1], [2], SamplingParams(), seed=12345)
    if varied == "seeds":
        chunks = [make_chunk([1], [2], SamplingParams(), seed) for seed in range(DRAWS)]
    else:
        chunks = [msgspec.structs.replace(chunk, start=place) for place in range(DRAWS)]
    tokens = torch.tensor(draw(chunks, logits.expand(DRAWS, -1)).token_ids)
    assert chi_square_p(torch.bincount(tokens, minlength=VOCABULARY), exact(logits[0], SamplingParams())) > 1e-4


def test_the_chi_square_test_notices_a_small_bias() -> None:
    probabilities = exact(random_logits(1, 3, spread=1.5)[0], SamplingParams())
    wrong = exact(random_logits(1, 3, spread=1.5)[0], SamplingParams(temperature=1.1))
    counts = (wrong * DRAWS).round()
    assert chi_square_p(counts, probabilities) < 1e-4
    assert math.isclose(chi_square_p((probabilities * DRAWS).round(), probabilities), 1.0, abs_tol=1e-3)
