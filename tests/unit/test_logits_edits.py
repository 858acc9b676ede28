"""What a step's requests change in their logits, gathered: who is named, and what is kept from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pagoda.errors import EngineFailure, InvalidRequest
from pagoda.logits_edits import EditsBuilder, Seen
from pagoda.plan import Chunk
from pagoda.request import Request, Status
from pagoda.sampling_params import SamplingParams
from pagoda_kernels import LogitsEdits

CPU = torch.device("cpu")
VOCABULARY = 70
STOP = frozenset({60, 61})


def make_chunk(prompt: list[int], output: list[int], **params: Any) -> Chunk:
    request = Request("key", prompt, SamplingParams(**params), 100, STOP, seed=0, status=Status.RUNNING)
    request.token_ids += output
    return Chunk(request, len(request.token_ids) - 1, 1, True, False, 0)


def build(*chunks: Chunk) -> LogitsEdits:
    edits, failures = EditsBuilder(VOCABULARY).build(list(chunks), CPU)
    assert edits is not None
    assert not failures
    return edits


def seen(edits: LogitsEdits) -> dict[tuple[int, int], int]:
    """Counts by row and token."""
    assert edits.penalties is not None
    p = edits.penalties
    triples = zip(p.rows.tolist(), p.tokens.tolist(), p.counts.tolist(), strict=True)
    return {(row, token): count for row, token, count in triples}


def bias(edits: LogitsEdits) -> dict[tuple[int, int], float]:
    assert edits.bias is not None
    b = edits.bias
    return {(r, t): v for r, t, v in zip(b.rows.tolist(), b.tokens.tolist(), b.values.tolist(), strict=True)}


def banned(output: list[int], **params: Any) -> set[int]:
    """What must not come next, after the prompt 1, 2."""
    edits = build(make_chunk([1, 2], output, **params))
    return {token for (_, token), value in bias(edits).items() if value == float("-inf")} if edits.bias else set()


def allowed(edits: LogitsEdits, row: int) -> set[int] | None:
    """The tokens that may come next, None for all."""
    assert edits.allowed is not None
    place = int(edits.allowed.rows[row])
    if place < 0:
        return None
    words = edits.allowed.bits[place].tolist()
    return {32 * i + j for i, word in enumerate(words) for j in range(32) if word >> j & 1}


def test_a_step_without_wishes_has_no_edits() -> None:
    plain = make_chunk([1], [2], temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, logprobs=3, seed=4)
    assert EditsBuilder(VOCABULARY).build([plain], CPU) == (None, [])


def test_only_groups_that_somebody_asks_for_are_made() -> None:
    edits = build(make_chunk([1], [2]), make_chunk([1], [2], logit_bias={3: 1.0}))
    assert edits.penalties is None
    assert edits.allowed is None
    assert bias(edits) == {(1, 3): 1.0}


def test_a_repetition_sees_prompt_and_output_other_penalties_the_output_alone() -> None:
    chunks = [
        make_chunk([5, 6, 5], [6, 7, 7], repetition_penalty=1.5),
        make_chunk([5, 6, 5], [6, 7, 7]),
        make_chunk([5, 6, 5], [6, 7, 7], frequency_penalty=0.5),
        make_chunk([5, 6, 5], [], presence_penalty=0.5),
    ]
    assert seen(build(*chunks)) == {(0, 5): 0, (0, 6): 1, (0, 7): 2, (2, 6): 1, (2, 7): 2}


def test_counts_follow_the_output_and_survive_a_preemption() -> None:
    builder = EditsBuilder(VOCABULARY)
    chunk = make_chunk([5], [], repetition_penalty=2.0)
    request = chunk.request
    for token in [7, 7, 5, 8]:
        builder.build([chunk], CPU)
        request.token_ids.append(token)
    request.epoch += 1
    edits, _ = builder.build([Chunk(request, 0, 5, True, False, 1)], CPU)
    assert edits is not None
    assert seen(edits) == {(0, 5): 1, (0, 7): 2, (0, 8): 1}


def test_more_distinct_tokens_than_the_first_memory_holds() -> None:
    chunk = make_chunk(list(range(1000)), [*range(500, 1500), 500], repetition_penalty=2.0)
    follower = Seen()
    follower.follow(chunk.request)
    count = len(follower.index)
    counted = dict(zip(follower.tokens[:count].tolist(), follower.counts[:count].tolist(), strict=True))
    assert counted == {t: int(t >= 500) + int(t == 500) for t in range(1500)}


def test_ended_requests_are_forgotten() -> None:
    builder = EditsBuilder(VOCABULARY)
    chunks = [make_chunk([1], [2], presence_penalty=1.0) for _ in range(5)]
    builder.build(chunks, CPU)
    for chunk in chunks[:4]:
        chunk.request.status = Status.FINISHED
    builder.build([chunks[4], make_chunk([1], [], presence_penalty=1.0)], CPU)
    assert len(builder._seen) == 2


@pytest.mark.parametrize(("num_output", "expected"), [(0, STOP), (2, STOP), (3, set()), (4, set())])
def test_min_tokens_bans_every_stop_id_until_then(num_output: int, expected: set[int]) -> None:
    assert banned([9] * num_output, min_tokens=3) == expected


def test_a_ban_outweighs_a_bias() -> None:
    edits = build(make_chunk([1], [], min_tokens=1, bad_words=((7,),), logit_bias={60: 100.0, 7: 100.0, 8: 2.0}))
    never = float("-inf")
    assert bias(edits) == {(0, 60): never, (0, 61): never, (0, 7): never, (0, 8): 2.0}


@pytest.mark.parametrize(
    ("output", "words", "expected"),
    [
        ([], [(7,)], {7}),
        ([7], [(7,), (8,)], {7, 8}),
        ([], [(7, 8)], set()),
        ([7], [(7, 8)], {8}),
        ([7, 9], [(7, 8)], set()),
        ([8, 7], [(7, 8), (8, 7, 9), (7, 7, 6)], {8, 9}),
        ([7, 7], [(7, 7, 7)], {7}),
        ([2], [(1, 2, 3)], set()),  # the 1 is in the prompt: words are looked for in the output
        ([], [(2, 3)], set()),
        ([3], [(2, 3, 4)], set()),
        ([7, 8, 9], [(8, 9, 8), (9, 8), (7, 8, 9, 8), (7, 9, 5)], {8}),
    ],
)
def test_bad_words_ban_the_token_that_would_complete_them(
    output: list[int], words: list[tuple[int, ...]], expected: set[int]
) -> None:
    assert banned(output, bad_words=tuple(words)) == expected


class Grammar:
    """Allows what it is given; fails when told to."""

    is_finished = False

    def __init__(self, tokens: set[int], error: Exception | None = None) -> None:
        self.tokens, self.error = tokens, error

    def fill(self, row: Any) -> None:
        if self.error is not None:
            row.fill(-1)
            raise self.error
        for token in self.tokens:
            row.view("uint32")[token // 32] |= 1 << (token % 32)

    def accept(self, token_id: int) -> bool:
        return token_id in self.tokens


def test_lists_and_grammars_are_combined() -> None:
    listed = make_chunk([1], [], allowed_token_ids=(0, 31, 32, 69))
    free = make_chunk([1], [])
    both = make_chunk([1], [], allowed_token_ids=(31, 32, 5))
    both.request.matcher = Grammar({5, 32, 63})
    grammar = make_chunk([1], [], logit_bias={1: 1.0})
    grammar.request.matcher = Grammar({64, 2})
    edits = build(listed, free, both, grammar)
    assert [allowed(edits, row) for row in range(4)] == [{0, 31, 32, 69}, None, {5, 32}, {2, 64}]


def test_a_grammar_that_fails_is_named_and_masks_nothing() -> None:
    error = InvalidRequest("the grammar is too large", field="structured_outputs")
    good, bad = (make_chunk([1], [], logit_bias={1: 1.0}) for _ in range(2))
    good.request.matcher, bad.request.matcher = Grammar({3}), Grammar({4}, error)
    edits, failures = EditsBuilder(VOCABULARY).build([bad, good], CPU)
    assert failures == [(bad, error)]
    assert edits is not None
    assert [allowed(edits, row) for row in range(2)] == [None, {3}]


def test_an_error_that_nobody_foresaw_is_its_own_request_s() -> None:
    """The engine serves others, who must not end by it; what it says inside is not for a client."""
    good, bad = (make_chunk([1, 2], [5], presence_penalty=1.0, logit_bias={1: 1.0}) for _ in range(2))
    bad.request.matcher = Grammar({4}, RuntimeError("a secret"))
    edits, ((failed, error),) = EditsBuilder(VOCABULARY).build([bad, good], CPU)
    assert failed is bad
    assert isinstance(error, EngineFailure)
    assert "secret" not in error.message
    assert edits is not None
    assert seen(edits)[1, 5] == 1
