"""`pagoda bench serve`: any OpenAI-compatible server under the loads of `pagoda bench offline`, through HTTP."""

from __future__ import annotations

import asyncio
import itertools
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from pagoda.bench.loads import CPU_LOADS, FIRST_ID, GPU_LOADS, HTTP_LOADS, Load, OfflineLoad, equal, is_named, typed
from pagoda.bench.serve_client import Client
from pagoda.bench.serve_figures import Latencies, Result, summarise
from pagoda.bench.serve_stream import Answer
from pagoda.errors import ConfigError
from pagoda.openai_stream import ServerError

LOAD_SETS = {"cpu": CPU_LOADS, "gpu": GPU_LOADS + HTTP_LOADS}


@dataclass(frozen=True)
class Target:
    url: str
    """Without /v1."""
    model: str
    vocab_size: int
    api_key: str | None


@dataclass(frozen=True)
class Pace:
    """When requests leave."""

    at_once: int | None
    """Most on their way at once; None: no bound. One that has to wait for it is timed from when it is sent."""
    rate: float | None
    """Requests a second, as a Poisson process; None: all at the start."""
    seed: int

    def departures(self, count: int) -> list[float]:
        """Seconds after the start, the first at 0."""
        if self.rate is None:
            return [0.0] * count
        draw = random.Random(self.seed)
        gaps = (draw.expovariate(self.rate) for _ in range(count - 1))
        return list(itertools.accumulate(gaps, initial=0.0))


def chosen(wanted: Sequence[str]) -> list[OfflineLoad]:
    """The loads of a set's name or whose name begins so, with x for × and -> for → allowed. Raises ConfigError."""
    found: dict[str, OfflineLoad] = {}
    known = [load for loads in LOAD_SETS.values() for load in loads]
    for want in wanted:
        loads = LOAD_SETS.get(want) or [load for load in known if is_named(load, want)]
        if not loads:
            names = ", ".join(typed(load.name) for load in known)
            raise ConfigError(f"load = {want!r} is none: take a set, {' or '.join(LOAD_SETS)}, or one of {names}")
        found |= {load.name: load for load in loads}
    return list(found.values())


def unseen(requests: Sequence[Load], vocab_size: int, seed: int | str) -> list[Load]:
    """The same lengths and the same shared parts with other token ids, by a rotation of the vocabulary.

    The loads' own prompts begin alike from load to load and from run to run, and a server that caches prefixes would be
    spared their prefill.
    """
    size = vocab_size - FIRST_ID
    offset = random.Random(seed).randrange(size)
    return [Load([FIRST_ID + (i - FIRST_ID + offset) % size for i in r.prompt_ids], r.num_output) for r in requests]


def body(model: str, request: Load) -> bytes:
    """A greedy streamed completion of token ids that ends at its full length."""
    return msgspec.json.encode(
        {
            "model": model,
            "prompt": request.prompt_ids,
            "max_tokens": request.num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


@dataclass(frozen=True)
class Run:
    answers: list[Answer]
    """In the order of the requests."""
    seconds: float
    cpu_seconds: float
    """What this process computed meanwhile."""


async def drive(target: Target, requests: Sequence[Load], pace: Pace, done: Callable[[Answer], None]) -> Run:
    """Send the requests at their pace; `done` hears of each answer as it ends."""
    client = Client(target.url, target.api_key)
    encoded = [client.request(body(target.model, request)) for request in requests]
    gate = asyncio.Semaphore(pace.at_once or len(requests))
    cpu, began = time.process_time(), time.perf_counter()

    async def one(request: Load, sent: bytes, departure: float) -> Answer:
        await asyncio.sleep(began + departure - time.perf_counter())
        async with gate:
            answer = await client.ask(sent)
        answer.close(request.num_output)
        done(answer)
        return answer

    try:
        answers = await asyncio.gather(*map(one, requests, encoded, pace.departures(len(requests))))
        return Run(answers, time.perf_counter() - began, time.process_time() - cpu)
    finally:
        client.close()


async def probe(target: Target) -> None:
    """One short request, unmeasured, as a server's first may be slow. Raises ServerError when it is not answered."""
    requests = equal(1, 16, 4, vocab_size=target.vocab_size, seed=1)
    run = await drive(target, requests, Pace(None, None, 0), done=lambda _: None)
    if (problem := run.answers[0].problem) is not None:
        raise ServerError(f"the first request to {target.url} failed: {problem}")


async def measure(
    target: Target, load: OfflineLoad, pace: Pace, done: Callable[[Answer], None]
) -> tuple[Result, Latencies]:
    """One load, once."""
    requests = unseen(load.make(target.vocab_size), target.vocab_size, f"{pace.seed} {load.name}")
    with enough_files(len(requests)):
        run = await drive(target, requests, pace, done)
    return summarise(load.name, requests, run.answers, seconds=run.seconds, cpu_seconds=run.cpu_seconds)


@contextmanager
def enough_files(connections: int) -> Iterator[None]:
    """A thousand connections are more files than a shell's usual bound of 1024 leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
