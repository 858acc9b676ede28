"""The engine over a fake runner: what it emits for each request, when it refuses, and what it counts."""

from __future__ import annotations

import pytest
from pagoda import engine as engine_module
from pagoda.engine import Refusal, StepResult, Stop
from pagoda.errors import InvalidRequest, Overloaded
from pagoda.protocol import Output, Usage
from unit.engine_rig import SESSION, Rig, ask, cancel
from unit.lone import lone_run, make_request

# ── outputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_tokens_come_one_by_one_and_usage_with_the_first_and_the_last(steps_ahead: int) -> None:
    rig = Rig(steps_ahead=steps_ahead)
    submit = ask(1, [1, 2, 3])
    rig.serve(submit)
    tokens, reason = lone_run(submit.request)
    usages = [Usage(3, 1, 0), None, None, Usage(3, 4, 0)]
    reasons = [None, None, None, reason]
    expected = [Output(1, i, [t], r, u) for i, (t, r, u) in enumerate(zip(tokens, reasons, usages, strict=True))]
    assert rig.outputs(1) == expected


def test_a_single_token_has_its_usage_once() -> None:
    rig = Rig()
    rig.serve(ask(1, [1, 2, 3], max_tokens=1))
    (only,) = rig.outputs(1)
    assert (only.index, only.finish_reason, only.usage) == (0, "length", Usage(3, 1, 0))


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_stop_id_is_given_out_and_ends_the_request(steps_ahead: int) -> None:
    """The one-step-ahead loop has run the request once more by then: nobody may see that."""
    tokens, _ = lone_run(make_request("a", [1, 2, 3], max_tokens=9))
    stop = tokens[4]
    rig = Rig(steps_ahead=steps_ahead)
    rig.serve(ask(1, [1, 2, 3], max_tokens=9, stop_ids=[stop]))
    assert [t for out in rig.outputs(1) for t in out.token_ids] == tokens[: tokens.index(stop) + 1]
    assert [out.finish_reason for out in rig.outputs(1)][-1] == "stop"
    assert rig.metrics.finished == {"stop": 1}


def test_cached_tokens_are_told_in_the_usage() -> None:
    rig = Rig()
    rig.serve(ask(1, range(9)), ask(2, [9]))
    rig.serve(ask(3, range(9)))
    assert [out.usage for out in rig.outputs(3) if out.usage] == [Usage(9, 1, 8), Usage(9, 4, 8)]


def test_one_event_holds_all_outputs_of_a_step() -> None:
    """A payload a step, however many requests a session has."""
    rig = Rig()
    rig.serve(ask(1, [1]), ask(2, [2]), ask(3, [3]))
    steps = [event for event in rig.events if isinstance(event, StepResult)]
    assert [len(step.outputs) for step in steps] == [3] * 4


def test_a_prefill_chunk_without_a_sample_emits_nothing() -> None:
    rig = Rig(max_num_batched_tokens=4)
    rig.serve(ask(1, range(12), max_tokens=1))
    assert rig.runner.num_launches == 3
    assert sum(isinstance(event, StepResult) for event in rig.events) == 1


# ── aborts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("launch", range(6))
def test_an_abort_emits_exactly_one_end_in_every_phase(launch: int, steps_ahead: int) -> None:
    """Request 2 waits, then prefills in three chunks, then decodes; its abort arrives during each step."""
    rig = Rig(steps_ahead=steps_ahead, max_num_batched_tokens=4)
    rig.script = {launch: [cancel(2)]}
    rig.serve(ask(1, range(4), max_tokens=9), ask(2, range(20, 29), max_tokens=9))
    outputs = rig.outputs(2)
    given = [t for out in outputs for t in out.token_ids]
    last = outputs[-1]
    assert [out.finish_reason for out in outputs].count("abort") == 1
    assert (last.finish_reason, last.token_ids, last.index) == ("abort", [], len(given))
    assert last.usage == Usage(9, len(given), 0)
    assert [out.index for out in outputs] == list(range(len(given) + 1))
    assert rig.outputs(1)[-1].finish_reason == "length", "the neighbour goes on"
    assert rig.metrics.finished == {"length": 1, "abort": 1}
    rig.engine.scheduler.pool.check([])


def test_an_abort_before_the_first_step() -> None:
    rig = Rig()
    rig.serve(ask(1, [1]), cancel(1))
    assert rig.outputs(1) == [Output(1, 0, [], "abort", Usage(1, 0, 0))]
    assert rig.runner.num_launches == 0


def test_an_abort_after_the_end_is_nothing() -> None:
    """Both ends cross on the wire all the time."""
    rig = Rig()
    rig.serve(ask(1, [1], max_tokens=1))
    rig.serve(cancel(1), cancel(7))
    assert len(rig.outputs(1)) == 1
    assert rig.outputs(7) == []
    assert rig.metrics.finished == {"length": 1}


def test_a_stop_string_counts_the_tokens_that_were_kept() -> None:
    rig = Rig()
    rig.script = {3: [cancel(1, reason="stop", tokens_kept=2)]}
    rig.serve(ask(1, [1], max_tokens=9))
    last = rig.outputs(1)[-1]
    assert (last.finish_reason, last.usage) == ("stop", Usage(1, 2, 0))


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_refuses_and_the_others_are_served() -> None:
    rig = Rig(max_num_queued_requests=2)
    rig.serve(ask(1, [1]), ask(2, [2]), ask(3, [3]))
    (refusal,) = [event for event in rig.events if isinstance(event, Refusal)]
    assert refusal.key == (SESSION, 3)
    assert isinstance(refusal.error, Overloaded)
    assert [rig.outputs(n)[-1].finish_reason for n in (1, 2)] == ["length", "length"]
    assert rig.outputs(3) == []


def test_a_request_beyond_the_pool_is_refused_and_the_others_are_served() -> None:
    rig = Rig(num_blocks=3, block_size=4)
    rig.serve(ask(1, range(9), max_tokens=9), ask(2, [2]))
    (refusal,) = [event for event in rig.events if isinstance(event, Refusal)]
    assert (refusal.key, type(refusal.error)) == ((SESSION, 1), InvalidRequest)
    assert rig.outputs(2)[-1].finish_reason == "length"


# ── metrics ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_snapshot_counts_what_happened() -> None:
    rig = Rig()
    rig.serve(ask(1, range(9)), ask(2, range(30, 35), max_tokens=2))
    rig.serve(ask(3, range(9), max_tokens=1))
    metrics = rig.metrics
    assert metrics.counters == {
        "num_preemptions_total": 0,
        "prefix_cache_queries_total": 23,
        "prefix_cache_hits_total": 8,
        "prompt_tokens_total": 23,
        "generation_tokens_total": 7,
        "engine_steps_total": 5,
    }
    assert metrics.finished == {"length": 3}
    observed = {name: sum(histogram.counts) for name, histogram in metrics.histograms.items()}
    assert observed == {
        "time_to_first_token_seconds": 3,
        "inter_token_latency_seconds": 4,
        "time_per_output_token_seconds": 2,
        "e2e_request_latency_seconds": 3,
        "request_queue_time_seconds": 3,
        "request_prefill_time_seconds": 3,
        "request_decode_time_seconds": 3,
        "request_inference_time_seconds": 3,
        "request_prompt_tokens": 3,
        "request_generation_tokens": 3,
        "iteration_tokens_total": 5,
    }
    assert metrics.histograms["iteration_tokens_total"].sum == 14 + 2 + 1 + 1 + 1
    assert metrics.histograms["request_generation_tokens"].sum == 7


def test_gauges_show_a_running_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "METRICS_INTERVAL", 0.0)
    rig = Rig(max_num_seqs=1, num_blocks=8)
    rig.put(ask(1, range(8), max_tokens=4), ask(2, [1]), Stop())
    rig.engine.run()
    assert rig.metrics.gauges == {
        "num_requests_running": 1,
        "num_requests_waiting": 1,
        "kv_cache_usage_perc": 2 / 8,
        "gpu_cache_usage_perc": 2 / 8,
        "kv_cache_waste_perc": 0,
    }


def test_an_idle_engine_shows_nothing_that_has_ended() -> None:
    """A gauge that stays where the last request left it alarms somebody at night."""
    rig = Rig()
    rig.serve(ask(1, range(9)))
    assert set(rig.metrics.gauges.values()) == {0}


def test_a_snapshot_is_not_changed_by_what_comes_after() -> None:
    rig = Rig()
    rig.serve(ask(1, [1]))
    before = rig.metrics
    rig.serve(ask(2, [2]))
    assert before.finished == {"length": 1}
    assert sum(before.histograms["iteration_tokens_total"].counts) == 4
