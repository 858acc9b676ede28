"""An answer of 8,000 tokens: it comes whole, and what it takes is the cache it was promised and nothing more."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
from pagoda.bench.alone import Alone, requests
from pagoda.bench.loads import Load
from pagoda.config import EngineConfig
from pagoda.plan import Plan

OUTPUT = 8_000
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "eos_token_id": 5,
}  # fmt: skip


def test_eight_thousand_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    settings = EngineConfig(model=str(tmp_path), device="cpu", load_format="dummy", num_kv_blocks=520)
    engine = Alone(settings, tmp_path)
    engine.runner.cache.keys.zero_()  # pages of its own that were never touched are not resident
    engine.runner.cache.values.zero_()
    loads = [Load([7] * 100, OUTPUT)]
    scheduler = engine.scheduler(loads)
    (request,) = requests(loads)
    scheduler.add(request)
    process, used = psutil.Process(), []
    while scheduler.requests:
        plan: Plan = scheduler.schedule()
        scheduler.update(plan, engine.runner.collect(engine.runner.launch(plan)).token_ids)
        if request.num_output_tokens % 1000 == 0:
            used.append(process.memory_info().rss)
    scheduler.check()
    assert request.num_output_tokens == OUTPUT
    assert request.finish_reason == "length"
    assert scheduler.pool.num_owned == 0
    assert max(used[1:]) - used[1] < 8 * 2**20, f"resident memory by 1,000 tokens: {[u >> 20 for u in used]} MiB"
