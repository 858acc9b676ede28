"""Chunks as a scheduler makes them, their logits, a sampler to launch them on, and what it must make of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pagoda_kernels
import pytest
import torch
from pagoda import wishes
from pagoda.errors import PagodaError
from pagoda.plan import Chunk, Collected
from pagoda.protocol import TokenLogprob
from pagoda.request import Request, Status
from pagoda.sampler import Draw, Sampler
from pagoda.sampling_params import SamplingParams, Structure
from pagoda_kernels import SamplingBatch
from torch import Tensor

CPU = torch.device("cpu")
VOCABULARY = 70
STOP = frozenset({60, 61})
NEVER = float("-inf")


class Grammar:
    """Allows the tokens it is given, a set for each place; fails when told to."""

    is_finished = False

    def __init__(
        self, *places: set[int], fill_error: PagodaError | None = None, accept_error: PagodaError | None = None
    ) -> None:
        self.places, self.fill_error, self.accept_error = list(places), fill_error, accept_error
        self.accepted: list[int] = []

    def fill(self, row: Any) -> None:
        if self.fill_error is not None:
            raise self.fill_error
        for token in self.places[len(self.accepted)]:
            row.view("uint32")[token // 32] |= 1 << (token % 32)

    def accept(self, token_id: int) -> bool:
        if self.accept_error is not None:
            raise self.accept_error
        allowed = token_id in self.places[len(self.accepted)]
        self.accepted.append(token_id)
        return allowed


def make_chunk(
    prompt: list[int], output: list[int], params: SamplingParams, seed: int = 0, matcher: Grammar | None = None
) -> Chunk:
    """The decode that draws the token after prompt and output."""
    if matcher is not None:
        params = msgspec.structs.replace(params, structure=Structure("json_object"))
    request = Request(object(), prompt, params, 1000, STOP, seed, status=Status.RUNNING, matcher=matcher)
    request.token_ids += output
    return Chunk(request, len(request.token_ids) - 1, 1, True, False, 0)


def fresh(chunk: Chunk) -> Chunk:
    """The same chunk, with a grammar that has not heard of any token."""
    matcher = chunk.request.matcher
    again = Grammar(*matcher.places) if isinstance(matcher, Grammar) else None
    prompt = chunk.request.prompt_ids
    return make_chunk(prompt, chunk.request.token_ids[len(prompt) :], chunk.request.params, chunk.request.seed, again)


def make_sampler(sample: Callable[[Tensor, SamplingBatch], Tensor] | None = None) -> Sampler:
    ops = pagoda_kernels.for_device(CPU)
    return Sampler(ops if sample is None else replace(ops, sample=sample), CPU, VOCABULARY)


def launch(sampler: Sampler, chunks: list[Chunk], logits: Tensor) -> Draw:
    return sampler.launch(chunks, wishes.of(chunk.request for chunk in chunks), logits)


def draw(chunks: list[Chunk], logits: Tensor) -> Collected:
    sampler = make_sampler()
    return sampler.collect(launch(sampler, chunks, logits.clone()), None)


def expected_edits(chunk: Chunk, logits: Tensor) -> Tensor:
    """The formulas, token by token, in float64: logits [V] to [V]."""
    p, request = chunk.request.params, chunk.request
    output = request.token_ids[len(request.prompt_ids) :]
    result = []
    for token, logit in enumerate(logits.double().tolist()):
        count = output.count(token)
        if count or token in request.prompt_ids:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        logit -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        logit += p.logit_bias.get(token, 0)
        words = [word for word in p.bad_words if word[-1] == token]
        completes = any(tuple([*output, token][-len(word) :]) == word for word in words)
        too_early = token in request.stop_ids and len(output) < p.min_tokens
        unlisted = p.allowed_token_ids is not None and token not in p.allowed_token_ids
        result.append(NEVER if completes or too_early or unlisted else logit)
    return torch.tensor(result, dtype=torch.float64)


def random_params(chance: random.Random) -> SamplingParams:
    """Each wish in every third request or so."""

    def perhaps(name: str, value: Any) -> dict[str, Any]:
        return {name: value} if chance.random() < 0.35 else {}

    tokens = [chance.randrange(VOCABULARY) for _ in range(12)]
    wishes = {
        **perhaps("repetition_penalty", chance.choice((0.5, 1.3, 3.0))),
        **perhaps("presence_penalty", chance.uniform(-2, 2)),
        **perhaps("frequency_penalty", chance.uniform(-2, 2)),
        **perhaps("logit_bias", {t: chance.uniform(-100, 100) for t in tokens[:3]}),
        **perhaps("min_tokens", chance.randint(0, 30)),
        **perhaps("bad_words", tuple((a, b) for a in range(6) for b in range(6) if chance.random() < 0.2) or ((1,),)),
        **perhaps("allowed_token_ids", tuple(chance.sample(range(VOCABULARY), 40))),
        **perhaps("top_k", chance.randint(1, 30)),
        **perhaps("top_p", chance.uniform(0.3, 1)),
        **perhaps("min_p", chance.uniform(0, 0.3)),
        **perhaps("logprobs", chance.randint(0, 20)),
    }
    return SamplingParams(temperature=chance.choice((0.0, 0.7, 1.0, 1.5)), **wishes)


def random_chunks(chance: random.Random, count: int) -> list[Chunk]:
    """Histories over few tokens, so that many come twice."""
    chunks = []
    for seed in range(count):
        prompt = [chance.randrange(20) for _ in range(chance.randint(1, 30))]
        output = [chance.randrange(12) for _ in range(chance.randint(0, 30))]
        matcher = Grammar(set(chance.sample(range(VOCABULARY), 30))) if chance.random() < 0.2 else None
        params = random_params(chance)
        if matcher is not None and params.allowed_token_ids is not None:
            matcher.places[0].add(params.allowed_token_ids[0])
        chunks.append(make_chunk(prompt, output, params, seed - 3, matcher))
    return chunks


def random_logits(count: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def assert_logprob(got: TokenLogprob | None, expected: TokenLogprob) -> None:
    assert got is not None
    assert (got.token_id, got.rank) == (expected.token_id, expected.rank)
    assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [token for token, _ in got.top] == [token for token, _ in expected.top]
    assert [value for _, value in got.top] == pytest.approx([value for _, value in expected.top], abs=1e-5)
