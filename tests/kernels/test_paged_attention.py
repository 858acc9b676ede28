"""paged_attention: the reference against loops in float64, the CPU implementation against the reference."""

import math
from dataclasses import replace

import pytest
import torch
from pagoda_kernels.paged_attention import AttentionBatch, PagedAttention, cpu, reference
from pagoda_kernels.paged_attention.cases import CASES, Case, Inputs, make_batch
from pagoda_kernels.testing import PoisonedEmpty, compare

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
implementations = pytest.mark.parametrize(
    "op", [reference.paged_attention, cpu.paged_attention], ids=["reference", "cpu"]
)
MIXED = next(case for case in CASES if case.name == "mixed")


def naive(i: Inputs, case: Case) -> torch.Tensor:
    """Loop over requests, tokens and heads, in float64, one cache row at a time through the block table."""
    out = torch.zeros(i.q.shape, dtype=torch.float64)
    token, group = 0, case.num_heads // case.num_kv_heads
    for table, n, c in zip(i.batch.block_tables, i.batch.query_lens_host, i.batch.context_lens_host, strict=True):
        blocks = [(int(table[p // case.block_size]), p % case.block_size) for p in range(c)]
        keys = torch.stack([i.k_cache[b] for b in blocks]).double() * i.k_scale
        values = torch.stack([i.v_cache[b] for b in blocks]).double() * i.v_scale
        for own in range(c - n, c):
            first = max(0, own - case.window + 1) if case.window else 0
            for head in range(case.num_heads):
                scores = keys[first : own + 1, head // group] @ i.q[token, head].double() * i.scale
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                out[token, head] = scores.softmax(0) @ values[first : own + 1, head // group]
            token += 1
    return out.float()


@cases
def test_the_reference_is_the_formula(case: Case) -> None:
    inputs = case.make()
    compare(inputs.run(reference.paged_attention), naive(inputs, case), 2e-6)


@cases
def test_cpu_agrees_with_the_reference(case: Case) -> None:
    inputs = case.make()
    expected = inputs.run(reference.paged_attention)
    with PoisonedEmpty():
        actual = inputs.run(cpu.paged_attention)
    compare(actual, expected, 1e-5)
    assert actual.is_contiguous()


@implementations
def test_layers_of_a_step_share_the_batch(op: PagedAttention) -> None:
    """A later layer reuses what the first prepared, and one of another shape does not."""
    layers = [MIXED, MIXED, replace(MIXED, num_heads=4, num_kv_heads=1), replace(MIXED, window=7)]
    shared = MIXED.make().batch
    for seed, case in enumerate(layers):
        # One seed gives one set of block tables: only the contents may differ.
        inputs = replace(case.make(), batch=shared)
        inputs.q.mul_(1 + seed)
        inputs.v_cache.mul_(1 + seed)
        compare(inputs.run(op), naive(inputs, case), 1e-5)


@implementations
def test_q_may_be_a_view_of_a_fused_tensor(op: PagedAttention) -> None:
    inputs = MIXED.make()
    expected = op(inputs.q, inputs.k_cache, inputs.v_cache, inputs.batch, inputs.scale)
    fused = torch.cat((inputs.q, torch.full((inputs.batch.num_tokens, 6, 64), float("nan"))), dim=1)
    actual = op(fused[:, :9], inputs.k_cache, inputs.v_cache, inputs.batch, inputs.scale)
    compare(actual, expected, 1e-6)


@implementations
def test_a_chunked_prefill_equals_a_whole_one(op: PagedAttention) -> None:
    whole = Case("whole", ((60, 60),), 0).make()
    expected = op(whole.q, whole.k_cache, whole.v_cache, whole.batch, whole.scale)
    for start, stop in ((0, 25), (25, 59), (59, 60)):
        contexts = torch.tensor([stop], dtype=torch.int32)
        starts = torch.tensor([0, stop - start], dtype=torch.int32)
        decodes = int(stop - start == 1)
        part = AttentionBatch(whole.batch.block_tables, starts, contexts, [stop - start], [stop], decodes)
        actual = op(whole.q[start:stop], whole.k_cache, whole.v_cache, part, whole.scale)
        compare(actual, expected[start:stop], 1e-5)


@implementations
def test_extreme_scores_stay_finite(op: PagedAttention) -> None:
    inputs = MIXED.make()
    inputs.q.mul_(1e4)
    compare(inputs.run(op), naive(inputs, MIXED), 1e-3)


@implementations
def test_bfloat16(op: PagedAttention) -> None:
    low = MIXED.make(torch.bfloat16)
    wide = Inputs(low.q.float(), low.k_cache.float(), low.v_cache.float(), low.batch, low.scale)
    expected = reference.paged_attention(wide.q, wide.k_cache, wide.v_cache, wide.batch, wide.scale)
    compare(low.run(op), expected.bfloat16(), 3e-2)


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "num_decodes", "message"),
    [
        ([1, 1], [4], 2, "2 query lengths, but 1 contexts"),
        ([5], [4], 0, "at most its context length"),
        ([0], [4], 0, "at least 1"),
        ([1, 2], [4, 4], 2, "must be decodes"),
    ],
)
def test_a_contradictory_batch_is_refused(
    query_lens: list[int], context_lens: list[int], num_decodes: int, message: str
) -> None:
    none = torch.zeros(0)
    with pytest.raises(ValueError, match=message):
        AttentionBatch(none, none, none, query_lens, context_lens, num_decodes)


def test_a_batch_prepares_once_for_each_argument() -> None:
    calls: list[float] = []

    def make(batch: AttentionBatch, factor: float) -> float:
        calls.append(factor)
        return factor * batch.num_tokens

    batch = make_batch(((1, 5), (3, 9)), 1, 16, torch.Generator())
    assert [batch.prepare(make, f) for f in (1.0, 2.0, 1.0, math.pi)] == [4.0, 8.0, 4.0, 4 * math.pi]
    assert calls == [1.0, 2.0, math.pi]


@pytest.mark.parametrize(
    ("device_prefix", "host_prefix", "message"),
    [(None, 16, "go together"), (torch.tensor([16]), 0, "go together"), (torch.tensor([16]), 20, "must be below")],
)
def test_a_contradictory_prefix_is_refused(device_prefix: torch.Tensor | None, host_prefix: int, message: str) -> None:
    none = torch.zeros(0)
    with pytest.raises(ValueError, match=message):
        AttentionBatch(none, none, none, [1, 1], [40, 20], 2, device_prefix, host_prefix)
