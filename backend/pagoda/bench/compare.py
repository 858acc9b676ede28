"""`pagoda bench compare`: the same mixed load through the service, the engine alone, and transformers, side by side."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.queues import Queue

import msgspec

from pagoda.bench import contenders
from pagoda.bench.loads import Load
from pagoda.child import SPIN_COUNT

Contender = Callable[[str, list[Load]], float]


class Result(msgspec.Struct, frozen=True):
    """Useful tokens are those that were asked for: what a static batch computes beyond an answer's end is none."""

    name: str
    requests: int
    useful_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.useful_tokens / self.seconds


def contestants(lone_requests: int) -> list[tuple[str, Contender, int | None]]:
    """(name, contender, number of requests; None for all)."""
    return [
        ("Pagoda through HTTP", contenders.through_http, None),
        ("Pagoda's engine alone", contenders.engine_alone, None),
        ("transformers, static batches of 32", contenders.transformers_batches, None),
        ("transformers, one at a time", contenders.transformers_alone, lone_requests),
    ]


def run(name: str, contender: Contender, folder: str, loads: list[Load]) -> Result:
    """Measure one contender in a fresh process. Raises RuntimeError when it fails."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # as the service starts its engine
    context = multiprocessing.get_context("spawn")
    answers: Queue[float | str] = context.Queue()
    process = context.Process(target=_measure, args=(contender, folder, loads, answers))
    process.start()
    while process.is_alive() and answers.empty():
        time.sleep(0.1)
    answer = answers.get(timeout=5) if not answers.empty() else f"process ended with {process.exitcode}"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"{name}: {answer}")
    return Result(name, len(loads), sum(load.num_output for load in loads), answer)


def _measure(contender: Contender, folder: str, loads: list[Load], answers: Queue[float | str]) -> None:
    try:
        answers.put(contender(folder, loads))
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}")
