"""The engine's loop over a fake runner: how many steps are in flight, when it sleeps and wakes, and what ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from pagoda.engine import StepResult, Stop, Submit
from pagoda.request import Request
from unit.engine_rig import Rig, ask, running, wait_for
from unit.fake_runner import FakeLaunched
from unit.lone import lone_run


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
