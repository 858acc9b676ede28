"""Families through the real scheduler and runner: requests in one batch, each goes on as transformers would alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.families import FAMILIES, Family
from engine.parity import PROMPT, expected_logits
from pagoda import config, hf_config
from pagoda.allocation import BlockAllocator
from pagoda.block_pool import BlockPool
from pagoda.request import Request
from pagoda.runner import Runner
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler

BATCHED = ("mistral", "qwen2 tied", "gemma2", "gemma3", "qwen3 moe", "mixtral")
COUNT = 10


def generate(folder: Path, prompts: list[list[int]], count: int, budget: int, **settings: object) -> list[list[int]]:
    """Greedy continuations of all prompts at once, with `budget` tokens a step."""
    given = {"model": str(folder), "num_kv_blocks": 64, "block_size": 8, "max_num_seqs": 8, **settings}
    runner = Runner(config.from_parameters(given), hf_config.load(folder), folder, 256)
    scheduler = Scheduler(
        BlockAllocator(BlockPool(64), block_size=8, enable_prefix_caching=True),
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        max_num_queued_requests=8,
        max_num_queued_tokens=10_000,
    )
    params = SamplingParams(temperature=0)
    requests = [Request(i, ids, params, count, frozenset(), 0) for i, ids in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    while scheduler.requests:
        plan = scheduler.schedule()
        scheduler.update(plan, runner.collect(runner.launch(plan)).token_ids)
        scheduler.check()
    return [r.token_ids[len(r.prompt_ids) :] for r in requests]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in BATCHED], ids=lambda family: family.name)
def test_neighbours_and_shared_prefixes_change_no_token(tmp_path: Path, family: Family) -> None:
    model = family.save(tmp_path)
    prompts = [PROMPT[:n] for n in (1, 8, 17, 40)] + [[*PROMPT[:40], 5, 6, 7]]
    for prompt, tokens in zip(prompts, generate(tmp_path, prompts, COUNT, 24), strict=True):
        logits = expected_logits(model, prompt + tokens[:-1])
        assert tokens == logits[len(prompt) - 1 :].argmax(dim=1).tolist()
