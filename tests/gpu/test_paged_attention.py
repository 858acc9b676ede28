"""The kernels of paged_attention against the reference in float32, over caches whose unused slots hold NaN."""

from dataclasses import replace

import pytest
import torch
from pagoda_kernels.paged_attention import AttentionBatch, PagedAttention, reference
from pagoda_kernels.paged_attention.cases import CASES, Case, Inputs, make_batch
from pagoda_kernels.testing import PoisonedEmpty, compare

Bounds = tuple[float, float]
# Left out in the interpreter; and what it takes of float16, whose tiles and dot products are others than float32's.
SLOW = ("more_decodes_than_a_group", "mixed_many_kv_heads", "mixed_window_beyond", "mixed_block_8")
FLOAT16 = ("mixed", "mixed_head_80", "mixed_head_128", "mixed_softcap", "mixed_window_20", "split", "split_window")
MIXED = next(case for case in CASES if case.name == "mixed")
SIZES = (
    replace(MIXED, name="mixed_head_96", num_heads=6, num_kv_heads=2, head_size=96),
    replace(MIXED, name="mixed_head_256", num_heads=4, num_kv_heads=2, head_size=256),
    Case("split", ((1, 700), (1, 5), (1, 129), (1, 128), (1, 384)), 5, num_heads=4, num_kv_heads=2),
    Case("split_window", ((1, 700), (1, 5), (1, 129)), 3, num_heads=4, num_kv_heads=2, sliding_window=300),
    Case("group_of_20", ((1, 40), (9, 50)), 1, num_heads=20, num_kv_heads=1),
    Case("odd_block_size", ((1, 40), (9, 50)), 1, block_size=10),
)
_RAGGED = tuple((1, 1 + (i * 997) % 3000) for i in range(300))
_LLAMA = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128}
LARGE = (
    Case("llama_decodes", _RAGGED, 300, **_LLAMA),
    Case("llama_one_long_decode", ((1, 30011),), 1, **_LLAMA),
    Case("llama_long_among_short", (*_RAGGED[:7], (1, 20000), *_RAGGED[7:50]), 51, **_LLAMA),
    Case("llama_prefill", ((2048, 2048), (1000, 5000), (77, 77)), 0, **_LLAMA),
    Case("llama_mixed", (*_RAGGED[:40], (511, 511), (513, 2000), (1, 1), (2, 700)), 40, **_LLAMA),
    Case("llama_mixed_window", (*_RAGGED[:40], (511, 511), (513, 2000), (1, 1)), 40, **_LLAMA, sliding_window=700),
    Case("gemma_like", (*_RAGGED[:9], (300, 900)), 9, 16, 8, 256, sliding_window=512, softcap=50.0),
)


def run(op: PagedAttention, i: Inputs, case: Case) -> torch.Tensor:
    return op(i.q, i.k_cache, i.v_cache, i.batch, i.scale, case.sliding_window, case.softcap)


def wide(i: Inputs) -> Inputs:
    return replace(i, q=i.q.float(), k_cache=i.k_cache.float(), v_cache=i.v_cache.float())


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, marks=pytest.mark.native) if case.name in SLOW else case for case in (*CASES, *SIZES)),
        *(pytest.param(case, marks=pytest.mark.native) for case in LARGE),
    ],
    ids=lambda case: case.name,
)
def test_paged_attention_agrees_with_the_reference(case: Case, dtype: torch.dtype, bounds: Bounds, device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    if device == "cpu" and dtype == torch.float16 and case.name not in FLOAT16:
        pytest.skip("float32 is enough in the interpreter")
    inputs = case.make(dtype, device)
    expected = run(reference.paged_attention, wide(inputs), case)
    with PoisonedEmpty():
        actual = run(kernel.paged_attention, inputs, case)
    compare(actual, expected.to(dtype), *bounds)
    assert actual.is_contiguous()


def test_q_may_be_a_view_of_a_fused_tensor(device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    inputs = MIXED.make(device=device)
    expected = run(kernel.paged_attention, inputs, MIXED)
    fused = torch.full((inputs.batch.num_tokens, 15, 64), float("nan"), device=device)
    fused[:, :9] = inputs.q
    actual = run(kernel.paged_attention, replace(inputs, q=fused[:, :9]), MIXED)
    assert torch.equal(actual, expected)


def test_extreme_scores_stay_finite(device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    inputs = MIXED.make(device=device)
    inputs.q.mul_(1e4)
    compare(run(kernel.paged_attention, inputs, MIXED), run(reference.paged_attention, inputs, MIXED), 1e-3)


def test_the_hosts_contexts_may_be_upper_bounds(device: str) -> None:
    """As for a batch that a CUDA graph is captured with."""
    from pagoda_kernels.paged_attention import kernel

    case = Case("bound", ((1, 300), (1, 1), (1, 17)), 3, num_heads=4, num_kv_heads=2)
    inputs = case.make(device=device)
    b = inputs.batch
    bound = AttentionBatch(b.block_tables, b.query_starts, b.context_lens, b.query_lens_host, [9000] * 3, 3)
    actual = run(kernel.paged_attention, replace(inputs, batch=bound), case)
    compare(actual, run(reference.paged_attention, inputs, case), 1e-5)


@pytest.mark.parametrize(("programs", "context"), [(1, 1), (1, 10**6), (8, 8192), (2048, 1024), (10**5, 10**6)])
def test_splits_are_bounded(programs: int, context: int) -> None:
    from pagoda_kernels.paged_attention import kernel

    splits = kernel.plan_splits(programs, 1, context)
    assert 1 <= splits.most <= 128
    assert (splits.most - 1) * splits.tokens < context


@pytest.mark.native
@pytest.mark.parametrize("requests", [((1, 40), (1, 1000)), ((5, 40), (70, 1000))], ids=["decode", "prefill"])
def test_offsets_go_beyond_32_bits(requests: tuple[tuple[int, int], ...], device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    case = Case("far", requests, 2 if requests[0][0] == 1 else 0, num_heads=16, num_kv_heads=8, head_size=128)
    near = case.make(torch.bfloat16, device)
    expected = run(kernel.paged_attention, near, case)
    first = 2**31 // (16 * 8 * 128) - 20
    caches = []
    for cache in (near.k_cache, near.v_cache):
        far = torch.empty(first + len(cache), *cache.shape[1:], dtype=cache.dtype, device=device)
        far[:first] = float("nan")
        far[first:] = cache
        caches.append(far)
    b = near.batch
    tables = torch.where(b.block_tables < 0, b.block_tables, b.block_tables + first)
    batch = AttentionBatch(
        tables, b.query_starts, b.context_lens, b.query_lens_host, b.context_lens_host, b.num_decodes
    )
    assert torch.equal(run(kernel.paged_attention, Inputs(near.q, *caches, batch, near.scale), case), expected)


@pytest.mark.native
def test_decodes_replay_in_a_cuda_graph(device: str) -> None:
    """Captured at an upper bound of the contexts, replayed at others."""
    from pagoda_kernels.paged_attention import kernel

    case = Case("graph", ((1, 600), (1, 40), (1, 3000)), 3, num_heads=32, num_kv_heads=8, head_size=128)
    inputs = case.make(torch.bfloat16, device)
    b = inputs.batch
    contexts = torch.ones_like(b.context_lens)
    bound = AttentionBatch(b.block_tables, b.query_starts, contexts, b.query_lens_host, [4096] * 3, 3)
    captured = replace(inputs, batch=bound)
    run(kernel.paged_attention, captured, case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(kernel.paged_attention, captured, case)
    contexts.copy_(b.context_lens)
    out.fill_(float("nan"))
    graph.replay()
    compare(out, run(reference.paged_attention, wide(inputs), case).bfloat16(), 2e-2, 4e-3)


def test_no_split_is_needed_for_few_positions(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(((1, 3),), 1, 16, generator, device)
    q = torch.randn(1, 2, 64, device=device)
    cache = torch.randn(int(batch.block_tables.max()) + 1, 16, 2, 64, device=device)
    from pagoda_kernels.paged_attention import kernel

    compare(
        kernel.paged_attention(q, cache, cache, batch, 0.125),
        reference.paged_attention(q, cache, cache, batch, 0.125),
        1e-5,
    )
