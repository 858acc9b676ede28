"""The scheduler over a block pool: each promise by example, all of them by a state machine."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from pagoda.errors import InvalidRequest, Overloaded
from pagoda.plan import Plan
from pagoda.request import MAX_PREEMPTIONS, Request, Status
from pagoda.sampling_params import SamplingParams
from unit.audit import audit
from unit.lone import lone_run, make_group, make_request
from unit.loop import Loop, make_loop
from unit.memory_machine import MemoryMachine
from unit.planted_faults import FAULTS, Fault

MACHINE = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def shape(plan: Plan) -> list[tuple[object, int, int]]:
    return [(c.request.key, c.start, c.count) for c in plan.chunks]


def add(loop: Loop, key: str, prompt: int | list[int], **rest: object) -> Request:
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    request = make_request(key, tokens, **rest)  # type: ignore[arg-type]
    loop.add(request)
    return request


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


# ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_max_tokens_costs_no_step_too_many(steps_ahead: int) -> None:
    """The length is known beforehand: a step that would be dropped is not launched."""
    loop = make_loop(steps_ahead=steps_ahead)
    add(loop, "a", 3, max_tokens=5)
    loop.drain()
    assert loop.runner.num_launches == 5
    assert len(loop.ledger.given["a"]) == 5


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_stop_id_ends_a_request_and_drops_what_ran_too_far(steps_ahead: int) -> None:
    loop = make_loop(steps_ahead=steps_ahead)
    tokens, _ = lone_run(make_request("a", [0, 1, 2]))
    request = add(loop, "a", 3, stop_ids=[tokens[2]])
    loop.drain()
    assert loop.ledger.given["a"] == tokens[: tokens.index(tokens[2]) + 1]
    assert loop.ledger.reasons == {"a": "stop"}
    assert loop.runner.num_launches == len(loop.ledger.given["a"]) + steps_ahead
    assert request.finish_reason == "stop"
    loop.scheduler.pool.check([])


def test_a_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    loop = make_loop()
    tokens, _ = lone_run(make_request("a", [0], max_tokens=1))
    add(loop, "a", 1, max_tokens=1, stop_ids=tokens)
    loop.drain()
    assert loop.ledger.reasons == {"a": "stop"}


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_abort_frees_everything_at_once_in_every_phase(steps: int, steps_ahead: int) -> None:
    """Waiting, in the middle of its prefill, and decoding, with and without a step in flight."""
    loop = make_loop(max_num_batched_tokens=4, steps_ahead=steps_ahead)
    request = add(loop, "a", 10)
    for _ in range(steps):
        loop.step()
    loop.abort("a")
    assert (request.status, request.block_ids, loop.scheduler.pool.num_owned) == (Status.FINISHED, [], 0)
    given = list(loop.ledger.given["a"])
    loop.drain()
    assert loop.ledger.given["a"] == given
    assert not loop.launch()


def test_abort_of_an_ended_or_unknown_request_is_nothing() -> None:
    loop = make_loop()
    add(loop, "a", 1, max_tokens=1)
    loop.drain()
    assert loop.scheduler.abort("a") is None
    assert loop.scheduler.abort("b") is None


def test_a_key_can_be_used_again_after_its_end() -> None:
    """What is in flight for the first must not reach the second."""
    loop = make_loop(steps_ahead=1)
    add(loop, "a", 3)
    for _ in range(3):
        loop.step()
    loop.scheduler.abort("a")
    loop.ledger.requests.clear()
    loop.ledger.given.clear()
    add(loop, "a", [9, 9])
    loop.drain()
    loop.ledger.check_complete()


def test_a_full_queue_refuses_at_once_and_says_why() -> None:
    loop = make_loop(max_num_seqs=1, max_num_queued_requests=2)
    add(loop, "a", 1)
    loop.step()
    add(loop, "b", 1)
    add(loop, "c", 1)
    with pytest.raises(Overloaded, match="max_num_queued_requests 2"):
        loop.scheduler.add(make_request("d", [1]))
    assert list(loop.scheduler.requests) == ["a", "b", "c"]
    loop.abort("b")
    add(loop, "e", 1)
    loop.drain()
    loop.ledger.check_complete()


def test_waiting_tokens_are_bounded_but_a_single_prompt_is_never_too_long() -> None:
    loop = make_loop(max_num_seqs=1, max_num_queued_tokens=10)
    add(loop, "a", 20)
    loop.step()
    add(loop, "b", 6)
    with pytest.raises(Overloaded, match="6 tokens are waiting and this request has 5"):
        loop.scheduler.add(make_request("c", range(5)))
    add(loop, "d", 4)
    loop.abort("b")
    add(loop, "e", 6)
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


def test_the_lowest_priority_is_preempted_first_then_the_newest() -> None:
    loop = make_loop(num_blocks=8, block_size=4)
    for key, priority in [("a", 0), ("low", 5), ("b", 0)]:
        add(loop, key, [len(key)] * 6, max_tokens=20, priority=priority)
    preempted: list[object] = []
    while loop.scheduler.requests:
        before = {r.key: r.epoch for r in loop.scheduler.requests.values()}
        loop.step()
        preempted += [r.key for r in loop.scheduler.requests.values() if r.epoch > before.get(r.key, 0)]
    assert preempted[:2] == ["low", "b"]


def test_a_request_is_preempted_a_bounded_number_of_times() -> None:
    """Then it keeps all the blocks it may ever need."""
    loop = make_loop(num_blocks=10, block_size=2, max_num_seqs=4)
    victim = add(loop, "victim", [1, 1], max_tokens=18, priority=100)
    for turn in range(6):
        while victim.status is Status.WAITING:
            loop.step()
        for key in "xyz":
            add(loop, f"{key}{turn}", [2, 2, 3], max_tokens=6)
        for _ in range(6):
            loop.step()
    loop.drain()
    loop.ledger.check_complete()
    assert victim.epoch == MAX_PREEMPTIONS


# ── deadlines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_ends_a_request_in_every_state() -> None:
    loop = make_loop(max_num_seqs=1, max_num_batched_tokens=4)
    late = [add(loop, "running", 3, max_tokens=40, timeout=1.0), add(loop, "waiting", 3, timeout=1.0)]
    add(loop, "patient", 3, max_tokens=2, timeout=1000.0)
    loop.step()
    assert loop.scheduler.expire() == []
    loop.scheduler.clock.now += 1.0  # type: ignore[attr-defined]
    loop.expire()
    assert [r.status for r in late] == [Status.FINISHED] * 2
    loop.drain()
    assert loop.ledger.reasons == {"running": "abort", "waiting": "abort", "patient": "length"}
    assert not loop.scheduler._deadlines


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


# ── one step ahead ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_whose_next_token_depends_on_the_last_waits_for_it_alone() -> None:
    loop = make_loop(steps_ahead=1)
    add(loop, "waits", 3, waits=True)
    add(loop, "runs", 3)
    steps = [[key for key, _, _ in shape(loop.step())] for _ in range(5)]
    assert steps == [["waits", "runs"], ["runs"], ["waits", "runs"], ["runs"], ["waits", "runs"]]
    loop.drain()


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


# ── preemption ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_the_newest_is_preempted_and_continues_as_if_nothing_had_been(steps_ahead: int) -> None:
    loop = make_loop(num_blocks=5, block_size=4, steps_ahead=steps_ahead)
    old = add(loop, "old", 4, max_tokens=12)
    new = add(loop, "new", [9, 9, 9, 9], max_tokens=12)
    while loop.scheduler.requests:
        loop.step()
        audit(loop.runner)
    loop.drain()
    assert loop.scheduler.counters.preemptions >= 1
    assert (old.epoch, new.epoch >= 1) == (0, True)
    assert list(loop.ledger.reasons) == ["old", "new"]


def test_a_preempted_request_keeps_its_place() -> None:
    loop = make_loop(num_blocks=4, block_size=4)
    for key, token in [("a", 1), ("b", 2)]:
        add(loop, key, [token] * 4, max_tokens=12)
    while not loop.scheduler.counters.preemptions:
        loop.step()
    add(loop, "c", [3])
    loop.drain()
    assert list(loop.ledger.reasons) == ["a", "b", "c"]


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    """Recomputation costs what was lost to others, not all."""
    loop = make_loop(num_blocks=8, block_size=4)
    add(loop, "a", 4, max_tokens=20)
    victim = add(loop, "b", [9] * 12, max_tokens=12)
    while not victim.epoch:
        loop.step()
    start = None
    while start is None:
        start = next((c.start for c in loop.step().chunks if c.request is victim), None)
    assert start > 0
    assert victim.num_cached == 0, "the first admission alone counts as a hit"
    loop.drain()


def test_a_fork_never_copies_what_its_own_step_computes() -> None:
    """A leader that comes back after a preemption may share blocks which another request fills in the same step."""
    loop = make_loop(num_blocks=6, block_size=2)
    loop.add(make_group(["leader", "fork"], [1, 2], max_tokens=4))
    loop.step()
    loop.scheduler.preempt()
    add(loop, "evicts all", [9] * 11, max_tokens=1, priority=-9)
    loop.step()
    add(loop, "other", [1, 2, 3], priority=-9)
    plan = loop.step()
    assert {c.request.key for c in plan.chunks} == {"leader", "fork", "other"}
    loop.drain()


# ── times ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_times_follow_one_another_and_first_ones_survive_preemption() -> None:
    loop = make_loop(num_blocks=5, block_size=4)
    for key, token in [("a", 1), ("b", 2)]:
        add(loop, key, [token] * 4, max_tokens=12)
    loop.drain()
    assert loop.scheduler.counters.preemptions
    for request in loop.ledger.requests.values():
        scheduled, first = request.first_scheduled_time, request.first_token_time
        assert scheduled is not None
        assert first is not None
        assert 0 < request.arrival_time < scheduled < first < request.last_token_time


# ── all of it ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_state_machine() -> None:
    """Any order of add, launch, read back and abort leaves the memory whole and every answer as its lone run's."""
    run_state_machine_as_test(MemoryMachine, settings=MACHINE)


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_the_state_machine_sees(fault: Fault) -> None:
    """A check that lets a planted fault pass proves nothing. It ends at the first example that shows the fault; what is
    drawn varies with the modules imported beside this one, so the rare one gets many."""

    class Faulty(MemoryMachine):
        pool_class = fault.pool
        allocator_class = fault.allocator
        scheduler_class = fault.scheduler

    with fault.patch(), pytest.raises((AssertionError, IndexError, ValueError, KeyError)):
        run_state_machine_as_test(Faulty, settings=settings(MACHINE, phases=[Phase.generate], max_examples=4000))


def test_aborted_waiting_requests_are_forgotten() -> None:
    """Clients that come and go before a busy engine must not fill its memory."""
    loop = make_loop(max_num_seqs=1)
    add(loop, "busy", 1, max_tokens=60)
    loop.step()
    for n in range(2_000):
        add(loop, str(n), 8)
        loop.abort(str(n))
    assert len(loop.scheduler.waiting._ready._heap) < 200


def test_a_live_key_cannot_be_used_twice() -> None:
    """The first request could never be aborted again."""
    loop = make_loop()
    add(loop, "a", 1)
    with pytest.raises(ValueError, match="live already"):
        loop.scheduler.add(make_request("a", [2]))
