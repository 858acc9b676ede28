"""The scheduler over a block pool: what runs in a step, how much of it, and in which order requests enter."""

from __future__ import annotations

import pytest
from pagoda.errors import InvalidRequest
from unit.lone import make_request
from unit.loop import add, make_loop, shape

# ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_idle_scheduler_plans_nothing() -> None:
    assert not make_loop().launch()


def test_a_long_prompt_runs_in_chunks_of_the_budget_and_is_sampled_once() -> None:
    loop = make_loop(max_num_batched_tokens=4)
    add(loop, "a", 10, max_tokens=2)
    plans = [loop.step() for _ in range(4)]
    assert [shape(p) for p in plans] == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 2)], [("a", 10, 1)]]
    assert [[c.samples for c in p.chunks] for p in plans] == [[False], [False], [True], [True]]
    assert loop.ledger.reasons == {"a": "length"}


def test_decodes_come_first_and_a_long_prompt_takes_what_is_left() -> None:
    """A running stream must not wait for somebody's prompt."""
    loop = make_loop(max_num_batched_tokens=4)
    add(loop, "a", 2)
    loop.step()
    add(loop, "b", 9)
    assert shape(loop.step()) == [("a", 2, 1), ("b", 0, 3)]
    add(loop, "c", 1)
    assert shape(loop.step()) == [("a", 3, 1), ("b", 3, 3)]
    assert shape(loop.step()) == [("a", 4, 1), ("b", 6, 3)]
    assert shape(loop.step()) == [("a", 5, 1), ("b", 9, 1), ("c", 0, 1)]


def test_prompts_take_less_of_a_step_in_which_streams_go_on() -> None:
    loop = make_loop(max_num_batched_tokens=12, max_num_mixed_tokens=5)
    add(loop, "a", 14, max_tokens=2)
    assert [shape(loop.step()) for _ in range(2)] == [[("a", 0, 12)], [("a", 12, 2)]]
    loop.scheduler.add(make_request("b", range(100, 120)))
    assert shape(loop.step()) == [("a", 14, 1), ("b", 0, 4)]
    assert shape(loop.step()) == [("b", 4, 12)]


def test_a_one_token_prompt_is_a_prefill_then_a_decode() -> None:
    loop = make_loop()
    add(loop, "a", 1)
    first, second = loop.step(), loop.step()
    assert (shape(first), first.num_decodes) == ([("a", 0, 1)], 0)
    assert (shape(second), second.num_decodes) == ([("a", 1, 1)], 1)


def test_no_more_than_max_num_seqs_run_and_the_rest_wait_in_order() -> None:
    loop = make_loop(max_num_seqs=2)
    for key in "abc":
        add(loop, key, 1, max_tokens=2 if key == "a" else 9)
    assert [r[0] for r in shape(loop.step())] == ["a", "b"]
    assert len(loop.scheduler.waiting) == 1
    loop.step()
    assert [r[0] for r in shape(loop.step())] == ["b", "c"]


def test_a_big_request_at_the_head_is_not_overtaken() -> None:
    """Small ones that slip past would starve it."""
    loop = make_loop(num_blocks=8)
    add(loop, "a", 16, max_tokens=8)
    loop.step()
    add(loop, "big", [7] * 24)
    add(loop, "small", [8])
    while "a" not in loop.ledger.reasons:
        assert [r[0] for r in shape(loop.step())] == ["a"]
    assert [r[0] for r in shape(loop.step())] == ["big", "small"]


def test_a_request_of_the_whole_pool_runs() -> None:
    """The pool fits one request of max_model_len, and not a block more is asked for."""
    loop = make_loop(num_blocks=3, block_size=4)
    request = add(loop, "a", 1, max_tokens=11)
    most = 0
    while loop.scheduler.requests:
        loop.step()
        most = max(most, len(request.block_ids))
    assert most == 3
    assert loop.scheduler.counters.preemptions == 0


def test_a_request_beyond_the_whole_pool_is_refused_and_told_by_how_much() -> None:
    """Admitted, it would wait for ever and hold up whoever comes after it."""
    loop = make_loop(num_blocks=3, block_size=4)
    with pytest.raises(InvalidRequest, match=r"prompt \(5 tokens\) and max_tokens \(10\) .* 12 tokens by 3: shorten"):
        add(loop, "a", 5, max_tokens=10)
    add(loop, "b", 5, max_tokens=7)
    loop.drain()
    loop.ledger.check_complete()


# ── priorities ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lower_priority_number_enters_first() -> None:
    loop = make_loop(max_num_seqs=1)
    add(loop, "running", 1, max_tokens=3)
    loop.step()
    for key, priority in [("late", 1), ("first", -1), ("plain", 0)]:
        add(loop, key, 1, max_tokens=1, priority=priority)
    loop.drain()
    assert list(loop.ledger.reasons) == ["running", "first", "plain", "late"]


def test_waiting_outweighs_priority() -> None:
    """Ten seconds a level: whoever waits long enough is overtaken no more."""
    loop = make_loop(max_num_seqs=1)
    add(loop, "running", 1, max_tokens=4)
    loop.step()
    add(loop, "patient", 1, max_tokens=1, priority=1)
    loop.scheduler.clock.now += 10.0  # type: ignore[attr-defined]
    add(loop, "urgent", 1, max_tokens=1, priority=0)
    loop.drain()
    assert list(loop.ledger.reasons) == ["running", "patient", "urgent"]


# ── one step ahead ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_whose_next_token_depends_on_the_last_waits_for_it_alone() -> None:
    loop = make_loop(steps_ahead=1)
    add(loop, "waits", 3, waits=True)
    add(loop, "runs", 3)
    steps = [[key for key, _, _ in shape(loop.step())] for _ in range(5)]
    assert steps == [["waits", "runs"], ["runs"], ["waits", "runs"], ["runs"], ["waits", "runs"]]
    loop.drain()
