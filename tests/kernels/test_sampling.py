"""sample: known answers, exact kept sets, frequencies, and independence of the batch."""

import dataclasses

import pytest
import torch
from pagoda_kernels.sampling import GROUP, TILE, Sample, SamplingBatch, cpu, reference, uniforms
from pagoda_kernels.sampling.cases import CASES, Case, Row, make_params, signed
from pagoda_kernels.sampling.philox import philox

implementations = pytest.mark.parametrize("op", [reference.sample, cpu.sample], ids=["reference", "cpu"])
FULL = 0xFFFFFFFF
DRAWS = 20000


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((FULL,) * 4, (FULL,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: str) -> None:
    """The vectors of Random123's kat_vectors file."""
    assert " ".join(f"{int(word):08x}" for word in philox(torch.tensor(counter), torch.tensor(key))) == words


def test_uniforms_are_a_word_and_ten_bits_of_the_last_one_each() -> None:
    last = 0x9B00DBD8
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C)
    expected = [[((word << 10) + ((last >> 10 * i) & 0x3FF)) / 2**42] for i, word in enumerate(words)]
    assert uniforms(torch.tensor([0]), torch.tensor([0])).tolist() == expected


def test_uniforms_use_all_bits_of_seed_and_position() -> None:
    seeds = torch.tensor([signed(s) for s in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1)])
    for numbers in (*uniforms(seeds, torch.zeros_like(seeds)), *uniforms(torch.zeros_like(seeds), seeds)):
        assert len(set(numbers.tolist())) == len(seeds)


def test_uniforms_are_uniform_and_independent() -> None:
    u = uniforms(torch.full((DRAWS,), 42), torch.arange(DRAWS))
    assert 0 <= float(u.min()) < float(u.max()) < 1
    cells = (u * 7).long()
    assert_frequencies(cells[0] * 49 + cells[1] * 7 + cells[2], torch.full((343,), 1 / 343, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cpu_agrees_with_the_reference(case: Case) -> None:
    for seed in range(3):
        logits, params = case.make(seed=seed)
        before = logits.clone()
        assert torch.equal(cpu.sample(logits, params), reference.sample(logits, params))
        assert torch.equal(logits, before)


KEPT = [
    (Row(), [0, 1, 2, 3, 4, 5]),
    (Row(top_k=1), [1]),
    (Row(top_k=2), [1, 3]),
    (Row(top_k=3), [0, 1, 3, 5]),  # 0 and 5 are equal
    (Row(top_k=6), [0, 1, 2, 3, 4, 5]),
    (Row(top_k=99), [0, 1, 2, 3, 4, 5]),
    (Row(top_p=0.39), [1]),
    (Row(top_p=0.41), [1, 3]),
    (Row(top_p=0.64), [1, 3]),
    (Row(top_p=0.66), [0, 1, 3, 5]),
    (Row(top_p=0.999), [0, 1, 2, 3, 4, 5]),
    (Row(top_p=1e-9), [1]),
    (Row(top_k=2, top_p=0.62), [1, 3]),  # 0.4 / 0.65 = 0.615
    (Row(top_k=2, top_p=0.61), [1]),
    (Row(min_p=0.63), [1]),
    (Row(min_p=0.62), [1, 3]),
    (Row(min_p=0.2), [0, 1, 3, 5]),
    (Row(min_p=1.0), [1]),
    (Row(0.5, top_p=0.59), [1]),  # 0.4² / (sum of squares) = 0.595
    (Row(0.5, top_p=0.6), [1, 3]),
    (Row(0.5, min_p=0.38), [1, 3]),
    (Row(0.5, min_p=0.40), [1]),
    (Row(top_k=4, top_p=0.68, min_p=0.3), [1, 3]),
    (Row(0.0), [1]),
]
PROBABILITIES = torch.tensor([0.15, 0.40, 0.03, 0.25, 0.02, 0.15], dtype=torch.float64)


@implementations
@pytest.mark.parametrize(("row", "kept"), KEPT)
def test_the_kept_set_is_exact(op: Sample, row: Row, kept: list[int]) -> None:
    """2,000 draws meet every kept token, and no other; once alone, and once far inside a larger vocabulary."""
    rows = [dataclasses.replace(row, seed=7, position=i) for i in range(2000)]
    logits = PROBABILITIES.log().float().repeat(len(rows), 1)
    assert sorted(set(op(logits, make_params(rows)).tolist())) == kept
    padded = torch.full((len(rows), 700), float("-inf"))
    padded[:, 300:306] = logits
    assert sorted(set((op(padded, make_params(rows)) - 300).tolist())) == kept


@implementations
def test_more_equal_logits_than_candidates_are_all_kept(op: Sample) -> None:
    rows = [Row(top_k=3, seed=i) for i in range(4000)]
    tokens = op(torch.zeros(1, 1000).expand(len(rows), -1).clone(), make_params(rows))
    assert len(set(tokens.tolist())) > 900


def assert_frequencies(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square of the counts, as a standard normal by Wilson and Hilferty's cube root; 5 sigma is one in 10⁶."""
    expected = probabilities * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = float(((counts - expected)[possible].square() / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert abs(z) < 5, f"chi-square {chi_square:.1f} for {freedom} degrees of freedom"


@implementations
@pytest.mark.parametrize(
    "row",
    [Row(), Row(0.7), Row(1.5), Row(top_k=10), Row(top_p=0.8), Row(min_p=0.05), Row(0.8, 25, 0.9, 0.02)],
    ids=["plain", "cool", "warm", "top_k", "top_p", "min_p", "all"],
)
def test_frequencies_are_the_probabilities(op: Sample, row: Row) -> None:
    base = torch.randn(100, generator=torch.Generator().manual_seed(3)) * 1.5
    exact = (base.double() / row.temperature).softmax(0)
    if row.top_k:
        exact[exact < exact.sort(descending=True).values[row.top_k - 1]] = 0
        exact /= exact.sum()
    ordered = exact.sort(descending=True)
    above = ordered.values.cumsum(0) - ordered.values
    exact[ordered.indices[above >= row.top_p]] = 0
    exact[exact < row.min_p * exact.max()] = 0
    rows = [dataclasses.replace(row, seed=2**63 + 5, position=i) for i in range(DRAWS)]
    assert_frequencies(op(base.repeat(DRAWS, 1), make_params(rows)), exact / exact.sum())


@implementations
@pytest.mark.parametrize("row", [Row(), Row(1.3, top_p=0.9)], ids=["plain", "top_p"])
def test_frequencies_hold_over_tiles_and_groups(op: Sample, row: Row) -> None:
    """Three tiles, the last one short; groups of one token, of a few and of many, and some with none."""
    places = [3, GROUP - 1, GROUP, 5 * GROUP + 7, TILE - 1, TILE, *range(TILE + 64, TILE + 104), 2 * TILE + 40]
    places += list(range(2 * TILE + 96, 2 * TILE + 200, 3))
    draws, base = 2000, torch.full((2 * TILE + 200,), float("-inf"))
    base[places] = torch.randn(len(places), generator=torch.Generator().manual_seed(5))
    rows = [dataclasses.replace(row, seed=i) for i in range(draws)]
    params = make_params(rows)
    exact = reference.kept_logits(base.unsqueeze(0), make_params([row])).softmax(dim=-1)[0]
    tokens = torch.cat([op(base.repeat(500, 1), part(params, i, 500)) for i in range(0, draws, 500)])
    assert_frequencies(tokens, exact)


@implementations
def test_the_last_bits_of_flat_logits_seldom_change_a_token(op: Sample) -> None:
    """Noise of 0.005, far more than any arithmetic's, to meet some: one row of all shares would change every third."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 49152, generator=generator) * 0.5
    params = make_params([Row(seed=i, position=i) for i in range(len(logits))])
    other = logits + torch.randn(logits.shape, generator=generator) * 0.005
    assert int((op(logits, params) != op(other, params)).sum()) <= 10


def part(params: SamplingBatch, start: int, count: int) -> SamplingBatch:
    """The parameters of some rows."""
    columns = (getattr(params, field.name) for field in dataclasses.fields(params))
    return SamplingBatch(*(x[start : start + count] if isinstance(x, torch.Tensor) else x for x in columns))


@implementations
def test_a_token_does_not_depend_on_the_batch(op: Sample) -> None:
    logits, _ = Case("any", (Row(),), requests=40).make()
    kinds = (Row(0.0), Row(), Row(0.7, 20, 0.9, 0.05), Row(top_p=0.5), Row(top_k=3), Row(min_p=0.2))
    rows = [dataclasses.replace(kinds[i % len(kinds)], seed=i * 12345, position=i) for i in range(40)]
    together = op(logits, make_params(rows))
    alone = torch.cat([op(logits[i : i + 1], make_params([row])) for i, row in enumerate(rows)])
    assert torch.equal(together, alone)
    backwards = op(logits.flip(0), make_params(rows[::-1])).flip(0)
    assert torch.equal(together, backwards)


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_16_bits_give_the_tokens_of_the_same_numbers(op: Sample, dtype: torch.dtype) -> None:
    kinds = (Row(0.0), Row(), Row(0.7, 20, 0.9, 0.05), Row(1.3, top_p=0.9), Row(top_k=3), Row(min_p=0.2))
    logits, params = Case("any", kinds, requests=48).make()
    narrow = logits.to(dtype)
    assert op(narrow, params).tolist() == op(narrow.float(), params).tolist()
    assert op(narrow, make_params([Row(0.0)] * 48)).tolist() == narrow.float().argmax(dim=-1).tolist()


@implementations
def test_greedy_takes_the_lowest_id_among_equals(op: Sample) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert op(logits, make_params([Row(0.0)] * 2)).tolist() == [1, 0]
    assert op(logits, make_params([Row(0.0), Row(1.0, top_k=1)]))[0] == 1


@implementations
@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), float("inf")], ids=str)
def test_broken_rows_give_some_token_and_leave_the_others_alone(op: Sample, poison: float) -> None:
    rows = [Row(0.7, 20, 0.9, 0.05, seed=i) for i in range(3)]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = op(logits, make_params(rows))
    logits[1] = poison
    tokens = op(logits, make_params(rows))
    assert 0 <= int(tokens[1]) < 50
    assert tokens[[0, 2]].tolist() == expected[[0, 2]].tolist()
