"""The Llama page against transformers' own class: same weights, same logits, however the tokens are cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pagoda import config, hf_config, weights
from pagoda.block_pool import BlockPool
from pagoda.errors import CheckpointError
from pagoda.request import Request
from pagoda.runner import Runner
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Plan, Scheduler
from transformers import LlamaConfig, LlamaForCausalLM

TOLERANCE = 1e-4
PROMPT = [(7 * i * i + 3) % 128 for i in range(53)]


def checkpoint(folder: Path, **changes: object) -> LlamaForCausalLM:
    """A tiny random Llama on disk, and transformers' own copy of it."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=256,
        **{"tie_word_embeddings": False, "initializer_range": 0.4, "num_key_value_heads": 2, **changes},
    )
    model = LlamaForCausalLM(shape).float().eval()
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


class Recorder(Runner):
    """A runner that keeps the logits of every sampled row."""

    def launch(self, plan: Plan):  # type: ignore[no-untyped-def]
        self.rows: list[torch.Tensor] = getattr(self, "rows", [])
        logits = self.model.logits

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            self.rows.append(logits(hidden))
            return self.rows[-1]

        self.model.logits = keep  # type: ignore[method-assign]
        try:
            return super().launch(plan)
        finally:
            self.model.logits = logits  # type: ignore[method-assign]


def generate(folder: Path, prompts: list[list[int]], count: int, budget: int) -> tuple[list[list[int]], Recorder]:
    """Greedy continuations of all prompts at once, with `budget` tokens a step."""
    settings = config.from_parameters({"model": str(folder), "num_kv_blocks": 64, "block_size": 8})
    runner = Recorder(settings, hf_config.load(folder), folder, 256)
    scheduler = Scheduler(
        BlockPool(64),
        block_size=8,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        max_num_queued_requests=8,
        enable_prefix_caching=True,
    )
    params = SamplingParams(temperature=0)
    requests = [Request(i, ids, params, count, frozenset(), 0) for i, ids in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    while scheduler.requests:
        plan = scheduler.schedule()
        scheduler.update(plan, runner.collect(runner.launch(plan)))
        scheduler.check()
    return [r.token_ids[len(r.prompt_ids) :] for r in requests], runner


@pytest.mark.parametrize("budget", [256, 16, 9], ids=["one prefill", "chunks of 16", "chunks of 9"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 6},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["grouped heads", "tied", "biases", "no groups", "llama3 rope"],
)
def test_logits_and_continuation_equal_transformers(tmp_path: Path, changes: dict[str, object], budget: int) -> None:
    model = checkpoint(tmp_path, **changes)
    ((tokens,), runner) = generate(tmp_path, [PROMPT], 12, budget)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    got = torch.cat(runner.rows)
    assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert tokens == expected.argmax(dim=1).tolist()


def test_neighbours_and_shared_prefixes_change_no_token(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    prompts = [PROMPT[:n] for n in (1, 8, 17, 40)] + [[*PROMPT[:40], 5, 6, 7]]
    together, _ = generate(tmp_path, prompts, 10, 24)
    alone = [generate(tmp_path, [prompt], 10, 256)[0][0] for prompt in prompts]
    assert together == alone


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, tie_word_embeddings=False)
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    first, *others = sorted(tmp_path.glob("*.safetensors"))
    for other in others:
        other.unlink()
    with pytest.raises(CheckpointError, match="tensors are missing"):
        generate(tmp_path, [[1]], 1, 8)
    first.unlink()
    with pytest.raises(CheckpointError, match="pickled weights"):
        weights.files(tmp_path)


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    text = (tmp_path / "config.json").read_text().replace("LlamaForCausalLM", "OtherForCausalLM")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="known ones: LlamaForCausalLM"):
        generate(tmp_path, [[1]], 1, 8)
