"""The kernels of top_logprobs against the reference: the same ids and ranks."""

import pytest
import torch
from pagoda_kernels.logprobs import TopLogprobs, reference
from pagoda_kernels.logprobs.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty

LARGE = (
    Case("llama", 20, rows=256, vocabulary=128256),
    Case("llama_16_bit", 20, rows=64, vocabulary=128256, levels=16),
    Case("llama_only_the_token", 0, rows=64, vocabulary=128256),
    Case("gemma", 5, rows=9, vocabulary=262144, forbidden=0.9999),
)


def assert_equal(actual: TopLogprobs, expected: TopLogprobs) -> None:
    assert actual.rank.tolist() == expected.rank.tolist()
    assert actual.top_ids.tolist() == expected.top_ids.tolist()
    torch.testing.assert_close(actual.logprob, expected.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.native) for case in LARGE)],
    ids=lambda case: case.name,
)
def test_top_logprobs_agrees_with_the_reference(case: Case, device: str) -> None:
    from pagoda_kernels.logprobs import kernel

    logits, tokens = case.make(device)
    before = logits.clone()
    with PoisonedEmpty():
        actual = kernel.top_logprobs(logits, tokens, case.k)
    assert_equal(actual, reference.top_logprobs(logits, tokens, case.k))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), float("inf")], ids=str)
def test_broken_rows_leave_the_others_alone(poison: float, device: str) -> None:
    from pagoda_kernels.logprobs import kernel

    logits, tokens = Case("any", 5, rows=3).make(device)
    expected = reference.top_logprobs(logits, tokens, 5)
    logits[1] = poison
    actual = kernel.top_logprobs(logits, tokens, 5)
    assert 0 <= int(actual.top_ids[1].min()) <= int(actual.top_ids[1].max()) < 1000
    others = (TopLogprobs(x.logprob[::2], x.rank[::2], x.top_ids[::2], x.top_logprobs[::2]) for x in (actual, expected))
    assert_equal(*others)
