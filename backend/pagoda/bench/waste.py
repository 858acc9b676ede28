"""How much of the KV cache is reserved and holds no token, over the peer's mixed load; no model runs."""

from __future__ import annotations

import statistics

from pagoda.allocation import BlockAllocator
from pagoda.bench.alone import requests
from pagoda.bench.loads import mixed
from pagoda.block_pool import BlockPool
from pagoda.scheduler import Scheduler

TOKEN = 0
"""What every request is answered: lengths alone decide how much is reserved."""


def mean_waste(*, count: int = 1000, max_num_seqs: int = 256, block_size: int = 16) -> float:
    """Mean over all steps of the reserved slots without a token, as a share of the reserved ones.

    `count` requests of 64…1024 tokens in and 32…512 out, `max_num_seqs` at a time, over a cache that holds them all.
    """
    loads = mixed(count, inputs=(64, 1024), outputs=(32, 512), vocab_size=50_000)
    pool = BlockPool(max_num_seqs * (1024 + 512) // block_size)
    scheduler = Scheduler(
        BlockAllocator(pool, block_size=block_size, enable_prefix_caching=True),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
        max_num_queued_requests=count,
        max_num_queued_tokens=sum(len(load.prompt_ids) for load in loads),
    )
    for request in requests(loads):
        scheduler.add(request)
    shares = []
    while scheduler.requests:
        plan = scheduler.schedule()
        shares.append(scheduler.num_wasted_slots / (pool.num_owned * block_size))
        scheduler.update(plan, [TOKEN for chunk in plan.chunks if chunk.samples])
    return statistics.mean(shares)
