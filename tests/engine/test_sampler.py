"""The sampler's room: every parameter through launch and collect, over chunks as a scheduler makes them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pagoda_kernels
import pytest
import torch
from pagoda import wishes
from pagoda.errors import EngineFailure, InvalidRequest, PagodaError
from pagoda.plan import Chunk, Collected
from pagoda.protocol import TokenLogprob
from pagoda.request import Request, Status
from pagoda.sampler import MAX_SCORED_ROWS, Draw, Sampler
from pagoda.sampling_params import SamplingParams, Structure
from pagoda_kernels import SamplingBatch
from torch import Tensor

CPU = torch.device("cpu")
VOCABULARY = 70
STOP = frozenset({60, 61})
NEVER = float("-inf")
DRAWS = 20_000


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


def make_sampler(sample: Callable[[Tensor, SamplingBatch], Tensor] | None = None) -> Sampler:
    ops = pagoda_kernels.for_device(CPU)
    return Sampler(ops if sample is None else replace(ops, sample=sample), CPU, VOCABULARY)


def launch(sampler: Sampler, chunks: list[Chunk], logits: Tensor) -> Draw:
    return sampler.launch(chunks, wishes.of(chunk.request for chunk in chunks), logits)


def draw(chunks: list[Chunk], logits: Tensor) -> Collected:
    sampler = make_sampler()
    return sampler.collect(launch(sampler, chunks, logits.clone()), None)


def edited(chunks: list[Chunk], logits: Tensor) -> Tensor:
    """The logits [S, V] that tokens are drawn from."""
    kept: list[Tensor] = []

    def watch(edited_logits: Tensor, params: SamplingBatch) -> Tensor:
        kept.append(edited_logits.clone())
        return edited_logits.argmax(dim=-1)

    launch(make_sampler(watch), chunks, logits.clone())
    return kept[0]


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


# ── edits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── log-probabilities ─────────────────────────────────────────────────────────────────────────────────────────────


def expected_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """By sorting, in float64; equal logits in the order of their ids."""
    logprobs = logits.double().log_softmax(dim=-1).tolist()
    order = sorted(range(len(logprobs)), key=lambda t: (-float(logits[t]), t))
    rank = 1 + sum(bool(other > logits[token]) for other in logits)
    return TokenLogprob(token, logprobs[token], rank, [(t, logprobs[t]) for t in order[:count]])


def assert_logprob(got: TokenLogprob | None, expected: TokenLogprob) -> None:
    assert got is not None
    assert (got.token_id, got.rank) == (expected.token_id, expected.rank)
    assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [token for token, _ in got.top] == [token for token, _ in expected.top]
    assert [value for _, value in got.top] == pytest.approx([value for _, value in expected.top], abs=1e-5)


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


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────


def fresh(chunk: Chunk) -> Chunk:
    """The same chunk, with a grammar that has not heard of any token."""
    matcher = chunk.request.matcher
    again = Grammar(*matcher.places) if isinstance(matcher, Grammar) else None
    prompt = chunk.request.prompt_ids
    return make_chunk(prompt, chunk.request.token_ids[len(prompt) :], chunk.request.params, chunk.request.seed, again)


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


# ── distributions ─────────────────────────────────────────────────────────────────────────────────────────────────


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
