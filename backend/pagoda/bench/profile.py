"""`pagoda bench profile`: where a step's time goes, on the host by the engine's phases, on the device by kernels."""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch.profiler import ProfilerActivity, profile

from pagoda.batch import Layout
from pagoda.bench.alone import Alone, requests
from pagoda.bench.loads import Load, equal
from pagoda.errors import ConfigError
from pagoda.plan import Collected, Plan
from pagoda.runner import Launched, Runner
from pagoda.sampler import Draw
from pagoda.scheduler import Scheduler

GROUPS = (
    ("sampling", r"^_?tiles|^_?largest|^_?pick|^_?search|^_?settle|sample|argmax"),
    (
        "attention",
        r"attention|^_decode|^_add_apart|^_prefix|^_prefill|^attend|^_list_spans|^_widen|embedding_bag|bmm|softmax",
    ),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|matrix_vector|product|linear|mm$|mkldnn"),
    ("norms", r"norm"),
    ("rotary, cache write", r"rotary"),
    ("activation", r"silu|gelu|^_gated"),
    ("copies", r"memcpy|memset|copy|to_copy|index"),
)
"""Kernels (operations on a CPU) by the first pattern that their lower-case names hold; the rest is `other`."""
WARM_UP = 4
"""Steps of a kind before those that are measured."""


class Phase(msgspec.Struct, frozen=True):
    name: str
    milliseconds: float
    """A step."""


class StepProfile(msgspec.Struct, frozen=True):
    """One kind of step, averaged."""

    name: str
    milliseconds: float
    """A step, measured without any profiler."""
    host: list[Phase]
    device: list[Phase]


class Clock:
    """Adds up the host's time by phase; a phase within another is taken out of it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        yield
        took = time.perf_counter() - began
        self.seconds[name] += took - self._inner.pop()
        self._inner[-1] += took


class ClockedRunner(Runner):
    """A runner whose phases are timed."""

    def __init__(self, *arguments: Any) -> None:
        self.clock = Clock()  # first: a GPU's runner launches steps while it is made
        super().__init__(*arguments)

    def launch(self, plan: Plan) -> Launched:
        with self.clock.phase("launch: the rest"):
            return super().launch(plan)

    def _lay_out(self, plan: Plan) -> Layout:
        with self.clock.phase("launch: lay out"):
            return super()._lay_out(plan)

    def _compute(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self.clock.phase("launch: forward"):
            return super()._compute(layout)

    def _draw(self, plan: Plan, layout: Layout, hidden: torch.Tensor) -> Draw:
        with self.clock.phase("launch: logits, samples"):
            return super()._draw(plan, layout, hidden)

    def collect(self, launched: Launched) -> Collected:
        with self.clock.phase("collect (waits for the device)"):
            return super().collect(launched)


@dataclass
class Stepper:
    """The engine's loop, a step at a time."""

    engine: Alone
    scheduler: Scheduler
    clock: Clock

    def __post_init__(self) -> None:
        self.in_flight: deque[Launched] = deque()

    def step(self) -> None:
        runner = self.engine.runner
        with self.clock.phase("schedule"):
            plan = self.scheduler.schedule()
        if plan:
            self.in_flight.append(runner.launch(plan))
        if self.in_flight and (not plan or len(self.in_flight) > runner.steps_ahead):
            launched = self.in_flight.popleft()
            collected = runner.collect(launched)
            with self.clock.phase("update"):
                self.scheduler.update(launched.plan, collected.token_ids, collected.logprobs)

    def until_all_decode(self) -> None:
        while any(not request.is_decoding for request in self.scheduler.requests.values()):
            self.step()

    def drain(self) -> None:
        while self.scheduler.requests or self.in_flight:
            self.step()


def decode(engine: Alone, count: int, context: int, steps: int) -> StepProfile:
    """Decode steps of `count` requests with `context` tokens and more: `steps` timed, then as many profiled.

    Raises ConfigError when the engine's steps have no room for them.
    """
    stepper = _stepper(engine, _decodes(engine, count, context, steps))
    stepper.until_all_decode()
    return _measure(engine, stepper, f"decode, {count} × {context}", steps)


def mixed(engine: Alone, count: int, length: int, steps: int) -> StepProfile:
    """Full mixed steps: decodes of `count` requests with `length` tokens and more, beside prompts of `length`.

    Raises ConfigError when the engine has no room for them.
    """
    decodes, room = _decodes(engine, count, length, steps), _room_for_prompts(engine, count)
    needed = count + 2 * (-(-room // length) + 1)  # a prompt that has been computed stays for a step
    if needed > engine.config.max_num_seqs:
        raise ConfigError(
            f"max_num_seqs {engine.config.max_num_seqs} is below the {needed} requests of {count} decodes and two "
            "steps' prompts: raise it"
        )
    # Of another seed: with the decodes' own tokens, the prefix cache would spare them.
    many = -(-_most_steps(steps) * room // length)
    prompts = equal(many, length, 1, vocab_size=engine.model.vocab_size, seed=1)
    stepper = _stepper(engine, decodes, prompts)
    stepper.until_all_decode()
    for request in requests(prompts, "prompts"):
        stepper.scheduler.add(request)
    for _ in range(WARM_UP):  # a mixed step's graph is captured when it is needed again
        stepper.step()
    tokens = engine.runner.max_num_mixed_tokens
    return _measure(engine, stepper, f"mixed, {tokens} tokens, {count} × {length} of them decodes", steps)


def prefill(engine: Alone, count: int, length: int) -> StepProfile:
    """The full steps that compute the prompts of `count` requests, without the first.

    Raises ConfigError when there are fewer than three.
    """
    budget = engine.runner.max_num_batched_tokens
    steps = (count * length // budget - 1) // 2
    if steps < 1:
        raise ConfigError(
            f"max_num_batched_tokens {budget} makes {count} prompts of {length} tokens fewer than three steps: lower it"
        )
    stepper = _stepper(engine, equal(count, length, 1, vocab_size=engine.model.vocab_size))
    stepper.step()
    return _measure(engine, stepper, f"prefill, {count} × {length}", steps)


def _decodes(engine: Alone, count: int, length: int, steps: int) -> list[Load]:
    """The first must not end before the last prompts are computed, beside it, and all steps are measured."""
    until_all_decode = -(-count * length // _room_for_prompts(engine, count))
    return equal(count, length, until_all_decode + _most_steps(steps), vocab_size=engine.model.vocab_size)


def _most_steps(steps: int) -> int:
    """What it takes to measure so many: timed, then profiled, after a warm-up, and with some to spare."""
    return 2 * steps + 2 * WARM_UP


def _room_for_prompts(engine: Alone, count: int) -> int:
    """Tokens of a step beside `count` decodes."""
    most, tokens = engine.config.max_num_seqs, engine.runner.max_num_mixed_tokens
    if count > most:
        raise ConfigError(f"max_num_seqs {most} is below the {count} requests that are to decode: raise it")
    if count >= tokens:
        raise ConfigError(f"max_num_mixed_tokens {tokens} has no room for prompts beside {count} decodes: raise it")
    return tokens - count


def _stepper(engine: Alone, first: list[Load], later: Sequence[Load] = ()) -> Stepper:
    """With the first ones' requests in its queue, and room there for the later ones'."""
    scheduler = engine.scheduler([*first, *later])
    for request in requests(first):
        scheduler.add(request)
    clock = engine.runner.clock if isinstance(engine.runner, ClockedRunner) else Clock()
    return Stepper(engine, scheduler, clock)


def _measure(engine: Alone, stepper: Stepper, name: str, steps: int) -> StepProfile:
    device = engine.runner.device
    stepper.clock.seconds.clear()
    began = time.perf_counter()
    for _ in range(steps):
        stepper.step()
    seconds = time.perf_counter() - began
    host = [Phase(phase, spent / steps * 1e3) for phase, spent in _longest(stepper.clock.seconds)]
    _wait(device)  # a step may be on its way
    with profile(activities=[ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            stepper.step()
        _wait(device)
    stepper.drain()
    return StepProfile(name, seconds / steps * 1e3, host, _grouped(profiler, device, steps))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _grouped(profiler: profile, device: torch.device, steps: int) -> list[Phase]:
    spent: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        microseconds = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        spent[_group(event.key.lower().removeprefix("aten::"))] += microseconds / 1e3 / steps
    return [Phase(name, milliseconds) for name, milliseconds in _longest(spent) if milliseconds >= 0.0005]


def _longest(spent: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(spent.items(), key=lambda item: -item[1])


def _group(kernel: str) -> str:
    return next((name for name, pattern in GROUPS if re.search(pattern, kernel)), "other")
