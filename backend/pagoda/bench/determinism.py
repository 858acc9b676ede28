"""How often a request's token depends on its neighbours: the engine alone, requests together and each by itself.

Together they share prompts, come in chunks, and pass a cache so small that they are preempted.
"""

from __future__ import annotations

import random

import msgspec

from pagoda.allocation import BlockAllocator
from pagoda.bench.alone import Alone
from pagoda.block_pool import BlockPool
from pagoda.request import Request
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, ignore_eos=True),
    "top_p 0.95, top_k 50": SamplingParams(top_p=0.95, top_k=50, ignore_eos=True),
    "temperature 0.8": SamplingParams(temperature=0.8, ignore_eos=True),
}
"""Drawn ones have a seed for each request."""
STEP_TOKENS = 64


class Result(msgspec.Struct, frozen=True):
    sampling: str
    tokens: int
    """Drawn together and compared with a lone run's; what follows a request's first difference is not compared."""
    differences: int
    preemptions: int
    hit_tokens: int
    """Prompt tokens that were found in the prefix cache."""


class Case(msgspec.Struct, frozen=True):
    """Lengths in tokens."""

    count: int = 48
    prompt: int = 48
    shared: int = 32
    """Leading tokens that half of the prompts have in common."""
    output: int = 32


def measure(engine: Alone, case: Case, sampling: str) -> Result:
    requests = _requests(engine, case, SAMPLINGS[sampling])
    block_size = engine.config.block_size
    longest = -(-(case.prompt + case.output) // block_size)
    scheduler = _scheduler(engine, blocks=case.count * longest // 6, budget=STEP_TOKENS)
    together = _run(engine, scheduler, requests)
    tokens = differences = 0
    for key, request in enumerate(_requests(engine, case, SAMPLINGS[sampling])):
        lone = _run(engine, _scheduler(engine, blocks=longest, budget=case.prompt), [request])[0]
        same = next((i for i, token in enumerate(lone) if token != together[key][i]), None)
        tokens += case.output if same is None else same + 1
        differences += same is not None
    counters = scheduler.counters
    return Result(sampling, tokens, differences, counters.preemptions, counters.prefix_hit_tokens)


def _requests(engine: Alone, case: Case, params: SamplingParams) -> list[Request]:
    rng = random.Random(0)
    ids = range(engine.model.vocab_size)
    common, made = rng.choices(ids, k=case.shared), []
    for key in range(case.count):
        own = rng.choices(ids, k=case.prompt)
        prompt = common + own[case.shared :] if key % 2 else own[: rng.randint(1, case.prompt)]
        made.append(Request(key, prompt, params, case.output, frozenset(), seed=key))
    return made


def _scheduler(engine: Alone, *, blocks: int, budget: int) -> Scheduler:
    return Scheduler(
        BlockAllocator(BlockPool(blocks), block_size=engine.config.block_size, enable_prefix_caching=True),
        max_num_seqs=engine.config.max_num_seqs,
        max_num_batched_tokens=budget,
        max_num_queued_requests=engine.config.max_num_queued_requests,
        max_num_queued_tokens=engine.config.max_num_queued_tokens,
    )


def _run(engine: Alone, scheduler: Scheduler, requests: list[Request]) -> list[list[int]]:
    """Each request's output; all arrive at once."""
    for request in requests:
        scheduler.add(request)
    while scheduler.requests:
        plan = scheduler.schedule()
        scheduler.update(plan, engine.runner.collect(engine.runner.launch(plan)).token_ids)
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]
