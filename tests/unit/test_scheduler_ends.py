"""How requests end in the scheduler and which it refuses: lengths, stops, aborts, deadlines, and a full queue."""

from __future__ import annotations

import pytest
from pagoda.errors import Overloaded
from pagoda.request import Status
from unit.lone import lone_run, make_request
from unit.loop import add, make_loop


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


def test_aborted_waiting_requests_are_forgotten() -> None:
    """Clients that come and go before a busy engine must not fill its memory."""
    loop = make_loop(max_num_seqs=1)
    add(loop, "busy", 1, max_tokens=60)
    loop.step()
    for n in range(2_000):
        add(loop, str(n), 8)
        loop.abort(str(n))
    assert len(loop.scheduler.waiting._ready._heap) < 200


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


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_live_key_cannot_be_used_twice() -> None:
    """The first request could never be aborted again."""
    loop = make_loop()
    add(loop, "a", 1)
    with pytest.raises(ValueError, match="live already"):
        loop.scheduler.add(make_request("a", [2]))
