"""Blocks that requests share in the scheduler: several answers to one prompt, and prompts seen before."""

from __future__ import annotations

import pytest
from pagoda.errors import Overloaded
from pagoda.sampling_params import SamplingParams
from unit.audit import audit
from unit.lone import make_group, make_request
from unit.loop import add, make_loop, shape

# ── several answers to one prompt ─────────────────────────────────────────────────────────────────────────────────────


def test_forks_share_the_prompt_and_copy_at_most_one_block() -> None:
    """Ten tokens in blocks of four: two blocks are shared, the third is copied, one token is computed."""
    loop = make_loop()
    loop.add(make_group("abc", range(10), max_tokens=3))
    assert shape(loop.step()) == [("a", 0, 10)]
    plan = loop.step()
    assert shape(plan) == [("a", 10, 1), ("b", 9, 1), ("c", 9, 1)]
    a, b, c = (loop.scheduler.requests[key] for key in "abc")
    assert a.block_ids[:2] == b.block_ids[:2] == c.block_ids[:2]
    assert plan.copies == [(a.block_ids[2], b.block_ids[2]), (a.block_ids[2], c.block_ids[2])]
    loop.drain()
    loop.ledger.check_complete()


def test_forks_of_whole_blocks_copy_only_when_the_last_token_is_inside_one() -> None:
    """Nine tokens: the last one begins a block of its own."""
    loop = make_loop(enable_prefix_caching=False)
    loop.add(make_group("ab", range(9), max_tokens=2))
    loop.step()
    plan = loop.step()
    assert (shape(plan), plan.copies) == ([("a", 9, 1), ("b", 8, 1)], [])
    loop.drain()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_forks_of_an_aborted_request_go_on_without_it(steps: int) -> None:
    """Queued, in the middle of its prompt, and decoding."""
    loop = make_loop(max_num_batched_tokens=6)
    loop.add(make_group("abc", range(10), max_tokens=3))
    for _ in range(steps):
        loop.step()
    loop.abort("a")
    loop.drain()
    assert loop.ledger.reasons == {"a": "abort", "b": "length", "c": "length"}


def test_a_group_is_taken_whole_or_not_at_all() -> None:
    loop = make_loop(max_num_seqs=1, max_num_queued_requests=3)
    loop.add(make_group("xy", [1]))
    with pytest.raises(Overloaded):
        loop.scheduler.add(make_group("abc", [1]))
    assert list(loop.scheduler.requests) == ["x", "y"]
    loop.drain()


def test_an_empty_queue_takes_more_answers_than_it_holds() -> None:
    """Told to try again later, such a request would try for ever."""
    loop = make_loop(max_num_seqs=1, max_num_queued_requests=2)
    loop.add(make_group("abc", [1]))
    with pytest.raises(Overloaded):
        loop.scheduler.add(make_request("d", [1]))
    loop.drain()
    loop.ledger.check_complete()


# ── prefix cache ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_seen_before_is_computed_from_its_last_block() -> None:
    """The last token always runs: its logits are the answer's first."""
    loop = make_loop()
    add(loop, "a", 12, max_tokens=1)
    loop.drain()
    again = add(loop, "b", 12, max_tokens=1)
    assert shape(loop.step()) == [("b", 8, 4)]
    assert again.num_cached == 8
    assert (loop.scheduler.counters.prefix_queried_tokens, loop.scheduler.counters.prefix_hit_tokens) == (24, 8)


def test_requests_side_by_side_share_their_common_prompt() -> None:
    loop = make_loop()
    a = add(loop, "a", [*range(8), 1])
    loop.step()
    b = add(loop, "b", [*range(8), 2])
    loop.step()
    assert a.block_ids[:2] == b.block_ids[:2]
    assert loop.scheduler.pool.num_owned == 4
    audit(loop.runner)
    loop.drain()


def test_an_answer_is_a_prefix_too() -> None:
    """The next turn of a conversation finds what the last one generated."""
    loop = make_loop()
    first = add(loop, "a", 6, max_tokens=7)
    loop.drain()
    second = add(loop, "b", [*first.token_ids, 1, 2])
    loop.step()
    assert second.num_cached == 12
    loop.drain()


def test_other_salts_share_nothing() -> None:
    loop = make_loop()
    for key, salt in [("a", "a"), ("b", "b"), ("c", "a")]:
        add(loop, key, 9, max_tokens=1, salt=salt)
        loop.drain()
    assert [r.num_cached for r in loop.ledger.requests.values()] == [0, 0, 8]


def test_without_prefix_caching_nothing_is_kept_or_counted() -> None:
    loop = make_loop(enable_prefix_caching=False)
    for key in "ab":
        add(loop, key, 9, max_tokens=1)
        loop.drain()
    assert [r.num_cached for r in loop.ledger.requests.values()] == [0, 0]
    assert loop.scheduler.counters.prefix_queried_tokens == 0


def test_only_what_is_looked_up_counts_as_looked_up() -> None:
    """A prompt whose log-probabilities are wanted is computed whatever the cache holds."""
    loop = make_loop()
    request = add(loop, "a", 9, max_tokens=1)
    loop.drain()
    again = make_request("b", range(9), max_tokens=1)
    again.params = SamplingParams(prompt_logprobs=1)
    loop.add(again)
    loop.drain()
    assert (request.num_cached, again.num_cached) == (0, 0)
    assert loop.scheduler.counters.prefix_queried_tokens == 9


def test_check_sees_a_block_with_the_hash_of_other_tokens() -> None:
    """Such a block would answer one tenant from another's prompt."""
    loop = make_loop()
    request = add(loop, "a", 9)
    loop.step()
    request.hashes[1] = b"another"
    with pytest.raises(AssertionError, match="has another's hash"):
        loop.scheduler.check()
