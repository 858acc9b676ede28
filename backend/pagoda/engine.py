"""The engine's loop: take in, schedule, launch, read back, publish."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from pagoda.errors import DeadlineExceeded, PagodaError
from pagoda.plan import Collected, Plan, Progress
from pagoda.protocol import FinishReason, Metrics, Output, Usage
from pagoda.request import Request
from pagoda.scheduler import Scheduler
from pagoda.stats import Stats

if TYPE_CHECKING:
    from pagoda.runner import Launched  # the loop itself needs no torch

log = logging.getLogger("pagoda.engine")

METRICS_INTERVAL = 0.5
"""Seconds between two published snapshots."""


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    key: tuple[str, int]
    reason: FinishReason
    tokens_kept: int | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the loop."""


Command: TypeAlias = Submit | Cancel | Stop


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that ends by an error: not taken, or not to be continued."""

    key: tuple[str, int]
    error: PagodaError


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought; `outputs` by request key (session, id)."""

    step: int
    outputs: list[tuple[tuple[str, int], Output]]


Event: TypeAlias = StepResult | Refusal | Metrics


class RunnerLike(Protocol):
    """The seam under the loop: a fake runner enters here in tests."""

    @property
    def steps_ahead(self) -> int: ...

    def launch(self, plan: Plan) -> Launched: ...

    def collect(self, launched: Launched) -> Collected: ...

    def use_idle_moment(self) -> bool: ...


@dataclass(slots=True)
class Pulse:
    """How the loop is doing, for those who watch it. Times in seconds of time.monotonic()."""

    step: int = 0
    last_step_time: float = 0.0
    longest_step: float = 0.0
    """Of the recent ones: it fades by a hundredth at each step."""
    busy: bool = False

    def beat(self, started: float, now: float) -> None:
        self.step += 1
        self.last_step_time = now
        self.longest_step = max(now - started, self.longest_step * 0.99)


class Engine:
    """One model's loop. `emit` takes every event and returns at once."""

    def __init__(self, scheduler: Scheduler, runner: RunnerLike, emit: Callable[[Event], None]) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.emit = emit
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.pulse = Pulse()
        self.stats = Stats()
        self._in_flight: deque[Launched] = deque()
        self._next_metrics = 0.0
        self._stopping = False

    def run(self) -> None:
        """Serve until told to stop. An error of the device ends the loop: its state can no longer be trusted."""
        while not self._stopping:
            self._take_in()
            self._expire()
            started = time.monotonic()
            plan = self.scheduler.schedule()
            if plan:
                self._in_flight.append(self.runner.launch(plan))
            if self._in_flight and (not plan or len(self._in_flight) > self.runner.steps_ahead):
                self._read_back(self._in_flight.popleft())
                self.pulse.beat(started, time.monotonic())
            self._publish_metrics()

    def _read_back(self, launched: Launched) -> None:
        collected = self.runner.collect(launched)
        for chunk, error in collected.failures:
            if not chunk.is_stale:
                self._end(chunk.request, error)
        for chunk, logprobs in collected.prompt_logprobs:
            if not chunk.is_stale:
                chunk.request.prompt_logprobs += logprobs
        progress = self.scheduler.update(launched.plan, collected.token_ids, collected.logprobs)
        self.stats.step(launched.plan, progress)
        if progress:
            self.emit(StepResult(launched.plan.step, [_output(p) for p in progress]))

    # ── inbox ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_in(self) -> None:
        """Apply every command that waits; sleep only when there is nothing to run."""
        while not self._stopping:
            try:
                command = self._next_command()
            except queue.Empty:
                return
            self._apply(command)
            self.pulse.busy = True

    def _next_command(self) -> Command:
        if self.scheduler.requests or self._in_flight:
            return self.inbox.get_nowait()
        self._begin_idle()
        if self.runner.use_idle_moment():
            return self.inbox.get_nowait()
        return self.inbox.get(timeout=METRICS_INTERVAL)

    def _begin_idle(self) -> None:
        self.pulse.last_step_time = time.monotonic()
        self._publish_metrics(now_idle=self.pulse.busy)
        if self.pulse.busy:
            self.pulse.busy = False
            self.scheduler.check()

    def _apply(self, command: Command) -> None:
        match command:
            case Submit(request):
                self._submit(request)
            case Cancel():
                self._cancel(command)
            case Stop():
                self._stopping = True

    def _submit(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
        except PagodaError as error:
            for member in (request, *request.forks):
                self.emit(Refusal(key_of(member), error))
        else:
            self.pulse.last_step_time = max(self.pulse.last_step_time, request.arrival_time)

    def _cancel(self, command: Cancel) -> None:
        request = self.scheduler.abort(command.key, command.reason)
        if request is not None:
            self.stats.finish(request)
            kept = request.num_output_tokens if command.tokens_kept is None else command.tokens_kept
            output = Output(command.key[1], request.num_output_tokens, [], command.reason, _usage(request, kept))
            self.emit(StepResult(self.pulse.step, [(command.key, output)]))
            self._next_metrics = 0.0

    def _expire(self) -> None:
        for request in self.scheduler.expire():
            self._report_end(
                request,
                DeadlineExceeded(
                    f"the request's timeout of {request.timeout:g} s is over after {request.num_output_tokens} output "
                    "tokens: raise timeout, or lower max_tokens"
                ),
            )

    def _end(self, request: Request, error: PagodaError) -> None:
        """A request that cannot go on ends by its own error."""
        self.scheduler.abort(request.key)
        self._report_end(request, error)

    def _report_end(self, request: Request, error: PagodaError) -> None:
        self.stats.finish(request)
        self.emit(Refusal(key_of(request), error))
        self._next_metrics = 0.0

    # ── metrics ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _publish_metrics(self, *, now_idle: bool = False) -> None:
        """At its interval, and at once after an abort or when idle: gauges must not show what has ended."""
        now = time.monotonic()
        if now_idle or now >= self._next_metrics:
            self._next_metrics = now + METRICS_INTERVAL
            self.emit(self.stats.snapshot(self.scheduler, self.pulse.step))


def key_of(request: Request) -> tuple[str, int]:
    """Session and id of a request that came over the wire."""
    key: tuple[str, int] = request.key  # type: ignore[assignment]
    return key


def _usage(request: Request, completion_tokens: int) -> Usage:
    return Usage(request.num_prompt_tokens, completion_tokens, request.num_cached)


def _output(progress: Progress) -> tuple[tuple[str, int], Output]:
    """By request key. Hundreds a step: what only first and last tokens bring is looked at only then."""
    request, reason = progress.request, progress.finish_reason
    key, total = key_of(request), request.num_output_tokens
    index = total - len(progress.new_token_ids)
    logprobs = None if progress.logprob is None else [progress.logprob]
    if index > 0 and reason is None:
        return key, Output(key[1], index, progress.new_token_ids, None, None, logprobs)
    wants_prompt = index == 0 and request.params.prompt_logprobs is not None
    prompt_logprobs = request.prompt_logprobs if wants_prompt else None
    return key, Output(key[1], index, progress.new_token_ids, reason, _usage(request, total), logprobs, prompt_logprobs)
