"""The engine's loop over a fake runner: what it emits for each request, when it refuses, counts, sleeps and ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
from pagoda import engine as engine_module
from pagoda.engine import Cancel, Command, Engine, Event, Refusal, StepResult, Stop, Submit
from pagoda.errors import InvalidRequest, Overloaded
from pagoda.plan import Plan
from pagoda.protocol import Metrics, Output, Usage
from pagoda.request import Request
from unit.fake_runner import FakeLaunched, FakeRunner
from unit.lone import lone_run, make_request
from unit.loop import make_loop

SESSION = "s"


class Rig:
    """An engine in the test's thread. `script[n]` holds the commands that arrive while step n is launched."""

    def __init__(self, *, steps_ahead: int = 0, **sizes: int) -> None:
        self.events: list[Event] = []
        self.script: dict[int, list[Command]] = {}
        self.idle_moments: list[Callable[[], None]] = []
        self.runner: FakeRunner = make_loop(steps_ahead=steps_ahead, **sizes).runner  # type: ignore[arg-type]
        self.engine = Engine(self.runner.scheduler, self, self.events.append)  # type: ignore[arg-type]

    @property
    def steps_ahead(self) -> int:
        return self.runner.steps_ahead

    def launch(self, plan: Plan) -> FakeLaunched:
        self.put(*self.script.pop(self.runner.num_launches, []))
        return self.runner.launch(plan)

    def use_idle_moment(self) -> bool:
        """Something is left to prepare for as many moments as there are entries; each is called first."""
        if self.idle_moments:
            self.idle_moments.pop()()
            return True
        return False

    def collect(self, launched: FakeLaunched) -> list[int]:
        return self.runner.collect(launched)

    def put(self, *commands: Command) -> None:
        for command in commands:
            self.engine.inbox.put(command)

    def serve(self, *commands: Command) -> None:
        """Apply commands and run until everything has ended."""
        self.put(*commands)
        emit = self.engine.emit

        def stop_when_done(event: Event) -> None:
            emit(event)
            left = [self.engine.scheduler.requests, self.runner.in_flight, not self.engine.inbox.empty()]
            if isinstance(event, Metrics) and not any(left) and not self.engine._stopping:
                self.put(Stop())

        self.engine.emit = stop_when_done
        self.engine.run()
        self.engine.emit = emit
        self.engine._stopping = False

    def outputs(self, number: int) -> list[Output]:
        steps = [event for event in self.events if isinstance(event, StepResult)]
        return [out for step in steps for key, out in step.outputs if key == (SESSION, number)]

    @property
    def metrics(self) -> Metrics:
        return [event for event in self.events if isinstance(event, Metrics)][-1]


def ask(number: int, prompt: Iterable[int], *, max_tokens: int = 4, stop_ids: Iterable[int] = ()) -> Submit:
    return Submit(make_request((SESSION, number), prompt, max_tokens=max_tokens, stop_ids=stop_ids))


def cancel(number: int, *, tokens_kept: int | None = None, reason: str = "abort") -> Cancel:
    return Cancel((SESSION, number), reason, tokens_kept)  # type: ignore[arg-type]


@contextmanager
def running(engine: Engine) -> Iterator[threading.Thread]:
    """The loop in a thread of its own, as it is served."""
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        yield thread
    finally:
        engine.inbox.put(Stop())
        thread.join(10)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


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


# ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_as_many_steps_are_in_flight_as_the_runner_allows(steps_ahead: int) -> None:
    rig = Rig(steps_ahead=steps_ahead)
    seen: list[int] = []
    collect = rig.runner.collect

    def count(launched: FakeLaunched) -> list[int]:
        seen.append(len(rig.runner.in_flight))
        return collect(launched)

    rig.runner.collect = count  # type: ignore[method-assign]
    rig.serve(ask(1, [1]))
    assert seen == [1 + steps_ahead] * (4 - steps_ahead) + [1] * steps_ahead


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_an_error_of_the_device_leaves_the_loop(where: str) -> None:
    """Swallowed, it would leave every client waiting for ever; the process has to end."""
    rig = Rig()

    def fail(_: object) -> None:
        raise RuntimeError("device lost")

    setattr(rig, where, fail)
    rig.put(ask(1, [1]))
    with pytest.raises(RuntimeError, match="device lost"):
        rig.engine.run()
    assert not any(isinstance(event, StepResult) for event in rig.events)


def test_the_idle_engine_checks_its_memory() -> None:
    """A leak ends the engine when it falls idle, not weeks later when nothing fits any more."""
    rig = Rig()
    rig.engine.scheduler.pool.take(1)
    rig.put(ask(1, [1]))
    with pytest.raises(AssertionError, match="1 references and 0 owners"):
        rig.engine.run()
    assert rig.outputs(1)[-1].finish_reason == "length"


def test_stop_leaves_the_loop_with_requests_unfinished() -> None:
    rig = Rig()
    rig.script = {1: [Stop()]}
    rig.put(ask(1, [1], max_tokens=9))
    rig.engine.run()
    assert len(rig.outputs(1)) < 9


def test_an_idle_engine_sleeps_and_wakes_at_once() -> None:
    """Idle it must not burn a core; a request that comes must not wait for the next metrics."""
    rig = Rig()
    with running(rig.engine):
        rig.put(ask(1, [1]))
        wait_for(lambda: len(rig.outputs(1)) == 4 and not rig.engine.pulse.busy)
        used = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - used < 0.1
        began = time.monotonic()
        rig.put(ask(2, [2]))
        wait_for(lambda: len(rig.outputs(2)) == 4)
        assert time.monotonic() - began < 0.4
    assert rig.engine.pulse.step == 8


def test_the_pulse_is_busy_from_the_first_command_until_idle() -> None:
    rig = Rig()
    busy: list[bool] = []
    rig.engine.emit = lambda event: busy.append(rig.engine.pulse.busy)
    assert not rig.engine.pulse.busy
    rig.put(ask(1, [1]))
    with running(rig.engine):
        wait_for(lambda: len(busy) >= 5 and not rig.engine.pulse.busy)
    assert busy[:5] == [False, True, True, True, True] or busy[:5] == [True] * 5
    assert rig.engine.pulse.step == 4
    assert rig.engine.pulse.longest_step > 0


def test_many_clients_at_once_get_their_lone_answers() -> None:
    """Commands arrive from other threads while the loop runs."""
    rig = Rig(steps_ahead=1, num_blocks=12)
    submits = [ask(n, [n % 7] * (n % 9 + 1), max_tokens=n % 6 + 1) for n in range(60)]

    def client(part: list[Submit]) -> None:
        for submit in part:
            rig.put(submit)
            time.sleep(0)

    clients = [threading.Thread(target=client, args=(submits[i::3],)) for i in range(3)]
    with running(rig.engine):
        for thread in clients:
            thread.start()
        wait_for(lambda: sum(rig.engine.stats.finished.values()) == 60)
        for thread in clients:
            thread.join()

    def answer(request: Request) -> list[int]:
        number: int = request.key[1]  # type: ignore[index]
        return [t for out in rig.outputs(number) for t in out.token_ids]

    assert [answer(s.request) for s in submits] == [lone_run(s.request)[0] for s in submits]


def test_stop_ends_an_idle_engine_at_once() -> None:
    """Unloading a model must not wait for the next metrics."""
    rig = Rig()
    thread = threading.Thread(target=rig.engine.run)
    thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    rig.put(Stop())
    thread.join(5)
    assert time.monotonic() - began < 0.2


# ── idle moments ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_can_be_prepared_is_prepared_until_a_request_arrives() -> None:
    rig = Rig()
    seen: list[int] = []
    moments: list[Callable[[], None]] = [
        lambda: seen.append(1),
        lambda: rig.put(ask(1, [1, 2, 3])),
        lambda: seen.append(2),
    ]
    rig.idle_moments = moments[::-1]
    with running(rig.engine):
        wait_for(lambda: 2 in seen)
        finished_first = [out.finish_reason for out in rig.outputs(1)][-1:]
    assert seen == [1, 2]
    assert finished_first == ["length"]
