"""An engine over a fake runner with a script of commands, what a session asks of it, and its loop in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from pagoda.engine import Cancel, Command, Engine, Event, StepResult, Stop, Submit
from pagoda.plan import Plan
from pagoda.protocol import Metrics, Output
from unit.fake_runner import FakeLaunched, FakeRunner
from unit.lone import make_request
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
