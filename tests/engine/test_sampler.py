"""The sampler's room: what it changes in logits, whom it ends, and that neighbours in a batch change nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engine.sampler_rig import (
    NEVER,
    VOCABULARY,
    Grammar,
    assert_logprob,
    draw,
    expected_edits,
    fresh,
    launch,
    make_chunk,
    make_sampler,
    random_chunks,
    random_logits,
)
from pagoda.errors import EngineFailure, InvalidRequest
from pagoda.plan import Chunk
from pagoda.request import Status
from pagoda.sampling_params import SamplingParams
from pagoda_kernels import SamplingBatch
from torch import Tensor

# ── edits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def edited(chunks: list[Chunk], logits: Tensor) -> Tensor:
    """The logits [S, V] that tokens are drawn from."""
    kept: list[Tensor] = []

    def watch(edited_logits: Tensor, params: SamplingBatch) -> Tensor:
        kept.append(edited_logits.clone())
        return edited_logits.argmax(dim=-1)

    launch(make_sampler(watch), chunks, logits.clone())
    return kept[0]


@pytest.mark.parametrize("seed", range(5))
def test_edits_are_the_formulas_over_random_histories(seed: int) -> None:
    chunks, logits = random_chunks(random.Random(seed), 40), random_logits(40, seed)
    for chunk, got, raw in zip(chunks, edited(chunks, logits), logits, strict=True):
        expected = expected_edits(chunk, raw)
        if isinstance(chunk.request.matcher, Grammar):
            forbidden = set(range(VOCABULARY)) - chunk.request.matcher.places[0]
            expected[list(forbidden)] = NEVER
        assert torch.equal(got == NEVER, expected == NEVER)
        finite = expected != NEVER
        torch.testing.assert_close(got[finite].double(), expected[finite], rtol=1e-6, atol=1e-5)


def test_a_frequency_penalty_ignores_the_prompt_and_a_repetition_penalty_does_not() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 5], logits[:, 6] = 3.0, 2.0
    params = [SamplingParams(temperature=0, frequency_penalty=2.0), SamplingParams(temperature=0, repetition_penalty=2)]
    assert draw([make_chunk([5, 5], [9], p) for p in params], logits).token_ids == [5, 6]


@pytest.mark.parametrize(("num_output", "token"), [(0, 1), (4, 1), (5, 60), (6, 60)])
def test_stop_ids_come_only_after_min_tokens(num_output: int, token: int) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 60], logits[0, 61], logits[0, 1] = 30.0, 20.0, 10.0
    chunk = make_chunk([1], [2] * num_output, SamplingParams(temperature=0, min_tokens=5))
    assert draw([chunk], logits).token_ids == [token]


def test_an_output_never_holds_a_bad_word() -> None:
    """Over four tokens, with words of one, two and three, whole outputs are drawn step by step."""
    words = ((2,), (0, 0), (1, 0, 1))
    params = SamplingParams(temperature=1.0, bad_words=words, allowed_token_ids=(0, 1, 2, 3))
    sampler, chunks = make_sampler(), [make_chunk([0], [], params, seed) for seed in range(50)]
    for _ in range(20):
        logits = torch.zeros(len(chunks), VOCABULARY)
        tokens = sampler.collect(launch(sampler, chunks, logits), None).token_ids
        for chunk, token in zip(chunks, tokens, strict=True):
            chunk.request.token_ids.append(token)
            chunk.start += 1
    texts = ["".join(map(str, c.request.token_ids[1:])) for c in chunks]
    assert not any(word in text for text in texts for word in ("2", "00", "101"))
    assert any(text.startswith("0") for text in texts), "the prompt's 0 is no part of a word"
    assert len(set(texts)) > 10


# ── grammars ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mask_and_a_list_leave_what_both_allow() -> None:
    matcher = Grammar({3, 33, 69})
    params = SamplingParams(temperature=5.0, allowed_token_ids=(2, 33, 68))
    assert draw([make_chunk([1], [], params, matcher=matcher)], random_logits(1, 0)).token_ids == [33]
    assert matcher.accepted == [33]


def test_a_grammar_that_fails_touches_nobody_else() -> None:
    error = InvalidRequest("too large", field="structured_outputs")
    failing = {
        2: Grammar({1}, fill_error=error),
        5: Grammar({1}, accept_error=error),
    }
    chance = random.Random(0)
    chunks, logits = random_chunks(chance, 8), random_logits(8, 1)
    expected = [draw([chunk], logits[i : i + 1]).token_ids[0] for i, chunk in enumerate(chunks)]
    for chunk in chunks:
        if chunk.request.matcher is not None:
            chunk.request.matcher.accepted.clear()
    for row, matcher in failing.items():
        chunks[row].request.matcher = matcher
    collected = draw(chunks, logits)
    others = [i for i in range(8) if i not in failing]
    assert [collected.token_ids[i] for i in others] == [expected[i] for i in others]
    assert [(id(chunk), failed) for chunk, failed in collected.failures] == [
        (id(chunks[2]), error),
        (id(chunks[5]), error),
    ]
    assert failing[2].accepted == [], "who failed before the draw hears of no token"


def test_a_token_that_does_not_follow_the_grammar_is_a_failure() -> None:
    """A mask bars it, so the two disagree: the request cannot be trusted any more."""

    class Contradicting(Grammar):
        def accept(self, token_id: int) -> bool:
            return False

    chunk = make_chunk([1], [], SamplingParams(temperature=0), matcher=Contradicting({4}))
    collected = draw([chunk], random_logits(1, 0))
    ((failed, error),) = collected.failures
    assert failed is chunk
    assert isinstance(error, EngineFailure)
    assert "token 4" in error.message


def test_a_grammar_hears_nothing_of_a_request_that_has_ended() -> None:
    matcher = Grammar({4})
    chunk = make_chunk([1], [], SamplingParams(temperature=0), matcher=matcher)
    sampler = make_sampler()
    launched = launch(sampler, [chunk], random_logits(1, 0))
    chunk.request.status = Status.FINISHED
    assert sampler.collect(launched, None).failures == []
    assert matcher.accepted == []


# ── nothing left ──────────────────────────────────────────────────────────────────────────────────────────────────

WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    "reported": {"temperature": 1.0, "logprobs": 2},
}


@pytest.mark.parametrize("wish", WISHES)
def test_a_request_that_bars_every_token_ends_by_name_and_touches_nobody_else(wish: str) -> None:
    params = SamplingParams(allowed_token_ids=(7, 8), bad_words=((7,), (3, 8)), **WISHES[wish])
    chance = random.Random(0)
    chunks, logits = random_chunks(chance, 6), random_logits(6, 1)
    expected = draw([fresh(chunk) for chunk in chunks], logits)
    empty = make_chunk([1], [2, 3], params)
    row = torch.full((1, VOCABULARY), 5.0)
    mixed = [*map(fresh, chunks[:3]), empty, *map(fresh, chunks[3:])]
    collected = draw(mixed, torch.cat([logits[:3], row, logits[3:]]))
    assert [token for i, token in enumerate(collected.token_ids) if i != 3] == expected.token_ids
    ((failed, error),) = collected.failures
    assert failed is empty
    assert isinstance(error, InvalidRequest)
    assert error.field == "allowed_token_ids"
    assert error.message == (
        "after 2 output tokens every token is barred by allowed_token_ids and bad_words: allow more tokens, or leave "
        "out one of these fields"
    )


def test_a_grammar_that_allows_nothing_hears_of_no_token() -> None:
    matcher = Grammar(set())
    ((_, error),) = draw([make_chunk([1], [], SamplingParams(), matcher=matcher)], random_logits(1, 0)).failures
    assert "barred by structured_outputs" in error.message
    assert matcher.accepted == []


def test_min_tokens_is_named_only_until_they_have_come() -> None:
    params = SamplingParams(min_tokens=2, allowed_token_ids=(60, 61, 7), bad_words=((7,),))
    ((_, early),) = draw([make_chunk([1], [9], params)], random_logits(1, 0)).failures
    assert "barred by allowed_token_ids and bad_words and min_tokens" in early.message
    assert draw([make_chunk([1], [9, 9], params)], random_logits(1, 0)).failures == []


def test_a_batch_that_bars_nothing_does_not_look() -> None:
    sampler = make_sampler()
    for params in (SamplingParams(temperature=0), SamplingParams(repetition_penalty=1.2)):
        assert not launch(sampler, [make_chunk([1], [2], params)], random_logits(1, 0)).bars


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(5))
def test_a_mixture_gives_each_request_what_it_gets_alone(seed: int) -> None:
    chunks, logits = random_chunks(random.Random(100 + seed), 60), random_logits(60, seed)
    together = draw([fresh(chunk) for chunk in chunks], logits)
    assert together.logprobs is not None
    for row, chunk in enumerate(chunks):
        lone = draw([fresh(chunk)], logits[row : row + 1])
        assert lone.token_ids == [together.token_ids[row]]
        got = together.logprobs[row]
        assert (got is None) == (lone.logprobs is None)
        if lone.logprobs is not None and lone.logprobs[0] is not None:
            assert_logprob(got, lone.logprobs[0])


def test_a_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    params = SamplingParams(temperature=1.3, top_p=0.95)
    logits = random_logits(1, 5, spread=1.0)

    def follow(neighbours: int) -> list[int]:
        chance, sampler, output = random.Random(neighbours), make_sampler(), []
        for step in range(40):
            others = random_chunks(chance, neighbours)
            place = chance.randint(0, neighbours)
            chunks = [*others[:place], make_chunk([1, 2], output, params, seed=-7), *others[place:]]
            rows = random_logits(neighbours + 1, step)
            rows[place] = logits[0]
            output.append(sampler.collect(launch(sampler, chunks, rows), None).token_ids[place])
        return output

    alone = follow(0)
    assert follow(1) == follow(7) == alone
    assert len(set(alone)) > 10
