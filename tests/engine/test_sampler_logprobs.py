"""Log-probabilities that the sampler reports, of outputs and of prompts in chunks: those of the raw logits."""

from __future__ import annotations

import random

import pytest
import torch
from engine.sampler_rig import (
    STOP,
    VOCABULARY,
    assert_logprob,
    draw,
    make_chunk,
    make_sampler,
    random_chunks,
    random_logits,
)
from pagoda.plan import Chunk
from pagoda.protocol import TokenLogprob
from pagoda.request import Request, Status
from pagoda.sampler import MAX_SCORED_ROWS
from pagoda.sampling_params import SamplingParams
from torch import Tensor


def expected_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """By sorting, in float64; equal logits in the order of their ids."""
    logprobs = logits.double().log_softmax(dim=-1).tolist()
    order = sorted(range(len(logprobs)), key=lambda t: (-float(logits[t]), t))
    rank = 1 + sum(bool(other > logits[token]) for other in logits)
    return TokenLogprob(token, logprobs[token], rank, [(t, logprobs[t]) for t in order[:count]])


@pytest.mark.parametrize("seed", range(3))
def test_logprobs_are_those_of_the_raw_logits(seed: int) -> None:
    """Whatever penalties, masks and temperature did; coarse logits make many ties."""
    chunks = random_chunks(random.Random(seed), 30)
    logits = random_logits(30, seed).round()
    collected = draw(chunks, logits)
    assert collected.logprobs is not None
    for chunk, token, got, raw in zip(chunks, collected.token_ids, collected.logprobs, logits, strict=True):
        wanted = chunk.request.params.logprobs
        if wanted is None:
            assert got is None
        else:
            assert_logprob(got, expected_logprob(raw, token, wanted))


def test_nobody_asks_for_logprobs() -> None:
    assert draw([make_chunk([1], [], SamplingParams())], random_logits(1, 0)).logprobs is None


def score_in_chunks(chunks_of: list[list[Chunk]], logits: dict[int, Tensor]) -> dict[Request, list[TokenLogprob]]:
    """Score steps of chunks; `logits` [tokens, V] by a request's seed stand in for the model's."""
    sampler = make_sampler()
    for chunks in chunks_of:
        hidden = torch.cat([logits[c.request.seed][c.start : c.start + c.count] for c in chunks])
        prompts = sampler.score_prompts(chunks, hidden, lambda rows: rows)
        for chunk, scores in sampler.collect(None, prompts).prompt_logprobs:
            chunk.request.prompt_logprobs += scores
    return {c.request: c.request.prompt_logprobs for chunks in chunks_of for c in chunks}


def prompt_request(seed: int, length: int, wanted: int | None) -> Request:
    prompt = [random.Random(seed).randrange(VOCABULARY) for _ in range(length)]
    return Request(seed, prompt, SamplingParams(prompt_logprobs=wanted), 5, STOP, seed, status=Status.RUNNING)


def part(request: Request, start: int, count: int) -> Chunk:
    return Chunk(request, start, count, False, False, request.epoch)


def assert_prompt(request: Request, logits: Tensor) -> None:
    wanted = request.params.prompt_logprobs
    assert wanted is not None
    assert len(request.prompt_logprobs) == len(request.prompt_ids) - 1
    for place, got in enumerate(request.prompt_logprobs):
        assert_logprob(got, expected_logprob(logits[place], request.prompt_ids[place + 1], wanted))


@pytest.mark.parametrize("cuts", [[40], [1, 39], [39, 1], [7, 8, 25], [1] * 40])
def test_prompt_logprobs_do_not_depend_on_where_chunks_end(cuts: list[int]) -> None:
    request, neighbour, silent = prompt_request(0, 40, 3), prompt_request(1, 40, 0), prompt_request(2, 40, None)
    logits = {seed: random_logits(40, seed) for seed in range(3)}
    steps, start = [], 0
    for count in cuts:
        steps.append([part(silent, start, count), part(request, start, count), part(neighbour, start, count)])
        start += count
    score_in_chunks(steps, logits)
    assert_prompt(request, logits[0])
    assert_prompt(neighbour, logits[1])
    assert silent.prompt_logprobs == []


def test_prompt_logprobs_go_on_after_a_preemption() -> None:
    """What was scored before is not scored again; the recomputation may take other chunks, and the output with it."""
    request, logits = prompt_request(0, 30, 2), {0: random_logits(33, 0)}
    score_in_chunks([[part(request, 0, 12)]], logits)
    assert len(request.prompt_logprobs) == 12
    request.epoch += 1
    score_in_chunks([[part(request, 0, 7)], [part(request, 7, 10)], [part(request, 17, 13)]], logits)
    assert_prompt(request, logits[0])
    request.token_ids += [1, 2, 3]
    score_in_chunks([[part(request, 0, 33)]], logits)
    assert_prompt(request, logits[0])


def test_more_rows_than_are_scored_at_once() -> None:
    length = MAX_SCORED_ROWS + 50
    request, other = prompt_request(0, length, 1), prompt_request(1, length, 4)
    logits = {seed: random_logits(length, seed) for seed in range(2)}
    score_in_chunks([[part(request, 0, length), part(other, 0, length)]], logits)
    assert_prompt(request, logits[0])
    assert_prompt(other, logits[1])
