"""The kernels of paged_attention against the reference in float32, over caches whose unused slots hold NaN."""

from dataclasses import replace

import pytest
import torch
from pagoda_kernels.paged_attention import AttentionBatch, reference
from pagoda_kernels.paged_attention.cases import CASES, Case, Inputs, make_batch
from pagoda_kernels.testing import PoisonedEmpty, compare

Bounds = tuple[float, float]
FLOAT8 = torch.float8_e4m3fn
# What the interpreter runs, which takes seconds a case; and of that in float16, whose tiles are others than float32's.
INTERPRETED = (
    "one_decode_one_over", "ragged_decodes", "one_token_chunk", "last_chunk_unaligned", "mixed", "mixed_mqa",
    "mixed_head_80", "mixed_head_256", "mixed_softcap_window", "mixed_float8", "shared_prefix", "split", "split_window",
    "odd_block_size",
)  # fmt: skip
FLOAT16 = ("mixed_head_80", "mixed_softcap_window", "split_window")
MIXED = next(case for case in CASES if case.name == "mixed")
SMALL = Case("small", ((1, 33), (1, 1), (5, 40)), 2)
SIZES = (
    Case("split", ((1, 700), (1, 5), (1, 129), (1, 128), (1, 384)), 5, num_heads=4, num_kv_heads=2),
    Case("split_window", ((1, 700), (1, 5), (1, 129)), 3, num_heads=4, num_kv_heads=2, window=300),
    Case("shared_long", tuple((1, 320 + 37 * i) for i in range(20)), 20, shared_prefix=304, softcap=2.0),
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
    Case("llama_mixed_window", (*_RAGGED[:40], (511, 511), (513, 2000), (1, 1)), 40, **_LLAMA, window=700),
    Case("llama_mixed_float8", (*_RAGGED[:40], (511, 511), (2, 700)), 40, **_LLAMA, cache_dtype=FLOAT8, k_scale=0.7),
    Case("llama_prefill_float8", ((1, 9), (700, 700), (300, 5000)), 1, **_LLAMA, cache_dtype=FLOAT8, v_scale=1.3),
    Case("llama_decodes_float8", _RAGGED, 300, **_LLAMA, cache_dtype=FLOAT8, k_scale=0.7, v_scale=1.3),
    Case(
        "llama_shared_float8",
        tuple((1, 1500 + i) for i in range(70)),
        70,
        **_LLAMA,
        shared_prefix=1488,
        cache_dtype=FLOAT8,
    ),
    Case("llama_shared", tuple((1, 1500 + i) for i in range(70)), 70, **_LLAMA, shared_prefix=1488),
    Case("llama_prefill_window", ((2048, 2048), (1000, 5000), (77, 77)), 0, **_LLAMA, window=900),
    Case("gemma_like", (*_RAGGED[:9], (300, 900)), 9, 16, 8, 256, window=512, softcap=50.0),
)


def wide(i: Inputs) -> Inputs:
    return replace(i, q=i.q.float(), k_cache=i.k_cache.float(), v_cache=i.v_cache.float())


@pytest.mark.parametrize(
    "case",
    [
        case if case.name in INTERPRETED else pytest.param(case, marks=pytest.mark.native)
        for case in (*CASES, *SIZES, *LARGE)
    ],
    ids=lambda case: case.name,
)
def test_paged_attention_agrees_with_the_reference(case: Case, dtype: torch.dtype, bounds: Bounds, device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    if device == "cpu" and dtype == torch.float16 and case.name not in FLOAT16:
        pytest.skip("float32 is enough in the interpreter")
    inputs = case.make(dtype, device)
    expected = wide(inputs).run(reference.paged_attention)
    with PoisonedEmpty():
        actual = inputs.run(kernel.paged_attention)
    compare(actual, expected.to(dtype), *bounds)
    assert actual.is_contiguous()


@pytest.mark.native
def test_queries_beyond_float16_are_cut_off_for_keys_of_8_bits(device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    inputs = replace(SMALL, cache_dtype=FLOAT8).make(torch.bfloat16, device)
    inputs = replace(inputs, q=torch.where(inputs.q.abs() > 2, inputs.q * 1e6, inputs.q))
    cut = replace(inputs, q=inputs.q.float().clamp(-65504, 65504))
    expected = wide(cut).run(reference.paged_attention)
    compare(inputs.run(kernel.paged_attention), expected.to(torch.bfloat16), 2e-2, 4e-3)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SMALL),
        pytest.param(MIXED, marks=pytest.mark.native),
        pytest.param(replace(MIXED, name="window", window=20), marks=pytest.mark.native),
        Case("float8", ((9, 90),), 0, 4, 2, 128, cache_dtype=FLOAT8),
        pytest.param(Case("long", ((1, 9), (300, 700), (1, 1)), 1, 4, 2, 128, window=390), marks=pytest.mark.native),
    ],
    ids=lambda case: case.name,
)
def test_a_widened_cache_holds_what_the_chunks_see(case: Case, device: str) -> None:
    """Also where the chunks are too short to be widened of themselves."""
    from pagoda_kernels.paged_attention.call import Call
    from pagoda_kernels.paged_attention.widened import widen

    inputs = case.make(torch.float16, device)
    with PoisonedEmpty():
        keys, values, tables = widen(
            Call.of(inputs.q, inputs.k_cache, inputs.v_cache, inputs.batch, inputs.scale, inputs.window)
        )
    batch, first = inputs.batch, case.num_decodes
    expected = batch.block_tables[first:].long()
    for chunk, (length, context) in enumerate(case.requests[first:]):
        seen = torch.arange(max(0, context - length - case.window + 1) if case.window else 0, context, device=device)
        for cache, widened in ((inputs.k_cache, keys), (inputs.v_cache, values)):
            rows = expected[chunk][seen // case.block_size] * case.block_size + seen % case.block_size
            found = tables[chunk].long()[seen // 128] * 128 + seen % 128
            assert torch.equal(widened.flatten(0, 1)[found], cache.flatten(0, 1)[rows].half())
            behind = torch.arange(context, -(-context // 128) * 128, device=device)
            assert not widened.flatten(0, 1)[tables[chunk].long()[behind // 128] * 128 + behind % 128].any()


_CHUNKS = ((1, 33), (1, 200), (5, 5), (17, 40), (1, 9), (64, 64), (300, 700), (129, 257), (70, 1000), (128, 128))
HOPPER = tuple(
    Case(
        f"{heads}x{kv_heads}_{size}_block_{block}_window_{window}_softcap_{softcap}",
        _CHUNKS, 2, heads, kv_heads, size, block, window, softcap, k_scale=0.7, v_scale=1.3,
    )
    for heads, kv_heads, size, block, window, softcap in (
        (32, 8, 128, 16, 0, 0.0), (32, 8, 64, 16, 0, 0.0), (7, 1, 128, 16, 0, 0.0), (4, 4, 128, 32, 0, 0.0),
        (9, 3, 64, 8, 4096, 0.0), (8, 2, 128, 128, 20, 0.0), (8, 2, 128, 256, 200, 2.0), (8, 2, 64, 16, 1, 2.0),
    )
)  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize("case", HOPPER, ids=lambda case: case.name)
def test_chunks_on_hopper_agree_with_the_reference(case: Case, device: str) -> None:
    from pagoda_kernels.paged_attention import kernel, prefill

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    inputs = case.make(torch.float16, device)
    expected = wide(inputs).run(reference.paged_attention).half()
    with pytest.MonkeyPatch.context() as patch, PoisonedEmpty():
        patch.setattr(prefill, "attend_portably", None)
        compare(inputs.run(kernel.paged_attention), expected, 5e-3, 1e-3)


@pytest.mark.parametrize("with_decodes", [False, True])
def test_spans_are_the_chunks_queries(with_decodes: bool, device: str) -> None:
    from pagoda_kernels.paged_attention.spans import list_spans

    requests = ((1, 300), (1, 9), (70, 700), (3, 3), (32, 40), (161, 200))
    batch = make_batch(requests, 2, 16, torch.Generator(), device)
    found = list_spans(batch, batch.num_tokens, 32, 8, 132, 2 * with_decodes)
    count, programs = found[0, :2].tolist()
    spans, token = [], 2
    for chunk, (length, context) in enumerate(requests[2:]):
        for skipped in range(0, length, 32):
            before = context - length + skipped
            spans.append((token + skipped, min(32, length - skipped), before, context, chunk))
        token += length
    assert count == len(spans)
    assert sorted(map(tuple, found[1 : 1 + count, :5].tolist())) == spans
    assert found[1, 4] == len(requests) - 3, "the last of the last chunk come first"
    assert programs == (count * 8 if with_decodes else 132)


@pytest.mark.native
def test_decodes_beside_chunks_leave_a_widened_cache_alone(device: str) -> None:
    """What the chunks' kernel still reads has no name any more when the decodes' parts are written."""
    from pagoda_kernels.paged_attention import kernel

    case = Case("float8", (*((1, 8000),) * 30, (2000, 8000)), 30, **_LLAMA, cache_dtype=FLOAT8)
    inputs = case.make(torch.bfloat16, device)
    expected = wide(inputs).run(reference.paged_attention).bfloat16()
    for _ in range(5):
        compare(inputs.run(kernel.paged_attention), expected, 2e-2, 4e-3)


@pytest.mark.native
def test_whoever_waits_for_decodes_beside_chunks_waits_for_both(device: str) -> None:
    """The decode is over long before the chunk; what follows is launched early."""
    from pagoda_kernels.paged_attention import kernel
    from pagoda_kernels.rms_norm import kernel as rms_norm

    inputs = Case("llama", ((1, 16), (2000, 8000)), 1, **_LLAMA).make(torch.bfloat16, device)
    weight = torch.ones(4096, dtype=torch.bfloat16, device=device)
    for _ in range(20):
        normalised = rms_norm.rms_norm(inputs.run(kernel.paged_attention).flatten(1), weight, 1e-5)
    expected = rms_norm.rms_norm(inputs.run(kernel.paged_attention).flatten(1).clone(), weight, 1e-5)
    torch.cuda.synchronize()
    assert torch.equal(normalised, expected)


@pytest.mark.parametrize(
    "requests",
    [
        ((1, 300), (1, 1), (1, 70)),
        pytest.param(((1, 8000),), marks=pytest.mark.native),
        pytest.param(((1, 700),) * 30, marks=pytest.mark.native),
    ],
    ids=["short", "long", "many"],
)
def test_parts_are_added_in_one_order(requests: tuple[tuple[int, int], ...], device: str) -> None:
    """Whichever program comes last; and a batch serves many layers."""
    from pagoda_kernels.paged_attention import kernel

    inputs = Case("parts", requests, len(requests), num_heads=8, num_kv_heads=2).make(device=device)
    expected = inputs.run(kernel.paged_attention)
    compare(expected, inputs.run(reference.paged_attention), 1e-5)
    for _ in range(2 if device == "cpu" else 50):
        assert torch.equal(inputs.run(kernel.paged_attention), expected)


def test_q_may_be_a_view_of_a_fused_tensor(dtype: torch.dtype, device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    inputs = SMALL.make(dtype, device)
    expected = inputs.run(kernel.paged_attention)
    fused = torch.full((inputs.batch.num_tokens, 15, 64), float("nan"), dtype=dtype, device=device)
    fused[:, :9] = inputs.q
    actual = replace(inputs, q=fused[:, :9]).run(kernel.paged_attention)
    assert torch.equal(actual, expected)


def test_extreme_scores_stay_finite(device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    inputs = SMALL.make(device=device)
    inputs.q.mul_(1e4)
    compare(inputs.run(kernel.paged_attention), inputs.run(reference.paged_attention), 1e-3)


def test_the_hosts_contexts_may_be_upper_bounds(device: str) -> None:
    """As for a batch that a CUDA graph is captured with."""
    from pagoda_kernels.paged_attention import kernel

    case = Case("bound", ((1, 300), (1, 1), (1, 17)), 3, num_heads=4, num_kv_heads=2)
    inputs = case.make(device=device)
    b = inputs.batch
    bound = AttentionBatch(b.block_tables, b.query_starts, b.context_lens, b.query_lens_host, [9000] * 3, 3)
    actual = replace(inputs, batch=bound).run(kernel.paged_attention)
    compare(actual, inputs.run(reference.paged_attention), 1e-5)


@pytest.mark.parametrize("unused", [3, 40])
@pytest.mark.parametrize("context", [64, 9000], ids=["added at once", "added apart"])
def test_a_graph_has_room_for_decodes_and_chunks_that_there_are_not(
    unused: int, context: int, dtype: torch.dtype, bounds: Bounds, device: str
) -> None:
    """The chunks' rows follow those of the decodes that there are, and the padding's are left alone."""
    from pagoda_kernels.paged_attention import kernel

    case = Case("dense", ((1, 40), (1, 7), (5, 5), (17, 40)), 2, num_heads=4, num_kv_heads=2)
    inputs = case.make(dtype, device)
    b = inputs.batch
    order = [0, 1, *[0] * unused, 2, 3, 3, 3]
    contexts = torch.tensor([40, 7, *[0] * unused, 5, 40, 0, 0], dtype=torch.int32, device=device)
    starts = torch.tensor([*range(2 + unused), 2, 7, 24, 24, 24], dtype=torch.int32, device=device)
    count = len(order)
    padded = AttentionBatch(b.block_tables[order], starts, contexts, [1] * count, [context] * count, 2 + unused)
    q = torch.cat([inputs.q, inputs.q.new_full((8, *inputs.q.shape[1:]), float("nan"))])
    actual = replace(inputs, q=q, batch=padded).run(kernel.paged_attention)
    compare(actual[:24], wide(inputs).run(reference.paged_attention).to(dtype), *bounds)


@pytest.mark.parametrize(("programs", "context"), [(1, 1), (1, 10**6), (8, 8192), (2048, 1024), (10**5, 10**6)])
def test_splits_are_bounded(programs: int, context: int) -> None:
    from pagoda_kernels.paged_attention import decode_plan

    splits = decode_plan.plan_splits(programs, 1, context)
    assert 1 <= splits.most <= 128
    assert (splits.most - 1) * splits.tokens < context


@pytest.mark.native
@pytest.mark.parametrize("requests", [((1, 40), (1, 1000)), ((5, 40), (70, 1000))], ids=["decode", "prefill"])
def test_offsets_go_beyond_32_bits(requests: tuple[tuple[int, int], ...], device: str) -> None:
    from pagoda_kernels.paged_attention import kernel

    case = Case("far", requests, 2 if requests[0][0] == 1 else 0, num_heads=16, num_kv_heads=8, head_size=128)
    near = case.make(torch.bfloat16, device)
    expected = near.run(kernel.paged_attention)
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
    assert torch.equal(Inputs(near.q, *caches, batch, near.scale).run(kernel.paged_attention), expected)


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
    captured.run(kernel.paged_attention)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.run(kernel.paged_attention)
    contexts.copy_(b.context_lens)
    out.fill_(float("nan"))
    graph.replay()
    compare(out, wide(inputs).run(reference.paged_attention).bfloat16(), 2e-2, 4e-3)


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
