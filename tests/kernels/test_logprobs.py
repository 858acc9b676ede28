"""top_logprobs against sorting in Python, and its order among equals."""

import math

import pytest
import torch
from pagoda_kernels.logprobs import GetTopLogprobs, cpu, reference
from pagoda_kernels.logprobs.cases import CASES, Case

implementations = pytest.mark.parametrize("op", [reference.top_logprobs, cpu.top_logprobs], ids=["reference", "cpu"])


@implementations
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_best_in_their_order(case: Case, op: GetTopLogprobs) -> None:
    logits, tokens = case.make()
    before = logits.clone()
    found = op(logits, tokens, case.k)
    for i, (row, token) in enumerate(zip(logits.tolist(), tokens.tolist(), strict=True)):
        best = sorted(range(len(row)), key=lambda t, row=row: (-row[t], t))[: case.k]  # type: ignore[misc]
        normaliser = max(row) + math.log(math.fsum(math.exp(x - max(row)) for x in row))
        assert found.top_ids[i].tolist() == best
        assert found.top_logprobs[i].tolist() == pytest.approx([row[t] - normaliser for t in best], abs=1e-5)
        assert float(found.logprob[i]) == pytest.approx(row[token] - normaliser, abs=1e-5)
        assert int(found.rank[i]) == 1 + sum(x > row[token] for x in row)
    assert torch.equal(logits, before)
    assert (found.rank.dtype, found.top_ids.dtype) == (torch.int64, torch.int64)
    assert found.top_ids.shape == found.top_logprobs.shape == (case.rows, case.k)


@implementations
@pytest.mark.parametrize("k", [-1, 21, 50])
def test_a_k_out_of_range_is_refused(op: GetTopLogprobs, k: int) -> None:
    with pytest.raises(ValueError, match=f"k {k}: use 0 to 20"):
        op(torch.zeros(1, 30), torch.zeros(1, dtype=torch.int64), k)
    with pytest.raises(ValueError, match="use 0 to 3"):
        op(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), 4)
