"""Each model family by the engine on a GPU: graphs, a step ahead, its own kernels; beside the CPU's float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.families import FAMILIES, GEMMA, MIXTURE, Family
from engine.parity import TOLERANCE, Paged, rms
from gpu.test_engine import GREEDY, generate, make_runner
from pagoda.plan import Chunk, Plan
from pagoda.request import Request, Status
from pagoda.runner import Runner
from pagoda.sampling_params import SamplingParams

pytestmark = pytest.mark.native

MAX_LEN = 256
PROMPTS = [[(7 * i * i + 3 * k) % 128 for i in range(1 + 9 * k)] for k in range(20)]
LARGER = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "initializer_range": 0.1}
LARGER_FAMILIES = (
    Family("mistral", "Mistral", {"sliding_window": 16, **LARGER}),
    Family("qwen3", "Qwen3", LARGER),
    Family("gemma2", "Gemma2", {**GEMMA, **LARGER, "head_dim": 256, "attn_logit_softcapping": 5.0}),
    Family("gemma3", "Gemma3", {**GEMMA, **LARGER, "head_dim": 128}),
    Family("phi3", "Phi3", {**LARGER, "hidden_size": 384, "head_dim": 96, "sliding_window": 20}),
    Family("qwen3 moe", "Qwen3Moe", {**LARGER, **MIXTURE, "moe_intermediate_size": 64, "num_experts": 10}),
    Family("mixtral", "Mixtral", {**LARGER, "num_local_experts": 5, "num_experts_per_tok": 2}),
)
"""With heads as real models have them, whose kernels in 16 bits are others."""


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_greedy_tokens_under_load_are_those_of_the_cpu(tmp_path: Path, family: Family) -> None:
    """But where two tokens lie so near each other that rounding decides."""
    family.save(tmp_path)
    runs = [
        generate(make_runner(tmp_path, MAX_LEN, device=device), (GREEDY,), PROMPTS, burst=burst, budget=budget)
        for device, burst, budget in (("cpu", 20, 4096), ("cuda", 3, 96))
    ]
    (_, expected), (_, got) = runs
    for prompt, right, answer in zip(PROMPTS, expected, got, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(right, answer, strict=True)) if a != b), None)
        if same is not None:
            logits = Paged(tmp_path, MAX_LEN).prefill([*prompt, *right[:same]], MAX_LEN)[-1]
            assert logits[right[same]] - logits[answer[same]] < 2 * TOLERANCE * logits.abs().max()


@pytest.mark.parametrize("family", LARGER_FAMILIES, ids=lambda family: family.name)
def test_in_bfloat16_it_errs_no_more_than_the_cpu(tmp_path: Path, family: Family) -> None:
    family.save(tmp_path)
    exact, on_cpu, on_gpu = (
        scores(make_runner(tmp_path, MAX_LEN, device=device, dtype=dtype))
        for device, dtype in (("cpu", "float32"), ("cpu", "bfloat16"), ("cuda", "bfloat16"))
    )
    assert rms(on_gpu - exact) < 1.25 * rms(on_cpu - exact)


def scores(runner: Runner) -> torch.Tensor:
    """Log-probabilities of the prompts' tokens, all of whose first halves are one step, and the others another."""
    asked = SamplingParams(temperature=0, prompt_logprobs=0)
    requests = [Request(i, ids, asked, 2, frozenset(), i) for i, ids in enumerate(PROMPTS[4:])]
    for i, request in enumerate(requests):
        request.status = Status.RUNNING
        request.block_ids = list(range(16 * i, 16 * i + 16))
    found: list[float] = []
    for half in range(2):
        collected = runner.collect(runner.launch(Plan(half, [_half(request, half) for request in requests])))
        found += [score.logprob for _, scores in collected.prompt_logprobs for score in scores]
    assert len(found) == sum(request.num_prompt_tokens - 1 for request in requests)
    return torch.tensor(found)


def _half(request: Request, half: int) -> Chunk:
    middle = request.num_prompt_tokens // 2
    start, end = ((0, middle), (middle, request.num_prompt_tokens))[half]
    return Chunk(request, start, end - start, half == 1, False, 0)
