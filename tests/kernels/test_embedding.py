"""embedding: row i of the result is the row of token i."""

import pytest
import torch
from pagoda_kernels.embedding.cases import CASES, Case
from pagoda_kernels.embedding.reference import embedding


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_token_gets_its_row(case: Case) -> None:
    inputs = case.make()
    actual = embedding(inputs.token_ids, inputs.weight)
    assert actual.shape == (case.tokens, case.hidden)
    assert actual.is_contiguous()
    for row, token in zip(actual, inputs.token_ids.tolist(), strict=True):
        assert torch.equal(row, inputs.weight[token])
