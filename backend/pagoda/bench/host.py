"""`pagoda bench host`: what a step of decodes costs the host, phase by phase, without a model.

The engine's own loop, a step ahead, over a runner that does everything but the device's work: no model computes, each
sample is the same token, and a graph's inputs are filled and copied in the host's memory. Launching the graph (about
0.5 ms of the driver's time for a large model) is not in these figures.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pagoda_kernels
import torch

from pagoda import cuda_graph
from pagoda.allocation import BlockAllocator
from pagoda.batch import Layout, lay_out
from pagoda.bench.profile import Clock
from pagoda.block_pool import BlockPool
from pagoda.engine import Engine, Event, StepResult, Stop, Submit
from pagoda.graph_shapes import Shapes
from pagoda.plan import Collected, Plan, Progress
from pagoda.protocol import TokenLogprob
from pagoda.request import Request
from pagoda.rows import Rows
from pagoda.runner import Launched
from pagoda.sampler import Sampler
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler

COUNTS = (1, 64, 256)
BLOCK_SIZE = 16
PROMPT_TOKENS = 128
STEPS = 300
WARM_UP = 50
"""Steps before those that count, the prefill among them."""
CPU = torch.device("cpu")
PHASES = ("schedule", "lay out", "send", "sampler", "collect", "update", "publish")


class Load(msgspec.Struct, frozen=True):
    name: str
    params: tuple[SamplingParams, ...]
    """Of the requests, in turn."""
    common_tokens: int = 0
    """Leading prompt tokens that all requests have in common, beside their own `PROMPT_TOKENS`."""


GREEDY = SamplingParams(temperature=0)
LOADS = (
    Load("greedy", (GREEDY,)),
    Load("mixed", (GREEDY, SamplingParams(top_p=0.9, top_k=50), SamplingParams(temperature=0.7))),
    Load("shared", (GREEDY,), 1024),
)


class Result(msgspec.Struct, frozen=True):
    load: str
    requests: int
    step: float
    """Median microseconds of a whole step, what is in no phase included."""
    worst: float
    """The same, 99th percentile."""
    phases: dict[str, float]
    """Median microseconds of each."""


class HollowRunner:
    """A GPU's runner without the GPU."""

    steps_ahead = 1

    def __init__(self, count: int, max_len: int, clock: Clock) -> None:
        self._clock = clock
        self._rows = Rows(count, -(-max_len // BLOCK_SIZE), CPU)
        self._shapes = Shapes(count, max_len, max_len)
        tokens = torch.full((count,), 7)
        ops = replace(pagoda_kernels.for_device(CPU), sample=lambda logits, params: tokens[: len(logits)])
        self._sampler = Sampler(ops, CPU, vocab_size=16)
        self._logits = torch.zeros(count, 16)
        self._sent = torch.zeros(1 << 16, dtype=torch.int64)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        with self._clock.phase("lay out"):
            layout = lay_out(plan, self._rows, BLOCK_SIZE)
        with self._clock.phase("send"):
            self._send(layout)
        with self._clock.phase("sampler"):
            chunks = [c for c in plan.chunks if c.samples]
            draw = self._sampler.launch(chunks, layout.wishes, self._logits[: len(chunks)])
            self._rows.remember(torch.from_numpy(layout.sampled), draw.tokens)
        return Launched(plan, draw, None)

    def _send(self, layout: Layout) -> None:
        """As `StepGraphs.run`; a step that has no graph, the first one, is not sent."""
        shape = self._shapes.find(layout)
        if shape is not None:
            packed = torch.from_numpy(cuda_graph.pack(layout, shape, self._rows.spare))
            self._sent[: len(packed)].copy_(packed)

    def use_idle_moment(self) -> bool:
        return False

    def collect(self, launched: Launched) -> Collected:
        with self._clock.phase("collect"):
            return self._sampler.collect(launched.draw, launched.prompts)


class ClockedScheduler(Scheduler):
    def __init__(self, phases: Clock, blocks: BlockAllocator, **sizes: Any) -> None:
        super().__init__(blocks, **sizes)
        self._phases = phases

    def schedule(self) -> Plan:
        with self._phases.phase("schedule"):
            return super().schedule()

    def update(
        self, plan: Plan, sampled: list[int], logprobs: list[TokenLogprob | None] | None = None
    ) -> list[Progress]:
        with self._phases.phase("update"):
            return super().update(plan, sampled, logprobs)


class ClockedEngine(Engine):
    def __init__(self, phases: Clock, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._phases = phases

    def _read_back(self, launched: Launched) -> None:
        with self._phases.phase("publish"):
            super()._read_back(launched)


def measure(load: Load, count: int) -> Result:
    """`STEPS` steps of `count` decodes."""
    clock, steps = Clock(), STEPS + WARM_UP
    max_len = load.common_tokens + PROMPT_TOKENS + steps + 2
    engine = _engine(load, count, max_len, clock)
    times: list[dict[str, float]] = []
    began = time.perf_counter()

    def emit(event: Event) -> None:
        nonlocal began
        if isinstance(event, StepResult):
            now = time.perf_counter()
            times.append({"step": now - began, **clock.seconds})
            clock.seconds.clear()
            began = now
            if len(times) == steps:
                engine.inbox.put(Stop())

    engine.emit = emit
    engine.run()
    counted = times[WARM_UP:]
    whole = sorted(step["step"] for step in counted)
    phases = {phase: statistics.median(step[phase] for step in counted) * 1e6 for phase in PHASES}
    return Result(load.name, count, statistics.median(whole) * 1e6, whole[len(whole) * 99 // 100] * 1e6, phases)


def _engine(load: Load, count: int, max_len: int, clock: Clock) -> Engine:
    scheduler = ClockedScheduler(
        clock,
        BlockAllocator(BlockPool(count * -(-max_len // BLOCK_SIZE)), block_size=BLOCK_SIZE, enable_prefix_caching=True),
        max_num_seqs=count,
        max_num_batched_tokens=count * max_len,
        max_num_queued_requests=count,
        max_num_queued_tokens=count * max_len,
    )
    engine = ClockedEngine(clock, scheduler, HollowRunner(count, max_len, clock), lambda event: None)
    common = np.arange(load.common_tokens).tolist()
    for i in range(count):
        prompt = [*common, 10_000 + i, *range(PROMPT_TOKENS - 1 - i % BLOCK_SIZE)]  # so blocks end at any step
        params = load.params[i % len(load.params)]
        engine.inbox.put(Submit(Request(("bench", i), prompt, params, max_len - len(prompt), frozenset({-1}), seed=i)))
    return engine
