"""The batch-invariant ops: each agrees with its reference, and a row has the same bits alone and in any company."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pagoda_kernels import AttentionBatch, PackedWeight, SamplingBatch, batch_invariant, for_device
from pagoda_kernels.batch_invariant import Products, products
from pagoda_kernels.batch_invariant.rows import SERIAL_ELEMENTS
from pagoda_kernels.fp8_linear import Fp8Weight
from pagoda_kernels.int4_linear import Int4Weight
from pagoda_kernels.paged_attention import reference as attention_reference
from pagoda_kernels.paged_attention.cases import CASES, Case, Inputs
from pagoda_kernels.rotary_kv_write import reference as rotary_reference
from pagoda_kernels.rotary_kv_write.cases import CASES as ROTARY_CASES
from pagoda_kernels.sampling.cases import CASES as SAMPLING_CASES
from pagoda_kernels.testing import PoisonedEmpty, compare
from torch import Tensor

OPS = for_device(torch.device("cpu"), batch_invariant=True)
SHAPES = [(576, 96), (1536, 64), (48, 80), (33, 7), (2048, 160)]


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def companies(count: int, seed: int = 0) -> Iterator[list[int]]:
    """Rows in random company and order, among them all rows and each of a few alone."""
    chance = random.Random(seed)
    yield list(range(count))
    if count == 0:
        return
    yield from ([chance.randrange(count)] for _ in range(5))
    yield from (chance.sample(range(count), chance.randint(1, count)) for _ in range(15))


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_row_of_a_product_keeps_its_bits(inputs: int, outputs: int, biased: bool) -> None:
    ops = for_device(torch.device("cpu"), batch_invariant=True)
    weight, x = randn(outputs, inputs), randn(300, inputs, seed=1)
    bias = randn(outputs, seed=2) if biased else None
    packed = ops.pack_linear(weight)
    expected = ops.linear(x, packed, bias)
    compare(
        expected,
        torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).float(),
        5e-6,
    )
    for rows in companies(300):
        got = ops.linear(x[rows], packed, bias)
        assert got.is_contiguous()
        assert torch.equal(got, expected[rows])


def test_strided_and_empty_inputs() -> None:
    packed = OPS.pack_linear(randn(24, 40))
    x = randn(40, 9).T
    assert torch.equal(OPS.linear(x, packed), OPS.linear(x.contiguous(), packed))
    assert OPS.linear(x[:0], packed).shape == (0, 24)


def test_tiles_that_disagree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose order changes with the row count, and one whose order changes with the place of a row."""
    packed = PackedWeight(randn(8, 16), 8, 16)

    def by_count(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        return x @ packed.data.T * (1 + 1e-6 * (len(x) in (1, 32)))

    def by_place(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        return x @ packed.data.T * (1 + 1e-6 * (torch.arange(len(x)) % 3).unsqueeze(1))

    monkeypatch.setattr(products.plain, "linear", by_count)
    assert Products().tiles(packed, torch.float32) == (2, 4, 8, 16, 64, 128)
    monkeypatch.setattr(products.plain, "linear", by_place)
    assert Products().tiles(packed, torch.float32) == (1,)


@pytest.mark.parametrize("tiles", [(1,), (16,), (2, 16, 64), (1, 2, 4, 8, 16, 32, 64, 128)])
def test_a_cover_holds_every_row(tiles: tuple[int, ...]) -> None:
    for count in range(300):
        cover = list(products.cover(count, tiles))
        assert set(cover) <= set(tiles)
        assert sum(cover) >= count > sum(cover[:-1]) or count == 0 == len(cover)
        assert sum(cover) - count <= max(products.PASS_ROWS, tiles[0])


def test_experts_keep_their_rows_bits() -> None:
    weight, x = randn(3, 64, 96), randn(60, 96, seed=1)
    experts = torch.arange(60) % 3
    expected = torch.stack([OPS.linear(x[i : i + 1], PackedWeight(weight[i % 3], 64, 96))[0] for i in range(60)])
    for rows in companies(60):
        order = sorted(rows, key=lambda row: int(experts[row]))
        starts = torch.tensor([0, *(sum(int(experts[r]) <= e for r in rows) for e in range(3))], dtype=torch.int32)
        assert torch.equal(OPS.grouped_linear(x[order], weight, starts), expected[order])


def test_quantised_weights_keep_their_rows_bits() -> None:
    fp8 = OPS.pack_fp8_linear(Fp8Weight(randn(32, 48).to(torch.float8_e4m3fn), randn(32).abs()))
    codes = torch.randint(16, (32, 256), dtype=torch.uint8)
    int4 = OPS.pack_int4_linear(Int4Weight(codes, codes[:, :2].contiguous(), randn(32, 2).half()))
    x, y = randn(20, 48), randn(20, 256)
    expected_fp8, expected_int4 = OPS.fp8_linear(x, fp8), OPS.int4_linear(y, int4)
    for rows in companies(20):
        assert torch.equal(OPS.fp8_linear(x[rows], fp8), expected_fp8[rows])
        assert torch.equal(OPS.int4_linear(y[rows], int4), expected_int4[rows])


# ── attention ─────────────────────────────────────────────────────────────────────────────────────────────────────

attention_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@attention_cases
def test_attention_agrees_with_the_reference(case: Case) -> None:
    inputs = case.make()
    expected = inputs.run(attention_reference.paged_attention)
    with PoisonedEmpty():
        actual = inputs.run(OPS.paged_attention)
    compare(actual, expected, 1e-5)
    assert actual.is_contiguous()


@attention_cases
def test_a_query_keeps_its_bits(case: Case) -> None:
    """Every query by itself, then every request cut at random: as in the whole step."""
    inputs = case.make()
    expected = inputs.run(OPS.paged_attention)
    chance, start = random.Random(0), 0
    for request, (count, context) in enumerate(case.requests):
        cuts = sorted({0, count, *(chance.randint(0, count) for _ in range(2))})
        ranges = [(i, i + 1) for i in chance.sample(range(count), min(count, 8))]
        for first, last in [*ranges, *pairwise(cuts)]:
            rows = slice(start + first, start + last)
            assert torch.equal(run_part(inputs, request, context - count + last, rows), expected[rows])
        start += count


def run_part(inputs: Inputs, request: int, context: int, rows: slice) -> Tensor:
    """The attention of a request's last queries of a shorter context, alone in a step."""
    count = rows.stop - rows.start
    batch = AttentionBatch(
        inputs.batch.block_tables[request : request + 1],
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
        [count],
        [context],
        int(count == 1),
    )
    return replace(inputs, q=inputs.q[rows], batch=batch).run(OPS.paged_attention)


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────────────────────

WIDTHS = [48, 577, 1536, SERIAL_ELEMENTS // 2 - 1, SERIAL_ELEMENTS + 5]


@pytest.mark.parametrize("width", WIDTHS)
def test_norms_and_activations_keep_their_bits(width: int) -> None:
    x, residual, gate_up, weight = randn(30, width), randn(30, width, seed=1), randn(30, 2 * width), randn(width)
    normed, silu, gelu = OPS.rms_norm(x, weight, 1e-5), OPS.silu_mul(gate_up), OPS.gelu_mul(gate_up)
    summed = residual.clone()
    added = OPS.add_rms_norm(x, summed, weight, 1e-5)
    for rows in companies(30):
        assert torch.equal(OPS.rms_norm(x[rows], weight, 1e-5), normed[rows])
        assert torch.equal(OPS.silu_mul(gate_up[rows]), silu[rows])
        assert torch.equal(OPS.gelu_mul(gate_up[rows]), gelu[rows])
        own = residual[rows]
        assert torch.equal(OPS.add_rms_norm(x[rows], own, weight, 1e-5), added[rows])
        assert torch.equal(own, summed[rows])


@pytest.mark.parametrize("case", ROTARY_CASES, ids=lambda case: case.name)
def test_rotations_keep_their_bits(case: object) -> None:
    whole, expected = case.make(), case.make()  # type: ignore[attr-defined]
    whole.run(OPS.rotary_kv_write)
    expected.run(rotary_reference.rotary_kv_write)
    for got, want in ((whole.q, expected.q), (whole.k, expected.k)):
        compare(got, want, 1e-6)
    for rows in companies(len(whole.slots)):
        part = case.make()  # type: ignore[attr-defined]
        part = replace(
            part, q=part.q[rows], k=part.k[rows], v=part.v[rows], positions=part.positions[rows], slots=part.slots[rows]
        )
        part.run(OPS.rotary_kv_write)
        assert torch.equal(part.q, whole.q[rows])
        assert torch.equal(part.k, whole.k[rows])
        slots = part.slots[part.slots >= 0]
        for cache, other in ((part.k_cache, whole.k_cache), (part.v_cache, whole.v_cache)):
            written, expected_entries = (c.flatten(0, 1)[slots].float() for c in (cache, other))
            assert torch.equal(written, expected_entries)


def test_adapters_keep_their_bits() -> None:
    x, a, b, scales = randn(30, 64), randn(3, 8, 64), randn(3, 48, 8), randn(3)
    adapters = (torch.arange(30) % 4 - 1).int()
    expected = torch.zeros(30, 48)
    OPS.add_lora(expected, x, a, b, adapters, scales)
    for rows in companies(30):
        got = torch.zeros(len(rows), 48)
        OPS.add_lora(got, x[rows], a, b, adapters[rows], scales)
        assert torch.equal(got, expected[rows])


def test_log_probabilities_keep_their_bits_whatever_k() -> None:
    logits, tokens = randn(30, 40_000).round(decimals=2), torch.arange(30)
    expected = OPS.top_logprobs(logits, tokens, 20)
    for k, rows in enumerate(companies(30)):
        got = OPS.top_logprobs(logits[rows], tokens[rows], k)
        assert torch.equal(got.logprob, expected.logprob[rows])
        assert torch.equal(got.rank, expected.rank[rows])
        assert torch.equal(got.top_ids, expected.top_ids[rows, :k])
        assert torch.equal(got.top_logprobs, expected.top_logprobs[rows, :k])
    assert OPS.top_logprobs(logits[:0], tokens[:0], 3).top_ids.shape == (0, 3)


@pytest.mark.parametrize("case", SAMPLING_CASES, ids=lambda case: case.name)
def test_draws_are_those_of_each_row_alone(case: object) -> None:
    logits, params = case.make()  # type: ignore[attr-defined]
    expected = OPS.sample(logits, params)
    assert torch.equal(expected, for_device(torch.device("cpu")).sample(logits, params))
    for rows in companies(len(logits)):
        part = SamplingBatch(
            *(getattr(params, name)[rows] for name in TENSORS),
            params.all_greedy, params.any_top_k, params.any_top_p, params.any_min_p,
        )  # fmt: skip
        assert torch.equal(OPS.sample(logits[rows], part), expected[rows])


TENSORS = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")


def test_no_such_ops_for_a_gpu() -> None:
    with pytest.raises(ValueError, match="no batch-invariant ops for device type 'cuda': use 'cpu'"):
        for_device(torch.device("cuda"), batch_invariant=True)


def test_the_log_tells_which_ops_were_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        for_device(torch.device("cpu"), batch_invariant=True)
    assert f"linear on cpu: {products.__name__}" in caplog.text
    assert f"sample on cpu: {batch_invariant.sample.__module__}" in caplog.text
