"""The kernels of sample against the reference: the same token for the same (seed, position)."""

import dataclasses

import pytest
import torch
from pagoda_kernels.sampling import reference
from pagoda_kernels.sampling.cases import CASES, Case, Row, make_params
from pagoda_kernels.testing import PoisonedEmpty

_ALL = Row(0.7, 50, 0.9, 0.02)
SMALL = (
    Case("two_tiles", (Row(), _ALL, Row(top_p=0.8), Row(0.0)), requests=4, vocabulary=8192 + 100),
    Case("beyond_the_candidates", (Row(2.0, top_p=0.9), Row(top_k=2000), Row(min_p=0.05)), 3, 9000, 0.5),
)
# Left out in the interpreter, where beyond_the_candidates searches the whole row too.
SLOW = ("top_p_flat", "top_k_then_top_p_flat", "mixed_large_vocabulary", "top_k_beyond_vocabulary")
LARGE = (
    Case("llama", (_ALL,), 256, 128256),
    Case("llama_mixed", (Row(0.0), Row(), _ALL, Row(top_p=0.9), Row(top_k=50), Row(min_p=0.1)), 256, 128256),
    Case("llama_wide_top_p", (Row(top_p=0.99), Row(1.5, top_p=0.95), Row(top_k=5000)), 48, 128256),
    Case("llama_one", (_ALL,), 1, 128256),
    Case("gemma", (Row(), _ALL, Row(top_p=0.9)), 9, 262144),
)


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, marks=pytest.mark.native) if case.name in SLOW else case for case in (*CASES, *SMALL)),
        *(pytest.param(case, marks=pytest.mark.native) for case in LARGE),
    ],
    ids=lambda case: case.name,
)
def test_sample_agrees_with_the_reference(case: Case, device: str) -> None:
    from pagoda_kernels.sampling import kernel

    logits, params = case.make(device)
    before = logits.clone()
    with PoisonedEmpty():
        actual = kernel.sample(logits, params)
    assert actual.dtype == torch.int64
    assert actual.tolist() == reference.sample(logits, params).tolist()
    assert torch.equal(logits, before)


@pytest.mark.native
def test_many_draws_agree_with_the_reference(device: str) -> None:
    """Against 100,000 draws, of which rounding may decide a few."""
    from pagoda_kernels.sampling import kernel

    kinds = (Row(), Row(0.7), Row(1.5), Row(top_k=10), Row(top_p=0.8), Row(min_p=0.05), Row(0.8, 25, 0.9, 0.02))
    rows = [dataclasses.replace(kinds[i % len(kinds)], seed=2**63 + 5, position=i) for i in range(100_000)]
    logits = (torch.randn(500, generator=torch.Generator().manual_seed(3)) * 1.5).to(device).expand(len(rows), -1)
    params = make_params(rows, device)
    different = kernel.sample(logits, params) != reference.sample(logits, params)
    assert int(different.sum()) <= 5


KEPT = [
    Row(),
    Row(top_k=2),
    Row(top_k=3),
    Row(top_k=99),
    Row(top_p=0.39),
    Row(top_p=0.41),
    Row(top_p=0.66),
    Row(top_k=2, top_p=0.62),
    Row(top_k=2, top_p=0.61),
    Row(min_p=0.63),
    Row(min_p=0.62),
    Row(min_p=1.0),
    Row(0.5, top_p=0.59),
    Row(0.5, top_p=0.6),
    Row(top_k=4, top_p=0.68, min_p=0.3),
]


def test_the_kept_set_is_the_references(device: str) -> None:
    """Rows at both sides of a threshold, with equal logits; alone, and far inside a larger vocabulary."""
    from pagoda_kernels.sampling import kernel

    probabilities = torch.tensor([0.15, 0.40, 0.03, 0.25, 0.02, 0.15], dtype=torch.float64)
    draws = 2 if device == "cpu" else 500
    rows = [dataclasses.replace(row, seed=7, position=i) for row in KEPT for i in range(draws)]
    params = make_params(rows, device)
    logits = probabilities.log().float().repeat(len(rows), 1).to(device)
    assert kernel.sample(logits, params).tolist() == reference.sample(logits, params).tolist()
    padded = torch.full((len(rows), 700), float("-inf"), device=device)
    padded[:, 300:306] = logits
    assert kernel.sample(padded, params).tolist() == reference.sample(padded, params).tolist()


def test_more_equal_logits_than_candidates_are_all_kept(device: str) -> None:
    from pagoda_kernels.sampling import kernel

    rows = [Row(top_k=3, seed=i) for i in range(3)]
    logits = torch.zeros(len(rows), 9000, device=device)
    logits[:, ::2] = -0.0  # the same number
    params = make_params(rows, device)
    assert kernel.sample(logits, params).tolist() == reference.sample(logits, params).tolist()


def test_logits_with_many_equals(device: str) -> None:
    """Those of a 16-bit model are: every group maximum has its like."""
    from pagoda_kernels.sampling import kernel

    rows = [_ALL, Row(top_p=0.5), Row(top_k=20), Row(min_p=0.3), Row(1.2, top_p=0.9)]
    logits, _ = Case("any", (Row(),), requests=len(rows), vocabulary=9000).make(device)
    logits = logits.bfloat16().float()
    params = make_params([dataclasses.replace(row, seed=i) for i, row in enumerate(rows)], device)
    assert kernel.sample(logits, params).tolist() == reference.sample(logits, params).tolist()


@pytest.mark.parametrize(
    ("requests", "vocabulary"), [(7, 5000), pytest.param(64, 128256, marks=pytest.mark.native)], ids=["small", "llama"]
)
def test_logits_of_any_float_type_give_the_tokens_of_the_same_numbers(
    dtype: torch.dtype, requests: int, vocabulary: int, device: str
) -> None:
    """Greedy, drawn, filtered and searched rows; the logits stay as they were."""
    from pagoda_kernels.sampling import kernel

    kinds = (Row(0.0), Row(), _ALL, Row(1.3, top_p=0.9), Row(top_k=3), Row(min_p=0.2), Row(top_k=2000))
    logits, params = Case("any", kinds, requests, vocabulary, 1.5).make(device)
    logits = logits.to(dtype)
    before = logits.clone()
    expected = reference.sample(logits.float(), params)
    with PoisonedEmpty():
        assert kernel.sample(logits, params).tolist() == expected.tolist()
        greedy = kernel.sample(logits, make_params([Row(0.0)] * requests, device))
    assert greedy.tolist() == logits.float().argmax(dim=-1).tolist()
    assert torch.equal(logits, before)


def test_a_token_does_not_depend_on_the_batch(device: str) -> None:
    from pagoda_kernels.sampling import kernel

    logits, _ = Case("any", (Row(),), requests=12, vocabulary=5000).make(device)
    kinds = (Row(0.0), Row(), _ALL, Row(top_p=0.5), Row(top_k=3), Row(min_p=0.2))
    rows = [dataclasses.replace(kinds[i % len(kinds)], seed=i * 12345, position=i) for i in range(12)]
    together = kernel.sample(logits, make_params(rows, device))
    alone = [int(kernel.sample(logits[i : i + 1], make_params([row], device))) for i, row in enumerate(rows)]
    assert together.tolist() == alone
    backwards = kernel.sample(logits.flip(0), make_params(rows[::-1], device)).flip(0)
    assert torch.equal(together, backwards)


@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), float("inf")], ids=str)
@pytest.mark.parametrize("row", [Row(0.0), Row(), _ALL], ids=["greedy", "plain", "filtered"])
@pytest.mark.parametrize("vocabulary", [50, pytest.param(9000, marks=pytest.mark.native)])
def test_broken_rows_give_some_token_and_leave_the_others_alone(
    vocabulary: int, row: Row, poison: float, device: str
) -> None:
    from pagoda_kernels.sampling import kernel

    rows = [dataclasses.replace(row, seed=i) for i in range(3)]
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)).to(device)
    expected = kernel.sample(logits, make_params(rows, device))
    logits[1] = poison
    tokens = kernel.sample(logits, make_params(rows, device))
    assert 0 <= int(tokens[1]) < vocabulary
    assert tokens[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_greedy_takes_the_lowest_id_among_equals(device: str) -> None:
    from pagoda_kernels.sampling import kernel

    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]], device=device)
    assert kernel.sample(logits, make_params([Row(0.0)] * 2, device)).tolist() == [1, 0]
    assert kernel.sample(logits, make_params([Row(0.0), Row(1.0, top_k=1)], device))[0] == 1


def test_a_wide_top_p_is_settled_by_narrowing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of tokens are kept, and no row is left for the search over the whole row."""
    from pagoda_kernels.sampling import kernel
    from pagoda_kernels.sampling.rows import NARROW

    states: list[torch.Tensor] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *args, **sizes: states.append(args[9])

    monkeypatch.setattr(kernel, "search_kernel", Recorder())
    logits, params = Case("wide", (Row(1.3, top_p=0.9), Row(1.0, top_p=0.99)), 4, 9000, 1.5).make(device)
    assert kernel.sample(logits, params).tolist() == reference.sample(logits, params).tolist()
    assert states[0].tolist() == [NARROW.value] * 4
