"""`pagoda bench offline`: the engine alone under the loads that its peers were measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from pagoda.bench.alone import Alone, Run
from pagoda.bench.floor import Floor
from pagoda.bench.loads import Load, OfflineLoad
from pagoda.bench.machine import PEERS_GPU, Machine
from pagoda.storage import choice

LONG_SECONDS = 5.0
"""Loads that take longer are run once; the others twice, and the better run counts, as for the peer."""


class Result(msgspec.Struct, frozen=True):
    load: str
    seconds: float
    steps: int
    preemptions: int
    input_tokens: int
    output_tokens: int
    floor_seconds: float
    """What the steps' bytes and operations take at the machine's measured limits."""
    peer_seconds: float | None
    """The peer's time, on a GPU scaled to this one by what both machines' libraries take for the steps."""

    @property
    def output_rate(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds

    @property
    def total_rate(self) -> float:
        return (self.input_tokens + self.output_tokens) / self.seconds


def measure(
    engine: Alone, machine: Machine, loads: Sequence[OfflineLoad], *, peers: bool, done: Callable[[Result], None]
) -> list[Result]:
    """Run every load; `done` hears of each. `peers` says whether the model is the one the peer was measured with."""
    model = choice.resolve(engine.config.quantization, engine.model)
    floor = Floor(model, engine.runner.dtype.itemsize, engine.runner.cache_dtype.itemsize, machine)
    peers_floor = replace(floor, machine=PEERS_GPU)
    results = []
    for load in loads:
        requests = load.make(engine.model.vocab_size)
        run = best_of_two(engine, requests)
        scale = floor.library_seconds(run.plans) / peers_floor.library_seconds(run.plans) if machine.products else 1.0
        results.append(
            Result(
                load=load.name,
                seconds=run.seconds,
                steps=len(run.plans),
                preemptions=run.preemptions,
                input_tokens=sum(len(r.prompt_ids) for r in requests),
                output_tokens=sum(r.num_output for r in requests),
                floor_seconds=floor.seconds(run.plans),
                peer_seconds=load.peers_seconds * scale if peers and load.peers_seconds else None,
            )
        )
        done(results[-1])
    return results


def best_of_two(engine: Alone, requests: list[Load]) -> Run:
    run = engine.run(requests)
    return run if run.seconds > LONG_SECONDS else min(run, engine.run(requests), key=lambda r: r.seconds)
